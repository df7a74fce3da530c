"""Metrics: any Keras metric at every dim of a nested head, and perplexity.

A `MatryoshkaClassifier` can train without the logits of a batch. Its metrics are then updated from
the loss of every row and the rank of the row's class (`MatryoshkaMetric.update_rows`). That is
enough for accuracy, top-k accuracy, cross-entropy and perplexity; `averaged_values` says for which
metrics it is not.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from ._dims import check_dims
from ._masks import with_mask_of
from .losses.targets import check_form
from .losses.weights import with_positions


@keras.saving.register_keras_serializable(package="keras_mrl")
class MatryoshkaMetric(keras.metrics.Metric):
    """One Keras metric per dim; `fit` logs them as `<name>_<dim>`.

    The name is the one that Keras has for the metric: `digit_accuracy_8` for the output `digit` of
    several, `weighted_accuracy_8` where `metrics` and `weighted_metrics` have one of that name.

    Args:
        metric: A `keras.metrics.Metric` on `(..., num_classes)`. Every dim has a copy of it; the
            metric itself is not updated.
        dims: The dims of the head, for the names in the log; None where a `MatryoshkaClassifier`
            is compiled with the metric, which tells it those of its head.
        name: Stem of those names; None means the name of `metric`.
        activation: "sigmoid" or "softmax" for a metric of probabilities, such as `F1Score`, which
            then reads those and not the logits; None for one of logits.

    Shapes:
        `y_pred`: `(..., num_dims, num_classes)`. `y_true`: what `metric` takes for one dim.

    Raises:
        TypeError: If `metric` is not a `keras.metrics.Metric`.
        ValueError: If `dims` are not increasing positive integers, or not as many as the logits',
            or are not told.

    Examples:
        >>> accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
        >>> metric = MatryoshkaMetric(accuracy, dims=(2, 4))
        >>> logits = keras.ops.array([[[0.0, 1.0], [1.0, 0.0]]])  # one row, two dims, two classes
        >>> metric.update_state(keras.ops.array([1]), logits)
        >>> {name: float(value) for name, value in metric.result().items()}
        {'accuracy_2': 1.0, 'accuracy_4': 0.0}
    """

    def __init__(
        self,
        metric: keras.metrics.Metric,
        dims: Sequence[int] | None = None,
        name: str | None = None,
        activation: str | None = None,
    ) -> None:
        if not isinstance(metric, keras.metrics.Metric) or isinstance(metric, MatryoshkaMetric):
            raise TypeError(
                "metric must be a Keras metric for one dim. "
                f"Received: {metric!r}. Give an instance, for example "
                "keras.metrics.SparseCategoricalAccuracy(name='accuracy')."
            )
        super().__init__(name=name or metric.name, dtype=metric.dtype)
        self.metric = _copy(metric, metric.name)
        self.activation = activation
        self._to_read = keras.activations.get(activation)
        self.dims: tuple[int, ...] | None = None
        self.metrics_by_dim: list[keras.metrics.Metric] = []
        if dims is not None:
            self.set_dims(dims)

    def set_dims(self, dims: Sequence[int]) -> None:
        """Tell the dims of the head to a metric that was made without them.

        Args:
            dims: As for the constructor.
        """
        self.dims = check_dims(dims)
        self.metrics_by_dim = [_copy(self.metric, f"{self.name}_{dim}") for dim in self.dims]

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        """Add one batch to the metric of every dim."""
        if self.dims is None:
            raise ValueError(
                "Outside a MatryoshkaClassifier a MatryoshkaMetric must be told the dims. "
                f"Received: MatryoshkaMetric {self.name!r} with dims=None. "
                "Write MatryoshkaMetric(metric, dims=(8, 16, 32)), the dims of the head."
            )
        if len(y_pred.shape) < 3 or y_pred.shape[-2] != len(self.dims):
            raise ValueError(
                "MatryoshkaMetric needs logits of shape (..., num_dims, num_classes) with one "
                f"entry per dim. Received: y_pred of shape {tuple(y_pred.shape)} for "
                f"dims={self.dims}. Give the metric the dims of the head."
            )
        sample_weight = with_positions(sample_weight, y_pred)
        if type(self.metric) in _RANK_METRICS:
            _check_labels(self.metric, y_true, y_pred)
        for index, metric in enumerate(self.metrics_by_dim):
            logits = y_pred[..., index, :]
            if type(metric) in _RANK_METRICS:
                logits = _wrong_where_nan(logits, y_true)
            logits = with_mask_of(y_pred, self._to_read(logits))
            metric.update_state(y_true, logits, sample_weight=sample_weight)

    def update_rows(
        self, losses: Any, ranks: Any, labels: Any, sample_weight: Any = None, mask: Any = None
    ) -> None:
        """Add one batch by its losses and ranks, without logits.

        Args:
            losses: Cross-entropies, `(batch, ..., num_dims)`.
            ranks: How many classes come before the right one, in the same shape.
            labels: Integer labels `(batch, ...)`.
            sample_weight: `(batch,)` or as the labels; None for ones.
            mask: Which labels count; None for all.
        """
        values_of = averaged_values(self.metric)
        if values_of is None:
            raise ValueError(
                "update_rows takes metrics that a loss and a rank decide. "
                f"Received: {type(self.metric).__name__}. Use update_state, with logits."
            )
        for index, metric in enumerate(self.metrics_by_dim):
            values = ops.cast(values_of(losses[..., index], ranks[..., index]), "float32")
            weights = None if sample_weight is None else as_weights_of(values, sample_weight)
            if isinstance(metric, Perplexity):
                weights = metric.token_weights(labels, weights)
                values = ops.where(weights > 0, values, 0.0)
            if mask is not None:
                unmasked = ops.cast(mask, "float32")
                weights = unmasked if weights is None else unmasked * weights
            keras.metrics.Mean.update_state(metric, values, weights)

    def result(self) -> dict[str, Any]:
        """Return one value per dim, under the name it has in the log."""
        stem = _name_in_log(self.name)
        values = zip(self.dims or (), self.metrics_by_dim, strict=True)
        return {f"{stem}_{dim}": metric.result() for dim, metric in values}

    def reset_state(self) -> None:
        """Start the metric of every dim anew."""
        for metric in self.metrics_by_dim:
            metric.reset_state()

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this metric again."""
        return {
            "metric": keras.saving.serialize_keras_object(self.metric),
            "dims": self.dims,
            "name": self.name,
            "activation": self.activation,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MatryoshkaMetric:
        """Make the metric again."""
        metric = keras.saving.deserialize_keras_object(config["metric"])
        return cls(**{**config, "metric": metric})


def _name_in_log(name: str) -> str:
    """Return the name under which Keras logs the metric of this name whose result it asks for.

    That of one of several outputs has the output's name before it, and where one name stands in
    both `metrics` and `weighted_metrics` the second has "weighted_". Keras tells no metric, and
    drops its name for the entries of a result that is a dict: two outputs would write the same
    entries. So the name is read where Keras makes it. Asked by anyone else, it is the metric's own.
    """
    caller = sys._getframe(2)
    while not _is_in_keras(caller) and caller.f_code.co_name == "result" and caller.f_back:
        caller = caller.f_back  # of a subclass, which calls this one
    in_log = caller.f_locals.get("name") if _is_in_keras(caller) else None
    return in_log if isinstance(in_log, str) and name in in_log else name


def _is_in_keras(frame: types.FrameType) -> bool:
    return bool(frame.f_globals.get("__name__", "").endswith("trainers.compile_utils"))


def _copy(metric: keras.metrics.Metric, name: str) -> keras.metrics.Metric:
    """Return a metric of the same kind with a state and a name of its own."""
    return type(metric).from_config({**metric.get_config(), "name": name})


@keras.saving.register_keras_serializable(package="keras_mrl")
class Perplexity(keras.metrics.Mean):
    """The exponential of the mean cross-entropy of integer labels, from logits.

    The number of tokens a language model wavers between. The mean is over tokens: ignored labels
    and masked positions do not count. In a `MatryoshkaMetric` there is one per dim.

    Args:
        ignore_class: Label of padding, which does not count; None ignores no label.
        name: Name of the metric.
        dtype: Dtype of the sum and of the result.

    Shapes:
        `y_true`: `(...)`. `y_pred`: `(..., num_classes)`. `sample_weight`: `(batch,)` or as
        `y_true`.

    Formula:
        exp(-1/N sum_i log softmax(y_pred_i)[y_true_i]) over the N labels that count

    Raises:
        ValueError: If `ignore_class` is not an integer.

    Examples:
        >>> metric = Perplexity(ignore_class=-1)
        >>> metric.update_state(keras.ops.array([1, 2, -1]), keras.ops.zeros((3, 10)))
        >>> round(float(metric.result()), 3)  # equal logits: as many as there are classes
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
        """Return the weight of each label in the mean: zero where it is ignored."""
        weights = ops.ones_like(labels, dtype="float32")
        if self.ignore_class is not None:
            weights = ops.cast(ops.not_equal(labels, self.ignore_class), "float32")
        return weights if sample_weight is None else weights * as_weights_of(labels, sample_weight)

    def result(self) -> Any:
        """Return the perplexity of all tokens so far."""
        return ops.exp(super().result())

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this metric again."""
        return {**super().get_config(), "ignore_class": self.ignore_class}


_RANK_METRICS = (
    keras.metrics.SparseCategoricalAccuracy,
    keras.metrics.CategoricalAccuracy,
    keras.metrics.SparseTopKCategoricalAccuracy,
    keras.metrics.TopKCategoricalAccuracy,
)


def _check_labels(metric: keras.metrics.Metric, labels: Any, logits: Any) -> None:
    """Raise if labels are shares where integers are taken, or the reverse."""
    if getattr(labels.shape, "rank", 0) is None:  # of a tf.data.Dataset
        return
    name = type(metric).__name__
    of_shares = name.removeprefix("Sparse")
    check_form(labels, tuple(logits.shape[:-2]), logits.shape[-1], name == of_shares, of_shares)


def _wrong_where_nan(logits: Any, labels: Any) -> Any:
    """Return logits whose rows with NaN put the right class last: argmax would answer class 0."""
    logits, labels = ops.convert_to_tensor(logits), ops.convert_to_tensor(labels)
    has_classes = len(labels.shape) == len(logits.shape)
    if has_classes and labels.shape[-1] == 1:  # labels may come as a column
        labels, has_classes = ops.squeeze(labels, axis=-1), False
    if has_classes:
        right = ops.argmax(labels, axis=-1)
    else:
        right = ops.cast(labels, "int32")
    last = -ops.one_hot(right, logits.shape[-1], dtype=logits.dtype)
    return ops.where(ops.any(ops.isnan(logits), axis=-1, keepdims=True), last, logits)


def averaged_values(
    metric: keras.metrics.Metric, label_smoothing: float = 0.0
) -> Callable[[Any, Any], Any] | None:
    """Return the function from losses and ranks to the values that `metric` averages.

    Args:
        metric: A metric for one dim.
        label_smoothing: That of the losses; smoothed losses are not those of a metric.

    Returns:
        None if the metric needs logits.
    """
    config, kind = metric.get_config(), type(metric)
    if kind in (keras.metrics.SparseCategoricalAccuracy, keras.metrics.CategoricalAccuracy):
        return lambda _, ranks: ranks < 1
    if kind in (keras.metrics.SparseTopKCategoricalAccuracy, keras.metrics.TopKCategoricalAccuracy):
        return lambda _, ranks: ranks < config["k"]
    averages_losses = kind is Perplexity
    if kind in (keras.metrics.SparseCategoricalCrossentropy, keras.metrics.CategoricalCrossentropy):
        altered = config.get("label_smoothing") or config.get("ignore_class") is not None
        averages_losses = config["from_logits"] and not altered
    if averages_losses and not label_smoothing:
        return lambda losses, _: losses
    return None


def as_weights_of(values: Any, sample_weight: Any) -> Any:
    """Return float32 sample weights that multiply `values`: a column flat, or axes added."""
    weights = ops.cast(sample_weight, "float32")
    if len(weights.shape) > len(values.shape):
        return ops.reshape(weights, ops.shape(values))
    missing = len(values.shape) - len(weights.shape)
    return ops.reshape(weights, (*ops.shape(weights), *(1,) * missing))
