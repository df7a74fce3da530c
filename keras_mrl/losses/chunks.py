"""Softmaxes at every dim, their losses and gradients, a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from keras import ops

from . import _backend
from .targets import Targets

_LOGITS = 2**22  # of one dim at a time: 16 MiB
_PADDED = 128  # rows of a chunk where the number of rows is not known


class Sums(NamedTuple):
    """Losses and ranks `(rows, num_dims)`, and the gradient of the weighted sum of the losses."""

    losses: Any
    ranks: Any
    features: Any
    kernels: list[Any]
    biases: list[Any]


def chunked(
    x: Any,
    targets: Targets,
    counts: Any,
    kernels: Sequence[Any],
    biases: Sequence[Any],
    dims: tuple[int, ...],
    chunk_rows: int | None,
    training: bool,
) -> Sums:
    """Return the sums over all rows.

    Args:
        x: `(rows, dims[-1])`, float32.
        targets: What each row should say.
        counts: What each loss counts in the sum, `(rows, num_dims)`: c_m times the row's weight.
        kernels: One per dim, or one for all.
        biases: As many, or none.
        dims: The prefix lengths.
        chunk_rows: Rows at a time; None decides.
        training: Whether the gradient is computed, too.
    """
    size, rows = chunk_rows or rows_at_a_time(kernels), x.shape[0]
    number = None if rows is None else _number(rows, size)
    if _backend.in_place is not None:
        size = -(-rows // number)
        return Sums(*_backend.in_place(x, targets, counts, kernels, biases, dims, size, training))
    if number == 1:
        return _gathered(_chunk(x, targets, counts, kernels, biases, dims, training), kernels)
    return _loop(x, targets, counts, kernels, biases, dims, training, number, size)


def rows_at_a_time(kernels: Sequence[Any]) -> int:
    """Return how many rows make a chunk.

    As many as make a matrix of logits of the budget, and enough for the products to outweigh adding
    each chunk's gradient to the kernel's.
    """
    width, classes = kernels[-1].shape
    return int(max(_LOGITS // classes, width // 4, 8))


def _number(rows: int, size: int) -> int:
    """Return the number of chunks: if need be some more, so that none is padded."""
    number = max(1, -(-rows // size))
    even = (n for n in range(number, 2 * number) if rows % n == 0)
    return next(even, number)


def _loop(
    x: Any,
    targets: Targets,
    counts: Any,
    kernels: Sequence[Any],
    biases: Sequence[Any],
    dims: tuple[int, ...],
    training: bool,
    number: int | None,
    size: int,
) -> Sums:
    rows = ops.shape(x)[0]
    if number is None:  # known only in the step, where a small batch is padded to a chunk
        size = min(size, _PADDED)
        number = (rows + size - 1) // size
    else:
        size = -(-x.shape[0] // number)
    spare = size * number - rows

    def cut(tensor: Any) -> Any:
        """Chunk i holds rows i, i + number, ...: sharded over devices, it stays on each of them."""
        widths = [(0, spare), *((0, 0) for _ in tensor.shape[1:])]
        padded = tensor if isinstance(spare, int) and spare == 0 else ops.pad(tensor, widths)
        return ops.reshape(padded, (size, number, *tensor.shape[1:]))

    parts = targets.map(lambda t: cut(ops.cast(t, "float32")) if t.dtype == "bool" else cut(t))
    xs, every = cut(x), cut(counts)

    def body(index: Any, state: Any) -> Any:
        rowwise, summed = state

        def take(tensor: Any) -> Any:
            begin = (0, index, *(0 for _ in tensor.shape[2:]))
            shape = (size, 1, *tensor.shape[2:])
            return ops.squeeze(ops.slice(tensor, begin, shape), axis=1)

        done = _chunk(take(xs), parts.map(take), take(every), kernels, biases, dims, training)
        new = [done.losses, done.ranks] + ([done.features] if training else [])
        rowwise = [
            ops.slice_update(whole, (0, index, 0), ops.expand_dims(part, 1))
            for whole, part in zip(rowwise, new, strict=True)
        ]
        added = [*done.kernels, *done.biases]
        return rowwise, [whole + part for whole, part in zip(summed, added, strict=True)]

    nothing = ops.zeros_like(every)
    state = (
        [nothing, nothing] + ([ops.zeros_like(xs)] if training else []),
        [ops.zeros(shape) for shape in _gradient_shapes(kernels, biases, dims)] if training else [],
    )
    rowwise, summed = ops.fori_loop(0, number, body, state)
    whole = [ops.reshape(r, (size * number, r.shape[-1]))[:rows] for r in rowwise]
    done = Sums(whole[0], whole[1], whole[-1], summed[: len(summed) - len(biases)], [])
    return _gathered(done._replace(biases=summed[len(summed) - len(biases) :]), kernels)


def _gradient_shapes(
    kernels: Sequence[Any], biases: Sequence[Any], dims: tuple[int, ...]
) -> list[tuple[int, ...]]:
    """Of what `_chunk` gives: tied, one gradient per block of the kernel."""
    classes = kernels[0].shape[1]
    heights = [b - a for a, b in _blocks(dims)] if len(kernels) == 1 else dims
    return [*((height, classes) for height in heights), *((classes,) for _ in biases)]


def _gathered(sums: Sums, kernels: Sequence[Any]) -> Sums:
    """Put the blocks of one kernel together."""
    tied = len(kernels) == 1 and len(sums.kernels) > 1
    return sums._replace(kernels=[ops.concatenate(sums.kernels)]) if tied else sums


def _blocks(dims: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(zip((0, *dims[:-1]), dims, strict=True))


def _chunk(
    x: Any,
    targets: Targets,
    counts: Any,
    kernels: Sequence[Any],
    biases: Sequence[Any],
    dims: tuple[int, ...],
    training: bool,
) -> Sums:
    every = [counts[:, index : index + 1] for index in range(len(dims))]
    if len(kernels) == 1:
        return _tied(x, targets, every, kernels[0], biases, dims, training)
    return _untied(x, targets, every, kernels, biases, dims, training)


def _tied(
    x: Any,
    targets: Targets,
    counts: Sequence[Any],
    kernel: Any,
    biases: Sequence[Any],
    dims: tuple[int, ...],
    training: bool,
) -> Sums:
    """One kernel: every block is multiplied once, forward and each way backward."""
    blocks = _blocks(dims)
    logits: Any = biases[0] if biases else 0.0
    softmaxes = []
    for start, stop in blocks:
        logits = logits + ops.matmul(x[:, start:stop], kernel[start:stop])
        softmaxes.append(_softmax(logits, targets))
    losses, ranks = (ops.concatenate([s[i] for s in softmaxes], axis=1) for i in (0, 1))
    if not training:
        return Sums(losses, ranks, None, [], [])
    d_x, d_kernels = [], []
    d_logits: Any = 0.0
    for (start, stop), count in zip(reversed(blocks), reversed(counts), strict=True):
        # A block is in its own dim's prefix and in all wider ones.
        d_logits = d_logits + _gradient(*softmaxes.pop()[2:], targets, count)
        d_x.append(ops.matmul(d_logits, ops.transpose(kernel[start:stop])))
        d_kernels.append(ops.matmul(ops.transpose(x[:, start:stop]), d_logits))
    d_biases = [ops.sum(d_logits, axis=0) for _ in biases]
    return Sums(losses, ranks, ops.concatenate(d_x[::-1], axis=1), d_kernels[::-1], d_biases)


def _untied(
    x: Any,
    targets: Targets,
    counts: Sequence[Any],
    kernels: Sequence[Any],
    biases: Sequence[Any],
    dims: tuple[int, ...],
    training: bool,
) -> Sums:
    """A kernel per dim: one after the other, so that the logits of one are held at a time."""
    losses, ranks, d_kernels, d_biases = [], [], [], []
    d_x: Any = ops.zeros_like(x)
    for index, (dim, count) in enumerate(zip(dims, counts, strict=True)):
        prefix = x[:, :dim]
        logits = ops.matmul(prefix, kernels[index]) + (biases[index] if biases else 0.0)
        loss, rank, shifted, sums = _softmax(logits, targets)
        losses.append(loss)
        ranks.append(rank)
        if training:
            d_logits = _gradient(shifted, sums, targets, count)
            d_prefix = ops.matmul(d_logits, ops.transpose(kernels[index]))
            d_x = d_x + ops.pad(d_prefix, ((0, 0), (0, dims[-1] - dim)))
            d_kernels.append(ops.matmul(ops.transpose(prefix), d_logits))
            d_biases.append(ops.sum(d_logits, axis=0))
    said = ops.concatenate(losses, axis=1), ops.concatenate(ranks, axis=1)
    return Sums(*said, d_x, d_kernels, d_biases[: len(biases)])


def _gradient(shifted: Any, sums: Any, targets: Targets, count: Any) -> Any:
    """Return the gradient with respect to one dim's logits."""
    return shifted * (count * targets.total() / sums) - count * targets.smooth_shares()


