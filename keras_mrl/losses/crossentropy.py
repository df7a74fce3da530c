"""Nested cross-entropy from features and kernels, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from .._dims import check_dims, check_width
from . import _torch
from . import weights as _weights
from .targets import Targets

# Softmaxes at every dim, their losses and gradients, a chunk of rows at a time.

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
    if _torch.in_place is not None:
        size = -(-rows // number)
        return Sums(*_torch.in_place(x, targets, counts, kernels, biases, dims, size, training))
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


class NestedCrossentropy(NamedTuple):
    """What one pass over a batch gives.

    Args:
        loss: The weighted sum, a scalar with a gradient.
        losses: The cross-entropy of every row at every dim, `(rows, num_dims)`, without gradient.
        ranks: How many classes come before the right one, in the same shape: 0 where the dim is
            right, below k where the right class is among the k best.

    Examples:
        >>> zeros = keras.ops.zeros((1, 2))
        >>> NestedCrossentropy(keras.ops.zeros(()), zeros, zeros).ranks.shape[-1]
        2
    """

    loss: Any
    losses: Any
    ranks: Any


def nested_crossentropy(
    features: Any,
    kernels: Sequence[Any],
    biases: Sequence[Any] | None,
    labels: Any,
    dims: Sequence[int],
    weights: Any = None,
    row_weights: Any = None,
    label_smoothing: float = 0.0,
    chunk_rows: int | None = None,
    training: bool = True,
) -> NestedCrossentropy:
    """Return the cross-entropy at every dim, its weighted sum, and who is right.

    Loss and gradient are computed together, a chunk of rows at a time, so the logits of a chunk
    are all that is ever held. Given one kernel (MRL-E), each block of it is multiplied once forward
    and once each way backward for all the dims that contain it: logits accumulate block by block,
    and so do, in reverse, the gradients of the softmaxes. Whatever the dtype of the features and
    kernels, sums are float32. `MatryoshkaClassifier.fit` uses it by itself.

    Args:
        features: Any float dtype.
        kernels: One per dim, or the one that all dims read by prefixes.
        biases: As many as kernels; None for none.
        labels: Integer class ids, or one row of probabilities per row of features.
        dims: Strictly increasing prefix lengths.
        weights: The c_m: numbers, a float tensor, a function of their number, or None for ones.
        row_weights: What each row's loss counts in the sum; None means the mean over rows.
        label_smoothing: Share of each label that is spread over all classes.
        chunk_rows: Rows at a time; None fits them to the caches and the size of a kernel.
        training: Whether a gradient will be asked for; without it, `loss` has none and costs less.

    Shapes:
        features: `(rows, width)`. kernels: `(dim, num_classes)` each, or one
        `(dims[-1], num_classes)`. biases: `(num_classes,)` each. labels: `(rows,)` or
        `(rows, num_classes)`. row_weights: `(rows,)`. losses and ranks: `(rows, num_dims)`.

    Formula:
        loss = sum_m c_m sum_i r_i CE(W^(m) . x_{i,1:m} + b^(m); y_i)

    Returns:
        Loss, losses and ranks; a label that names no class makes its losses, and the loss, NaN.

    Raises:
        ValueError: If shapes do not fit each other, or dims or weights are not valid.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, arXiv 2205.13147, equation 1.

    Examples:
        >>> kernels = [keras.ops.zeros((2, 10)), keras.ops.zeros((4, 10))]
        >>> features, labels = keras.ops.ones((3, 4)), keras.ops.array([1, 2, 3])
        >>> result = nested_crossentropy(features, kernels, None, labels, dims=(2, 4))
        >>> round(float(result.loss), 3)  # 2 dims x log 10
        4.605
    """
    dims, features, labels = check_dims(dims), _tensor(features), ops.convert_to_tensor(labels)
    check_width(dims, int(features.shape[-1]))
    _check_kernels(kernels, biases, dims)
    if weights is None or callable(weights) or isinstance(weights, (tuple, list)):
        weights = _weights.resolve(weights, len(dims))
    c = ops.convert_to_tensor(weights, "float32")
    targets = Targets.of(labels, int(kernels[0].shape[1]), label_smoothing)
    if row_weights is None:
        count = ops.cast(ops.maximum(ops.shape(features)[0], 1), "float32")
        row_weights = ops.ones_like(features[:, 0], dtype="float32") / count
    r = ops.cast(row_weights, "float32")
    num_dims, num_kernels = len(dims), len(kernels)

    def packed(*arguments: Any) -> tuple[Any, Any]:
        x, *parameters = (ops.cast(argument, "float32") for argument in arguments)
        sums = chunked(
            x[:, : dims[-1]],
            targets,
            ops.expand_dims(r, 1) * c,
            parameters[:num_kernels],
            parameters[num_kernels:],
            dims,
            chunk_rows,
            training,
        )
        # A row that counts nothing adds nothing, even where its loss is no number: an ignored one.
        shares = ops.where(ops.expand_dims(r, 1) * c != 0, sums.losses, 0.0)
        total = ops.sum(shares * (ops.expand_dims(r, 1) * c))
        flat = [
            ops.reshape(total, (1,)),
            *(ops.reshape(s, (-1,)) for s in (sums.losses, sums.ranks)),
        ]

        def gradient(*upstreams: Any, upstream: Any = None, **_: Any) -> Any:
            given = (upstreams[0] if upstream is None else upstream)[0]
            spare = int(x.shape[1]) - dims[-1]
            d_features = ops.pad(sums.features, ((0, 0), (0, spare))) if spare else sums.features
            parts = (d_features, *sums.kernels, *sums.biases)
            return tuple(
                ops.cast(part * given, argument.dtype)
                for part, argument in zip(parts, arguments, strict=True)
            )

        return ops.concatenate(flat), gradient

    arguments = (features, *map(_tensor, (*kernels, *(biases or ()))))
    function = ops.custom_gradient(packed) if training else lambda *args: packed(*args)[0]
    # One tensor, since a function with a gradient of its own gives one on every backend.
    said = function(*arguments)
    rows = ops.reshape(ops.stop_gradient(said[1:]), (2, -1, num_dims))
    return NestedCrossentropy(said[0], rows[0], rows[1])


def _tensor(given: Any) -> Any:
    """A tensor: a variable would be one that the function captures, not one of its arguments."""
    return given.value if isinstance(given, keras.Variable) else ops.convert_to_tensor(given)


def _check_kernels(
    kernels: Sequence[Any], biases: Sequence[Any] | None, dims: tuple[int, ...]
) -> None:
    shapes = [tuple(kernel.shape) for kernel in kernels]
    expected = [(dim, shapes[0][-1]) for dim in (dims if len(shapes) > 1 else dims[-1:])]
    if shapes != expected or (biases is not None and len(biases) != len(kernels)):
        raise ValueError(
            "kernels must be one (dim, num_classes) per dim, or one of the widest dim for all, and "
            f"biases as many. Received: kernels of shapes {shapes} and "
            f"{'no' if biases is None else len(biases)} biases for dims={dims}. "
            "MatryoshkaHead.parameters() gives both as they are needed."
        )
