"""Any Keras loss on embeddings, at every prefix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from .._dims import check_dims, check_width
from . import weights as _weights
from .similarity import TINY


@keras.saving.register_keras_serializable(package="keras_mrl")
class MatryoshkaEmbeddingLoss(keras.losses.Loss):
    """The weighted sum of one Keras loss over prefixes of the embeddings, each of unit length.

    A prefix is cut first and scaled afterwards, in float32. An all-zero prefix stays zero and has
    a gradient of zero. For pairs and labels there are losses that multiply every coordinate once:
    `ContrastiveLoss` and `SupervisedContrastiveLoss`.

    Args:
        loss: A `keras.losses.Loss` on embeddings of any width. Its reduction is the reduction of
            the sum.
        dims: Strictly increasing prefix lengths, the widest at most the embeddings' width.
        weights: The c_m, one per dim, or a function from the number of dims to them; None means
            ones.
        nested_targets: Whether `y_true` holds embeddings that are cut and scaled alike, such as a
            teacher's; otherwise `loss` takes it as it is.
        dims_per_step: How many dims a training step of `MatryoshkaEncoder` counts, the widest
            included; None means all.
        name: Name of the loss.

    Shapes:
        `y_pred`: `(..., width)`. `y_true`: what `loss` takes; `(..., width)` if nested.

    Formula:
        L = sum_m c_m * loss(y_true, y_pred[..., :m] / |y_pred[..., :m]|)

    Raises:
        TypeError: If `loss` is not a `keras.losses.Loss` on embeddings.
        ValueError: If `dims`, `weights` or `dims_per_step` do not fit.

    Examples:
        >>> loss = MatryoshkaEmbeddingLoss(
        ...     keras.losses.CosineSimilarity(), dims=(1, 2), nested_targets=True
        ... )
        >>> teacher, student = keras.ops.array([[3.0, 4.0]]), keras.ops.array([[1.0, 0.0]])
        >>> round(float(loss(teacher, student)), 3)  # -1 at 1 dim, -0.6 at 2
        -1.6
    """

    def __init__(
        self,
        loss: keras.losses.Loss,
        dims: Sequence[int],
        weights: _weights.Weights = None,
        *,
        nested_targets: bool = False,
        dims_per_step: int | None = None,
        name: str = "matryoshka_embedding_loss",
    ) -> None:
        if (
            not isinstance(loss, keras.losses.Loss)
            or _weights.is_nested(loss)
            or isinstance(loss, _OF_CLASSES)
        ):
            raise TypeError(
                "loss must be a Keras loss on embeddings of one width. "
                f"Received: {_weights.named(loss)}. Give an instance, for example "
                "keras.losses.CosineSimilarity(); logits of classes need a MatryoshkaHead and "
                "MatryoshkaLoss."
            )
        super().__init__(name=name, reduction=loss.reduction, dtype=loss.dtype)
        self.loss = loss
        self.dims = check_dims(dims)
        self.weights = _weights.stored(weights)
        self.nested_targets = nested_targets
        self.dims_per_step = _weights.check_dims_per_step(dims_per_step)
        self.trained_dims, self._weights = _weights.trained(self.weights, self.dims)

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return the weighted sum over dims, one value per sample."""
        if self.dims_per_step is not None:
            raise _weights.no_seed(self)
        return self.measure(y_true, y_pred)[0]

    def measure(
        self, y_true: Any, y_pred: Any, seed: Any = None, temperature: Any = None
    ) -> tuple[Any, None]:
        """Return the loss of every sample, and None: of hits such a loss knows nothing.

        Args:
            y_true: As for the loss.
            y_pred: As for the loss.
            seed: In a training step, the `keras.random.SeedGenerator` of the model.
            temperature: Not used.
        """
        del temperature
        check_width(self.dims, y_pred.shape[-1])
        if self.nested_targets:
            check_width(self.dims, y_true.shape[-1])
        weights = _weights.of_step(self._weights, self.dims_per_step, seed)
        total: Any = 0.0
        for index, dim in enumerate(self.trained_dims):
            target = unit_prefix(y_true, dim) if self.nested_targets else y_true
            total = total + weights[index] * self.loss.call(target, unit_prefix(y_pred, dim))
        return total, None

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this loss again."""
        return {
            "loss": keras.saving.serialize_keras_object(self.loss),
            "dims": self.dims,
            "weights": keras.saving.serialize_keras_object(self.weights),
            "nested_targets": self.nested_targets,
            "dims_per_step": self.dims_per_step,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MatryoshkaEmbeddingLoss:
        """Make the loss again."""
        inner = keras.saving.deserialize_keras_object(config["loss"])
        weights = keras.saving.deserialize_keras_object(config["weights"])
        return cls(**{**config, "loss": inner, "weights": weights})


_OF_CLASSES = (
    keras.losses.SparseCategoricalCrossentropy,
    keras.losses.CategoricalCrossentropy,
    keras.losses.CategoricalFocalCrossentropy,
)


def unit_prefix(embeddings: Any, dim: int) -> Any:
    """Return the first `dim` coordinates scaled to unit length, in float32; zero stays zero."""
    prefix = ops.cast(embeddings[..., :dim], "float32")
    square = ops.sum(ops.square(prefix), axis=-1, keepdims=True)
    root = ops.rsqrt(ops.maximum(square, TINY))
    return prefix * ops.where(square > TINY, root, ops.zeros_like(root))