def _softmax(logits: Any, targets: Targets) -> tuple[Any, Any, Any, Any]:
    """Return losses and ranks `(rows, 1)`, exponentials, and their sums `(rows, 1)`."""
    right = ops.expand_dims(targets.classes, 1)
    own = ops.take_along_axis(logits, right, axis=1)
    largest = ops.max(logits, axis=1, keepdims=True)
    shifted = ops.exp(logits - largest)
    sums = ops.sum(shifted, axis=1, keepdims=True)
    normalizer = largest + ops.log(sums)
    if targets.shares is not None:
        said = ops.sum(logits * targets.smooth_shares(), axis=1, keepdims=True)
        loss = normalizer * targets.total() - said
    else:
        loss = normalizer - own
        if targets.smoothing:
            mean = ops.mean(logits, axis=1, keepdims=True)
            loss = normalizer - (1 - targets.smoothing) * own - targets.smoothing * mean
    outside = ops.expand_dims(ops.cast(targets.outside, "bool"), 1)
    loss = ops.where(outside, float("nan"), loss)
    numbers = ops.expand_dims(ops.arange(targets.num_classes, dtype="int32"), 0)
    before = (logits > own) | ((logits == own) & (numbers < right))  # as argmax breaks ties
    rank = ops.sum(ops.cast(before, "float32"), axis=1, keepdims=True)
    # No comparison with NaN is true: what is nowhere would come first.
    return loss, ops.where(ops.isnan(loss), float(targets.num_classes), rank), shifted, sums
