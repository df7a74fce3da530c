"""Any Keras metric, at every dim of a nested head, one entry per dim in the log of `fit`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from ._dims import check_dims
from ._masks import with_mask_of
from .losses._torch import num_replicas

# Keras's reductions of a loss, as what each row counts in the sum.

REDUCTIONS = ("sum_over_batch_size", "mean", "sum", "mean_with_sample_weight")


def row_weights(reduction: str, like: Any, sample_weight: Any = None, mask: Any = None) -> Any:
    """Return what each value counts in the reduced loss.

    Args:
        reduction: One of `REDUCTIONS`.
        like: A tensor of the shape of the values, `(batch, ...)`.
        sample_weight: `(batch,)`, or of that shape; None for ones.
        mask: Which values count, `(batch, ...)`; None for all.

    Returns:
        float32 weights of the shape of `like`: `keras.losses.Loss` reduces values to their
        weighted sum.
    """
    weights = ops.ones_like(like, dtype="float32")
    count = ops.cast(math.prod(ops.shape(like)), "float32")
    if mask is not None:
        kept = ops.cast(ops.reshape(mask, ops.shape(like)), "float32")
        if reduction in ("sum_over_batch_size", "mean"):
            kept = kept * ops.divide_no_nan(count, ops.sum(kept))
        weights = weights * kept
    if sample_weight is not None:
        weights = weights * aligned(sample_weight, like)
    if reduction == "sum":
        return weights
    divisor = ops.sum(weights) if reduction == "mean_with_sample_weight" else count
    return ops.divide_no_nan(weights, divisor) / num_replicas()


def aligned(sample_weight: Any, like: Any) -> Any:
    """Return float32 sample weights with the rank of `like`."""
    given = ops.cast(sample_weight, "float32")
    if len(given.shape) > len(like.shape):  # a column
        return ops.reshape(given, ops.shape(like))
    missing = len(like.shape) - len(given.shape)
    return ops.reshape(given, (*ops.shape(given), *(1,) * missing))


# How many tokens a language model wavers between.


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


# Metrics that need no logits: those that a loss and a rank per row decide.

Values = Callable[[Any, Any], Any]


def row_values(metric: keras.metrics.Metric, smoothing: float) -> Values | None:
    """Return what `metric` averages, from losses and ranks; None if it needs the logits.

    Args:
        metric: For one dim.
        smoothing: Label smoothing of the losses; with it they are not the metric's.
    """
    config = metric.get_config()
    kind = type(metric)
    if kind in (keras.metrics.SparseCategoricalAccuracy, keras.metrics.CategoricalAccuracy):
        return _best
    if kind in (keras.metrics.SparseTopKCategoricalAccuracy, keras.metrics.TopKCategoricalAccuracy):
        return lambda _, ranks: ranks < config["k"]
    if kind in (keras.metrics.SparseCategoricalCrossentropy, keras.metrics.CategoricalCrossentropy):
        same = config["from_logits"] and not config.get("label_smoothing")
        return _loss if same and config.get("ignore_class") is None and not smoothing else None
    return _loss if kind is Perplexity and not smoothing else None


def _best(_: Any, ranks: Any) -> Any:
    return ranks < 1


def _loss(losses: Any, _: Any) -> Any:
    return losses


def update(
    metric: keras.metrics.Metric, values: Any, labels: Any, sample_weight: Any, mask: Any
) -> None:
    """Add a batch of what `row_values` gives, in the shape of the labels, to `metric`.

    Args:
        metric: For one dim.
        values: `(batch, ...)`.
        labels: Integers of that shape; only those a metric ignores matter.
        sample_weight: `(batch,)` or of that shape; None for ones.
        mask: Which values count; None for all.
    """
    weights = None if sample_weight is None else aligned(sample_weight, values)
    if isinstance(metric, Perplexity):
        weights = metric.token_weights(labels, weights)
        values = ops.where(weights > 0, values, 0.0)
    if mask is not None:
        kept = ops.cast(mask, "float32")
        weights = kept if weights is None else kept * weights
    keras.metrics.Mean.update_state(metric, ops.cast(values, "float32"), weights)


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


# Metrics: any Keras metric at every dim.
