"""Softmaxes at every dim, their losses and gradients, a chunk of rows at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from keras import ops

from . import _backend
from .labelled import label_gradient
from .targets import Targets

_LOGITS = 2**22  # of one dim at a time: 16 MiB
_MANY_ROWS = 8192  # fitting at once, they are not chunked where their number is not known


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
    size = chunk_rows or rows_at_a_time(kernels)
    begun = label_gradient(x, targets, counts, kernels, biases, dims) if training else None
    if _backend.in_place is not None:
        return Sums(*_backend.in_place(x, targets, counts, kernels, biases, dims, size, begun))
    rows = x.shape[0]
    number = 1 if rows is None and size >= _MANY_ROWS else _number(rows, size)
    if number == 1:
        done = _chunk(x, targets, counts, kernels, biases, dims, training)
        if begun is None:
            return done
        first = _blockwise(begun, dims)
        d_kernels = [own + part for own, part in zip(first[0], done.kernels, strict=True)]
        d_biases = [own + part for own, part in zip(first[1], done.biases, strict=True)]
        done = done._replace(kernels=d_kernels, biases=d_biases)
    else:
        done = _loop(x, targets, counts, kernels, biases, dims, begun, number, size)
    if begun is None:
        return done
    tied = len(kernels) == 1 and len(done.kernels) > 1
    d_kernels = [ops.concatenate(done.kernels)] if tied else done.kernels
    return done._replace(features=begun[0] + done.features, kernels=d_kernels)


def rows_at_a_time(kernels: Sequence[Any]) -> int:
    """Return how many rows make a chunk.

    As many as make a matrix of logits of the budget, and enough for the products to outweigh adding
    each chunk's gradient to the kernel's.
    """
    width, classes = kernels[-1].shape
    return int(max(_LOGITS // classes, width // 4, 8))


def _blockwise(begun: Any, dims: tuple[int, ...]) -> tuple[list[Any], list[Any]]:
    """Kernels and biases of a gradient in the parts that chunks give: tied, block by block."""
    _, d_kernels, d_biases = begun
    if len(d_kernels) == 1:
        d_kernels = [d_kernels[0][start:stop] for start, stop in _blocks(dims)]
    return d_kernels, d_biases


def _number(rows: int | None, size: int) -> int | None:
    """Return the number of chunks, None where it is known only in the step."""
    if rows is None:
        return None
    number = max(1, -(-rows // size))
    even = (n for n in range(number, 2 * number) if rows % n == 0)  # no row of padding
    return next(even, number)


def _loop(
    x: Any,
    targets: Targets,
    counts: Any,
    kernels: Sequence[Any],
    biases: Sequence[Any],
    dims: tuple[int, ...],
    begun: Any,
    number: int | None,
    size: int,
) -> Sums:
    training = begun is not None
    rows = ops.shape(x)[0]
    if number is None:
        size = min(size, 256)  # what an unknown, small batch is padded to
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
    first = _blockwise(begun, dims) if training else ([], [])
    state = (
        [nothing, nothing] + ([ops.zeros_like(xs)] if training else []),
        [*first[0], *first[1]],
    )
    rowwise, summed = ops.fori_loop(0, number, body, state)
    whole = [ops.reshape(r, (size * number, r.shape[-1]))[:rows] for r in rowwise]
    cut_at = len(summed) - len(biases)
    return Sums(whole[0], whole[1], whole[-1], summed[:cut_at], summed[cut_at:])


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
    """Return the gradient with respect to one dim's logits, but for integer labels' own share."""
    softmax = shifted * (count * targets.total() / sums)
    if targets.shares is None and not targets.smoothing:
        return softmax
    return softmax - count * targets.smooth_shares()


def _softmax(logits: Any, targets: Targets) -> tuple[Any, Any, Any, Any]:
    """Return losses and ranks `(rows, 1)`, exponentials, and their sums `(rows, 1)`."""
    right = ops.expand_dims(targets.classes, 1)
    own = ops.take_along_axis(logits, right, axis=1)
    numbers = ops.expand_dims(ops.arange(targets.num_classes, dtype="int32"), 0)
    before = (logits > own) | ((logits == own) & (numbers < right))  # as argmax breaks ties
    rank = ops.sum(ops.cast(before, "float32"), axis=1, keepdims=True)
    largest = ops.max(logits, axis=1, keepdims=True)
    shifted = ops.exp(logits - largest)
    sums = ops.sum(shifted, axis=1, keepdims=True)
    normalizer = largest + ops.log(sums)
    if targets.shares is not None:
        said = ops.sum(logits * targets.smooth_shares(), axis=1, keepdims=True)
    elif targets.smoothing:
        mean = ops.mean(logits, axis=1, keepdims=True)
        said = (1 - targets.smoothing) * own + targets.smoothing * mean
    else:
        said = own
    loss = normalizer * targets.total() - said
    outside = ops.expand_dims(ops.cast(targets.outside, "bool"), 1)
    return ops.where(outside, float("nan"), loss), rank, shifted, sums
