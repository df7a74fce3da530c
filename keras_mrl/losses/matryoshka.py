"""Any Keras loss, at every dim of a nested head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from .._dims import check_weights
from .._masks import with_mask_of
from .labels import is_outside


@keras.saving.register_keras_serializable(package="keras_mrl")
class MatryoshkaLoss(keras.losses.Loss):
    """The weighted sum of one Keras loss over every dim of the logits.

    Reduction, sample weights and masks are Keras's own: the sum over dims is taken per sample.

    Integer labels that name no class give a loss of NaN (or the backend's own error): nothing can
    raise inside a compiled step on every backend, and a loss of zero would train silently.

    Args:
        loss: A `keras.losses.Loss` on `(..., num_classes)`, `from_logits=True` after a
            `MatryoshkaHead`. Its reduction is the reduction of the sum.
        weights: The c_m, one per dim; None means ones, as in the paper.
        name: Name of the loss.

    Shapes:
        `y_pred`: `(..., num_dims, num_classes)`. `y_true`: what `loss` takes for one dim.

    Formula:
        L = sum_m c_m * loss(y_true, y_pred[..., m, :])

    Raises:
        TypeError: If `loss` is not a `keras.losses.Loss`.
        ValueError: If `weights` do not fit the logits, or the logits have no axis of dims.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, arXiv 2205.13147, equation 1.

    Examples:
        >>> loss = MatryoshkaLoss(keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        >>> logits = keras.ops.zeros((3, 2, 10))
        >>> round(float(loss(keras.ops.array([1, 2, 3]), logits)), 3)  # 2 dims x log 10
        4.605
    """

    def __init__(
        self,
        loss: keras.losses.Loss,
        weights: Sequence[float] | None = None,
        name: str = "matryoshka_loss",
    ) -> None:
        if not isinstance(loss, keras.losses.Loss) or isinstance(loss, MatryoshkaLoss):
            raise TypeError(
                "loss must be a Keras loss for one dim. "
                f"Received: {loss!r}. Give an instance, for example "
                "keras.losses.SparseCategoricalCrossentropy(from_logits=True)."
            )
        super().__init__(name=name, reduction=loss.reduction, dtype=loss.dtype)
        self.loss = loss
        self.weights = None if weights is None else check_weights(weights, len(weights))

    def call(self, y_true: Any, y_pred: Any) -> Any:
        """Return the weighted sum over dims, one value per sample."""
        if len(y_pred.shape) < 3:
            raise ValueError(
                "MatryoshkaLoss needs logits of shape (..., num_dims, num_classes). "
                f"Received: y_pred of shape {tuple(y_pred.shape)}. "
                "End the model with a MatryoshkaHead, or use the inner loss alone."
            )
        total: Any = 0.0
        losses: Any = None
        for index, weight in enumerate(check_weights(self.weights, y_pred.shape[-2])):
            if weight:
                losses = self.loss.call(y_true, y_pred[..., index, :])
                total = total + weight * losses
        outside = is_outside(self.loss, y_true, y_pred.shape[-1])
        if outside is not None:
            if len(outside.shape) > len(total.shape):  # labels may come as a column
                outside = ops.squeeze(outside, axis=-1)
            total = ops.where(outside, float("nan"), total)
        return with_mask_of(losses, total)  # of ignore_class: the mean is over the other rows

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this loss again."""
        return {
            "loss": keras.saving.serialize_keras_object(self.loss),
            "weights": self.weights,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MatryoshkaLoss:
        """Make the loss again."""
        inner = keras.saving.deserialize_keras_object(config["loss"])
        return cls(**{**config, "loss": inner})
