"""How many tokens a language model wavers between."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from .._masks import with_mask_of


@keras.saving.register_keras_serializable(package="keras_mrl")
class Perplexity(keras.metrics.Mean):
    """The exponential of the mean cross-entropy of integer labels, from logits.

    The mean is over tokens: neither ignored labels nor masked positions count. In a
    `MatryoshkaMetric` there is one per dim.

    Args:
        ignore_class: Label that stands for no token, of padding; None ignores none.
        name: Name of the metric.
        dtype: Of the sum and of the result.

    Shapes:
        `y_true`: `(...)`. `y_pred`: `(..., num_classes)`. `sample_weight`: `(batch,)` or as
        `y_true`.

    Formula:
        exp(-1/N sum_i log softmax(y_pred_i)[y_true_i]) over the N labels that count

    Raises:
        ValueError: If `ignore_class` is no integer.

    Examples:
        >>> metric = Perplexity(ignore_class=-1)
        >>> metric.update_state(keras.ops.array([1, 2, -1]), keras.ops.zeros((3, 10)))
        >>> round(float(metric.result()), 3)  # nothing known: as many as there are
        10.0
    """

    def __init__(
        self, ignore_class: int | None = None, name: str = "perplexity", dtype: Any = None
    ) -> None:
        super().__init__(name=name, dtype=dtype)
        if ignore_class is not None and not isinstance(ignore_class, int):
            raise ValueError(
                "ignore_class must be the integer that labels no token, or None. "
                f"Received: ignore_class={ignore_class!r}. Give for example the id of the padding."
            )
        self.ignore_class = ignore_class
        self._direction = "down"

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Add the tokens of one batch."""
        labels = ops.convert_to_tensor(y_true)
        if len(labels.shape) == len(y_pred.shape):  # labels may come as a column
            labels = ops.squeeze(labels, axis=-1)
        weights = self.token_weights(labels, sample_weight)
        labels = ops.where(weights > 0, labels, 0)
        losses = ops.sparse_categorical_crossentropy(
            labels, ops.cast(y_pred, "float32"), from_logits=True
        )
        losses = ops.where(weights > 0, losses, 0.0)
        super().update_state(with_mask_of(y_pred, losses), weights)

    def token_weights(self, labels: Any, sample_weight: Any) -> Any:
        """Return what each label counts: nothing where it is ignored."""
        weights = ops.ones_like(labels, dtype="float32")
        if self.ignore_class is not None:
            weights = ops.cast(ops.not_equal(labels, self.ignore_class), "float32")
        if sample_weight is not None:
            given = ops.cast(sample_weight, "float32")
            missing = len(weights.shape) - len(given.shape)
            weights = weights * ops.reshape(given, (*ops.shape(given), *(1,) * missing))
        return weights

    def result(self) -> Any:
        """Return the perplexity of all tokens so far."""
        return ops.exp(super().result())

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this metric again."""
        return {**super().get_config(), "ignore_class": self.ignore_class}
