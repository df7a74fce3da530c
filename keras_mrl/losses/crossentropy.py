"""Nested cross-entropy from features and kernels, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
from keras import ops

from .._dims import check_dims, check_width
from . import weights as _weights
from .chunks import chunked
from .targets import Targets


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
