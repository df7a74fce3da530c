"""Nested cross-entropy from features and kernels, a chunk of rows at a time.

A loss that is reduced to a number has a gradient that scales with one number. So the softmax, the
loss and both products of the gradient are computed forward, while the logits of a chunk are in
memory, and nothing is computed twice. The price: the gradient of the kernels lives from the forward
to the backward pass. And the weight of each row (sample weights, masks, reduction) must be known
forward, so `models/classifier.py` restates Keras's reductions as weights of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from .._dims import check_dims, check_width
from . import _torch
from .targets import Kernels, Sums, Targets, Teacher
from .weights import weights_by_dim

# Logits of one dim that a chunk holds: 16 MiB. Fewer take less memory and more time.
CHUNK_LOGITS = 2**22
_UNKNOWN_ROWS = 128  # of a chunk where the number of rows is not known


class NestedCrossentropy(NamedTuple):
    """The result of one pass over a batch.

    Attributes:
        loss: The weighted sum, a scalar with a gradient.
        losses: The cross-entropy of every row at every dim, `(rows, num_dims)`, without gradient.
        ranks: How many classes have a larger logit than the right one, in the same shape: 0 where
            the right class is the best, below k where it is among the k best.

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
    teacher: Teacher | None = None,
) -> NestedCrossentropy:
    """Return the cross-entropy at every dim, its weighted sum, and the ranks of the right classes.

    Loss and gradient are computed together, a chunk of rows at a time, so no more than the logits
    of a chunk are in memory. One kernel for all dims (MRL-E) is multiplied block by block: each
    block once forward, and once each way backward, for all the dims that contain it. Sums are
    float32 whatever the dtype of the features and kernels. `MatryoshkaClassifier.fit` calls this
    function by itself.

    Args:
        features: Any float dtype.
        kernels: One per dim, or the one that all dims read by prefixes.
        biases: As many as kernels; None for none.
        labels: Integer class ids, or one row of probabilities per row of features.
        dims: Strictly increasing prefix lengths.
        weights: The c_m: numbers, a float tensor, a function of their number, or None for ones.
        row_weights: Weight of each row in the sum; None means the mean over rows.
        label_smoothing: Share of each label that is spread over all classes.
        chunk_rows: Rows at a time; None chooses them by the sizes of caches and kernels.
        training: Whether `loss` has a gradient; without one it costs less.
        teacher: A head on other features of the same rows. Its weight times the Kullback-Leibler
            divergence of every dim from its probabilities is added to the loss, but not to the
            losses of the rows. None adds nothing.

    Shapes:
        features: `(rows, width)`. kernels: `(dim, num_classes)` each, or one
        `(dims[-1], num_classes)`. biases: `(num_classes,)` each. labels: `(rows,)` or
        `(rows, num_classes)`. row_weights: `(rows,)`. losses and ranks: `(rows, num_dims)`.

    Formula:
        loss = sum_m c_m sum_i r_i (CE(z_i^(m); y_i) + t KL(p_i || softmax z_i^(m)))
        with z_i^(m) = W^(m) . x_{i,1:m} + b^(m), and p_i, t the teacher's probabilities and weight

    Returns:
        Loss, losses and ranks. A label that names no class makes its losses, and the loss, NaN.

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
        weights = weights_by_dim(weights, len(dims))
    c = ops.convert_to_tensor(weights, "float32")
    if teacher is not None:
        # Here, because JAX lets no tensor with a gradient into a function that has one of its own.
        features_of, kernel_of, bias_of = (
            own if own is None else ops.stop_gradient(_tensor(own)) for own in teacher[:3]
        )
        teacher = Teacher(features_of, kernel_of, bias_of, teacher.weight)
    targets = Targets.of(labels, int(kernels[0].shape[1]), label_smoothing, teacher)
    if row_weights is None:
        count = ops.cast(ops.maximum(ops.shape(features)[0], 1), "float32")
        row_weights = ops.ones_like(features[:, 0], dtype="float32") / count
    loss_weights = ops.expand_dims(ops.cast(row_weights, "float32"), 1) * c
    num_dims, num_kernels = len(dims), len(kernels)

    def loss_and_rows(*arguments: Any) -> tuple[Any, Any]:
        """Return loss, losses and ranks as one flat tensor, and its gradient.

        One tensor, because that is what a function with a custom gradient returns on every backend.
        """
        x, *parameters = (ops.cast(argument, "float32") for argument in arguments)
        nested = Kernels(parameters[:num_kernels], parameters[num_kernels:], dims)
        sums = _chunked(x[:, : dims[-1]], targets, loss_weights, nested, chunk_rows, training)
        # A row of weight zero adds nothing even if its loss is NaN: such are ignored labels. But
        # its features count if they are not finite: zero times NaN is NaN in the gradients.
        losses = sums.losses
        if teacher is not None:
            losses = losses + teacher.weight * sums.divergences
        losses = ops.where(loss_weights != 0, losses, 0.0)
        is_finite = ops.all(ops.isfinite(x[:, : dims[-1]]))
        loss = ops.where(is_finite, ops.sum(losses * loss_weights), float("nan"))
        loss = ops.reshape(loss, (1,))
        flat = [loss, *(ops.reshape(rows, (-1,)) for rows in (sums.losses, sums.ranks))]

        def gradient(*upstreams: Any, upstream: Any = None, **_: Any) -> Any:
            of_loss = (upstreams[0] if upstream is None else upstream)[0]
            unread = int(x.shape[1]) - dims[-1]
            d_features = sums.d_features
            if unread:
                d_features = ops.pad(d_features, ((0, 0), (0, unread)))
            gradients = (d_features, *sums.d_kernels, *sums.d_biases)
            return tuple(
                ops.cast(d_argument * of_loss, argument.dtype)
                for d_argument, argument in zip(gradients, arguments, strict=True)
            )

        return ops.concatenate(flat), gradient

    arguments = (features, *map(_tensor, (*kernels, *(biases or ()))))
    if training:
        flat = ops.custom_gradient(loss_and_rows)(*arguments)
    else:
        flat = loss_and_rows(*arguments)[0]
    rows = ops.reshape(ops.stop_gradient(flat[1:]), (2, -1, num_dims))
    return NestedCrossentropy(flat[0], rows[0], rows[1])


def _tensor(value: Any) -> Any:
    """Return a tensor: a function would capture a variable, not take it as an argument."""
    return value.value if isinstance(value, keras.Variable) else ops.convert_to_tensor(value)


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


def _chunked(
    x: Any,
    targets: Targets,
    loss_weights: Any,
    nested: Kernels,
    chunk_rows: int | None,
    training: bool,
) -> Sums:
    """Return the sums over all rows.

    Args:
        x: Features `(rows, dims[-1])`, float32.
        targets: The right classes.
        loss_weights: Weight of every loss in the sum, `(rows, num_dims)`.
        nested: The kernels.
        chunk_rows: Rows at a time; None chooses them.
        training: Whether gradients are computed.
    """
    size, rows = chunk_rows or _rows_of_a_chunk(nested), x.shape[0]
    number = None if rows is None else _number_of_chunks(rows, size)
    if _torch.in_place is not None:
        size = -(-rows // number)
        return _torch.in_place(x, targets, loss_weights, nested, size, training)
    if number == 1:
        sums = _chunk(x, targets, loss_weights, nested, training)
    else:
        sums = _loop(x, targets, loss_weights, nested, training, number, size)
    if nested.is_tied and training:  # its gradient comes in blocks
        sums = sums._replace(d_kernels=[ops.concatenate(sums.d_kernels)])
    return sums


def _rows_of_a_chunk(nested: Kernels) -> int:
    """Return as many rows as the budget of logits allows, but not too few.

    Of few rows, adding the gradient of each chunk would cost more than computing it.
    """
    width, num_classes = nested.kernels[-1].shape
    return int(max(CHUNK_LOGITS // num_classes, width // 4, 8))


def _number_of_chunks(rows: int, size: int) -> int:
    """Return the least number of chunks, or up to twice as many if so none has to be padded."""
    least = max(1, -(-rows // size))
    return next((number for number in range(least, 2 * least) if rows % number == 0), least)


def _loop(
    x: Any,
    targets: Targets,
    loss_weights: Any,
    nested: Kernels,
    training: bool,
    number: int | None,
    size: int,
) -> Sums:
    rows = ops.shape(x)[0]
    if number is None:  # known only when the step runs, and a small batch is padded to a chunk
        size = min(size, _UNKNOWN_ROWS)
        number = (rows + size - 1) // size
    else:
        size = -(-x.shape[0] // number)
    spare = size * number - rows

    def split(tensor: Any) -> Any:
        """Return `(size, number, ...)`: chunk i holds rows i, i + number, ...

        So a batch that is sharded over devices keeps a part of every chunk on each of them.
        """
        paddings = [(0, spare), *((0, 0) for _ in tensor.shape[1:])]
        padded = tensor if isinstance(spare, int) and spare == 0 else ops.pad(tensor, paddings)
        return ops.reshape(padded, (size, number, *tensor.shape[1:]))

    x_chunks, weight_chunks = split(x), split(loss_weights)
    target_chunks = targets.map(
        lambda tensor: split(ops.cast(tensor, "float32") if tensor.dtype == "bool" else tensor)
    )

    def body(index: Any, state: Any) -> Any:
        by_row, totals = state

        def chunk_of(tensor: Any) -> Any:
            start = (0, index, *(0 for _ in tensor.shape[2:]))
            shape = (size, 1, *tensor.shape[2:])
            return ops.squeeze(ops.slice(tensor, start, shape), axis=1)

        own_targets, own_weights = target_chunks.map(chunk_of), chunk_of(weight_chunks)
        sums = _chunk(chunk_of(x_chunks), own_targets, own_weights, nested, training)
        new_rows = [*sums[:3], *([sums.d_features] if training else [])]
        by_row = [
            ops.slice_update(values, (0, index, 0), ops.expand_dims(new, 1))
            for values, new in zip(by_row, new_rows, strict=True)
        ]
        added = [*sums.d_kernels, *sums.d_biases]
        return by_row, [total + new for total, new in zip(totals, added, strict=True)]

    nothing = ops.zeros_like(weight_chunks)
    state = (
        [nothing, nothing, nothing, *([ops.zeros_like(x_chunks)] if training else [])],
        [ops.zeros(shape) for shape in _gradient_shapes(nested)] if training else [],
    )
    by_row, totals = ops.fori_loop(0, number, body, state)
    flat = [ops.reshape(values, (size * number, values.shape[-1]))[:rows] for values in by_row]
    num_kernels = len(totals) - len(nested.biases)
    return Sums(flat[0], flat[1], flat[2], flat[-1], totals[:num_kernels], totals[num_kernels:])


def _gradient_shapes(nested: Kernels) -> list[tuple[int, ...]]:
    """Return the shapes of the gradients of `_chunk`: tied, one per block of the kernel."""
    num_classes = nested.kernels[0].shape[1]
    heights = [stop - start for start, stop in nested.blocks] if nested.is_tied else nested.dims
    return [
        *((height, num_classes) for height in heights),
        *((num_classes,) for _ in nested.biases),
    ]


def _chunk(x: Any, targets: Targets, loss_weights: Any, nested: Kernels, training: bool) -> Sums:
    weights_by_dim = [loss_weights[:, m : m + 1] for m in range(len(nested.dims))]
    targets = targets.taught()
    chunk = _tied_chunk if nested.is_tied else _untied_chunk
    return chunk(x, targets, weights_by_dim, nested, training)


def _tied_chunk(
    x: Any, targets: Targets, weights_by_dim: Sequence[Any], nested: Kernels, training: bool
) -> Sums:
    """Multiply every block of the one kernel once, forward and each way backward."""
    kernel, blocks = nested.kernels[0], nested.blocks
    logits: Any = nested.biases[0] if nested.biases else 0.0
    softmaxes = []
    for start, stop in blocks:
        logits = logits + ops.matmul(x[:, start:stop], kernel[start:stop])
        softmaxes.append(_softmax(logits, targets))
    by_row = _by_row([softmax[:3] for softmax in softmaxes])
    if not training:
        return Sums(*by_row, None, [], [])
    d_x, d_kernels = [], []
    d_logits: Any = 0.0
    for (start, stop), weight in zip(reversed(blocks), reversed(weights_by_dim), strict=True):
        # A block is in its own dim's prefix and in all wider ones.
        d_logits = d_logits + _gradient(softmaxes.pop(), targets, weight)
        d_x.append(ops.matmul(d_logits, ops.transpose(kernel[start:stop])))
        d_kernels.append(ops.matmul(ops.transpose(x[:, start:stop]), d_logits))
    d_biases = [ops.sum(d_logits, axis=0) for _ in nested.biases]
    return Sums(*by_row, ops.concatenate(d_x[::-1], axis=1), d_kernels[::-1], d_biases)


def _untied_chunk(
    x: Any, targets: Targets, weights_by_dim: Sequence[Any], nested: Kernels, training: bool
) -> Sums:
    """Take the kernels one after the other, so that the logits of one dim are in memory."""
    rows_by_dim, d_kernels, d_biases = [], [], []
    d_x: Any = ops.zeros_like(x)
    for m, (dim, weight) in enumerate(zip(nested.dims, weights_by_dim, strict=True)):
        prefix, kernel = x[:, :dim], nested.kernels[m]
        softmax = _softmax(
            ops.matmul(prefix, kernel) + (nested.biases[m] if nested.biases else 0.0), targets
        )
        rows_by_dim.append(softmax[:3])
        if training:
            d_logits = _gradient(softmax, targets, weight)
            d_prefix = ops.matmul(d_logits, ops.transpose(kernel))
            d_x = d_x + ops.pad(d_prefix, ((0, 0), (0, nested.dims[-1] - dim)))
            d_kernels.append(ops.matmul(ops.transpose(prefix), d_logits))
            d_biases.append(ops.sum(d_logits, axis=0))
    return Sums(*_by_row(rows_by_dim), d_x, d_kernels, d_biases[: len(nested.biases)])


def _by_row(by_dim: Sequence[tuple[Any, Any, Any]]) -> tuple[Any, Any, Any]:
    """Return losses, ranks and divergences `(rows, num_dims)` from those of every dim."""
    losses, ranks, divergences = (ops.concatenate(own, axis=1) for own in zip(*by_dim, strict=True))
    return losses, ranks, divergences


class _Softmax(NamedTuple):
    """Values of rows at one dim, all `(rows, 1)`, and exponentials `(rows, num_classes)`."""

    loss: Any
    rank: Any
    divergence: Any  # from the teacher
    exponentials: Any
    sums: Any


def _softmax(logits: Any, targets: Targets) -> _Softmax:
    right = ops.expand_dims(targets.classes, 1)
    right_logit = ops.take_along_axis(logits, right, axis=1)
    largest = ops.max(logits, axis=1, keepdims=True)
    exponentials = ops.exp(logits - largest)
    sums = ops.sum(exponentials, axis=1, keepdims=True)
    log_sum = largest + ops.log(sums)
    if targets.shares is not None:
        expected_logit = ops.sum(logits * targets.smooth_shares(), axis=1, keepdims=True)
        loss = log_sum * targets.total() - expected_logit
    else:
        loss = log_sum - right_logit
        if targets.smoothing:
            mean = ops.mean(logits, axis=1, keepdims=True)
            loss = log_sum - (1 - targets.smoothing) * right_logit - targets.smoothing * mean
    outside = ops.expand_dims(ops.cast(targets.outside, "bool"), 1)
    loss = ops.where(outside, float("nan"), loss)
    numbers = ops.expand_dims(ops.arange(targets.num_classes, dtype="int32"), 0)
    # Equal logits come in the order of their classes, as in argmax. The right class itself is left
    # out: a compiler may add up its logit here in another order than in `right_logit`.
    is_before = ops.where(numbers < right, logits >= right_logit, logits > right_logit)
    is_before &= numbers != right
    rank = ops.sum(ops.cast(is_before, "float32"), axis=1, keepdims=True)
    # No comparison with NaN is true, so its rank would be 0: count it as the last.
    rank = ops.where(ops.isnan(loss), float(targets.num_classes), rank)
    divergence = ops.zeros_like(loss)
    if targets.lesson is not None:
        taught_logit = ops.sum(logits * targets.lesson.probabilities, axis=1, keepdims=True)
        divergence = targets.lesson.negative_entropy + log_sum - taught_logit
    return _Softmax(loss, rank, divergence, exponentials, sums)


def _gradient(softmax: _Softmax, targets: Targets, weight: Any) -> Any:
    """Return the gradient with respect to the logits of one dim."""
    total, shares = targets.total(), targets.smooth_shares()
    if targets.lesson is not None:
        total = total + targets.lesson.weight
        shares = shares + targets.lesson.weight * targets.lesson.probabilities
    return softmax.exponentials * (weight * total / softmax.sums) - weight * shares
