"""Any Keras metric, at every dim of a nested head, one entry per dim in the log of `fit`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from .._dims import check_dims
from .._masks import with_mask_of
from .rows import row_values, update


@keras.saving.register_keras_serializable(package="keras_mrl")
class MatryoshkaMetric(keras.metrics.Metric):
    """One Keras metric per dim; `fit` logs them as `<name>_<dim>`.

    Args:
        metric: A `keras.metrics.Metric` on `(..., num_classes)`. It is copied for every dim and
            itself left alone.
        dims: The dims of the head, for the names in the log.
        name: Stem of those names; None means the name of `metric`.

    Shapes:
        `y_pred`: `(..., num_dims, num_classes)`. `y_true`: what `metric` takes for one dim.

    Raises:
        TypeError: If `metric` is not a `keras.metrics.Metric`.
        ValueError: If `dims` are not increasing positive integers, or not as many as the logits'.

    Examples:
        >>> accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
        >>> metric = MatryoshkaMetric(accuracy, dims=(2, 4))
        >>> logits = keras.ops.array([[[0.0, 1.0], [1.0, 0.0]]])  # one row, two dims, two classes
        >>> metric.update_state(keras.ops.array([1]), logits)
        >>> {name: float(value) for name, value in metric.result().items()}
        {'accuracy_2': 1.0, 'accuracy_4': 0.0}
    """

    def __init__(
        self, metric: keras.metrics.Metric, dims: Sequence[int], name: str | None = None
    ) -> None:
        if not isinstance(metric, keras.metrics.Metric) or isinstance(metric, MatryoshkaMetric):
            raise TypeError(
                "metric must be a Keras metric for one dim. "
                f"Received: {metric!r}. Give an instance, for example "
                "keras.metrics.SparseCategoricalAccuracy(name='accuracy')."
            )
        super().__init__(name=name or metric.name, dtype=metric.dtype)
        self.metric = _copy(metric, metric.name)
        self.dims = check_dims(dims)
        self.metrics_by_dim = [_copy(metric, f"{self.name}_{dim}") for dim in self.dims]

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Add one batch to every dim's metric."""
        if len(y_pred.shape) < 3 or y_pred.shape[-2] != len(self.dims):
            raise ValueError(
                "MatryoshkaMetric needs logits of shape (..., num_dims, num_classes) with one "
                f"entry per dim. Received: y_pred of shape {tuple(y_pred.shape)} for "
                f"dims={self.dims}. Give the metric the dims of the head."
            )
        for index, metric in enumerate(self.metrics_by_dim):
            logits = with_mask_of(y_pred, y_pred[..., index, :])
            metric.update_state(y_true, logits, sample_weight=sample_weight)

    def update_rows(
        self, losses: Any, ranks: Any, labels: Any, sample_weight: Any = None, mask: Any = None
    ) -> None:
        """Add one batch from what a fused loss knows of it, without logits.

        Args:
            losses: Cross-entropies, `(batch, ..., num_dims)`.
            ranks: How many classes come before the right one, in the same shape.
            labels: Integer labels `(batch, ...)`.
            sample_weight: `(batch,)` or as the labels; None for ones.
            mask: Which labels count; None for all.
        """
        values_of = row_values(self.metric, 0.0)
        for index, metric in enumerate(self.metrics_by_dim):
            values = values_of(losses[..., index], ranks[..., index])  # type: ignore[misc]
            update(metric, values, labels, sample_weight, mask)

    def result(self) -> dict[str, Any]:
        """Return one value per dim, under the name it has in the log."""
        return {metric.name: metric.result() for metric in self.metrics_by_dim}

    def reset_state(self) -> None:
        """Start every dim's metric anew."""
        for metric in self.metrics_by_dim:
            metric.reset_state()

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this metric again."""
        return {
            "metric": keras.saving.serialize_keras_object(self.metric),
            "dims": self.dims,
            "name": self.name,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MatryoshkaMetric:
        """Make the metric again."""
        inner = keras.saving.deserialize_keras_object(config["metric"])
        return cls(**{**config, "metric": inner})


def _copy(metric: keras.metrics.Metric, name: str) -> keras.metrics.Metric:
    """A metric of the same kind with a state and a name of its own."""
    return type(metric).from_config({**metric.get_config(), "name": name})
