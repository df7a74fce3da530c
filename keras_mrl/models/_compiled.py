"""Plain losses and metrics of Keras, as `compile` of a `MatryoshkaClassifier` takes them.

A loss or a metric of Keras judges the logits of one dim, so it is counted at every dim. Functions
and subclasses of `Loss` and `Metric` of the user's own are given the logits of all dims.
"""

from __future__ import annotations

import inspect
from typing import Any

import keras

from .._modes import mode_of_metric
from ..losses import MatryoshkaLoss
from ..losses.targets import MULTILABEL_LOSSES, SINGLE_LABEL_LOSSES
from ..losses.weights import _NestedLoss
from ..metrics import MatryoshkaMetric, Perplexity

_LOSSES = {*filter(callable, vars(keras.losses).values())} - {keras.losses.Loss}
_BASES = {getattr(keras.metrics, name) for name in ("Metric", "Mean", "Sum", "MeanMetricWrapper")}
_METRICS = {*filter(callable, vars(keras.metrics).values()), Perplexity} - _BASES


def nested_loss(loss: Any) -> Any:
    """Return the loss of all dims: a loss of Keras, or the name of one, in a `MatryoshkaLoss`.

    Raises:
        ValueError: If it reads probabilities, or is a name by which Keras looks at the labels.
    """
    if loss in ("crossentropy", "ce"):
        raise ValueError(
            "The name of a loss must say which labels it takes. "
            f"Received: loss={loss!r}. Write 'sparse_categorical_crossentropy' for integer labels, "
            "'categorical_crossentropy' for one-hot rows."
        )
    if isinstance(loss, str) or (
        (inspect.isroutine(loss) or inspect.isclass(loss)) and loss in _LOSSES
    ):
        loss = keras.losses.get(loss)
        loss = _on_logits(class_of(loss)() if inspect.isfunction(loss) else loss)
    inner = loss.loss if isinstance(loss, MatryoshkaLoss) else loss
    is_nested = isinstance(loss, _NestedLoss)
    is_of_one_dim = bool(_LOSSES.intersection(type(inner).__mro__))
    if is_of_one_dim and _reads_probabilities(inner):
        received = type(inner).__name__
        received = f"MatryoshkaLoss around {received}" if is_nested else received
        raise ValueError(
            "MatryoshkaClassifier gives the logits of every dim, and no probabilities. "
            f"Received: {received} with from_logits=False. Write from_logits=True, "
            "or the name alone: loss='sparse_categorical_crossentropy'."
        )
    return MatryoshkaLoss(loss) if is_of_one_dim and not is_nested else loss


def class_of(function: Any) -> Any:
    """Return the class of a loss that Keras has as a function, too."""
    name = function.__name__.replace("_", "")
    return next(k for k in _LOSSES if inspect.isclass(k) and k.__name__.lower() == name)


def nested_metrics(metrics: Any, loss: Any) -> Any:
    """Return `metrics` with every metric of Keras, or the name of one, in a `MatryoshkaMetric`.

    The dims are those of the head, once it has any: `MatryoshkaMetric.set_dims`.

    Args:
        metrics: An argument of `compile`.
        loss: The nested loss, which says what an accuracy compares.

    Raises:
        ValueError: If a metric reads probabilities, or an accuracy is of no kind of labels.
    """
    if metrics is None:
        return None
    listed = metrics if isinstance(metrics, (list, tuple, dict)) else [metrics]
    return keras.tree.map_structure(lambda metric: _nested_metric(metric, loss), listed)


class NestedMetrics:
    """The nested metrics of a model. Keras does not track this object, and so counts none twice.

    Args:
        *groups: Arguments of `compile`.
    """

    def __init__(self, *groups: Any) -> None:
        flat = keras.tree.flatten(groups)
        self._metrics = [metric for metric in flat if isinstance(metric, MatryoshkaMetric)]

    def set_dims(self, dims: tuple[int, ...] | None) -> None:
        """Tell the dims of the head to the metrics that do not know them; compare the others'."""
        if dims is None:
            return
        for metric in self._metrics:
            if metric.dims is None:
                metric.set_dims(dims)
            check_dims(metric, dims)

    def modes(self) -> dict[str, str | None]:
        """Return the mode of the entries of every metric, by its name."""
        return {metric.name: mode_of_metric(metric.metric) for metric in self._metrics}


def check_dims(metric: MatryoshkaMetric, dims: tuple[int, ...]) -> None:
    """Raise a `ValueError` if a metric is counted at other dims than those of the head."""
    if metric.dims != dims:
        raise ValueError(
            "A MatryoshkaMetric must name the dims of the head. "
            f"Received: {metric.name!r} with dims={metric.dims} for a head of {dims}. "
            "Leave dims out in a MatryoshkaClassifier."
        )


def _nested_metric(metric: Any, loss: Any) -> Any:
    if isinstance(metric, str):
        metric = _metric_of_name(metric, loss)
    if not _METRICS.intersection(type(metric).__mro__):
        return metric
    inner = loss.loss if isinstance(loss, MatryoshkaLoss) else None
    activation = None
    if _compares_probabilities(metric):
        kinds = (("sigmoid", MULTILABEL_LOSSES), ("softmax", SINGLE_LABEL_LOSSES))
        activation = next((name for name, kind in kinds if isinstance(inner, kind)), None)
    if activation is None and _reads_probabilities(metric):
        kind = type(metric).__name__
        raise ValueError(
            "Metrics of a MatryoshkaClassifier read logits, and no probabilities. "
            f"Received: {kind} with from_logits=False. "
            f"Give keras.metrics.{kind} from_logits=True, or write its name alone."
        )
    return MatryoshkaMetric(metric, activation=activation)


def _compares_probabilities(metric: keras.metrics.Metric) -> bool:
    """Whether a metric compares what it reads with thresholds between 0 and 1."""
    if isinstance(metric, keras.metrics.AUC):
        return _reads_probabilities(metric)
    if isinstance(metric, keras.metrics.BinaryAccuracy):
        return 0 < metric.get_config()["threshold"] < 1  # 0 is the threshold of a logit
    return isinstance(metric, _PROBABILITY_METRICS)


_PROBABILITY_METRICS = (
    keras.metrics.BinaryIoU,
    keras.metrics.FBetaScore,
    keras.metrics.Precision,
    keras.metrics.Recall,
    keras.metrics.TruePositives,
    keras.metrics.TrueNegatives,
    keras.metrics.FalsePositives,
    keras.metrics.FalseNegatives,
    keras.metrics.PrecisionAtRecall,
    keras.metrics.RecallAtPrecision,
    keras.metrics.SensitivityAtSpecificity,
    keras.metrics.SpecificityAtSensitivity,
)


def _metric_of_name(name: str, loss: Any) -> Any:
    """Return the metric that Keras has under this name, on logits."""
    if name not in ("accuracy", "acc"):
        metric = _on_logits(keras.metrics.get(name))
        metric.name = name
        return metric
    inner = loss.loss if isinstance(loss, MatryoshkaLoss) else loss
    for kinds, accuracy, arguments in _ACCURACIES:
        if isinstance(inner, kinds):
            return accuracy(name=name, **arguments)
    raise ValueError(
        "An accuracy compares classes, and the loss says in which form labels give them. "
        f"Received: metrics={name!r} with loss={type(inner).__name__}. "
        "Give the metric itself: keras.metrics.SparseCategoricalAccuracy(name='accuracy')."
    )


_ACCURACIES: tuple[tuple[Any, Any, dict[str, Any]], ...] = (
    (keras.losses.SparseCategoricalCrossentropy, keras.metrics.SparseCategoricalAccuracy, {}),
    (
        (
            keras.losses.CategoricalCrossentropy,
            keras.losses.CategoricalFocalCrossentropy,
            keras.losses.CategoricalHinge,
        ),
        keras.metrics.CategoricalAccuracy,
        {},
    ),
    (
        MULTILABEL_LOSSES,
        keras.metrics.BinaryAccuracy,
        {"threshold": 0.0},  # of a logit
    ),
)


def _on_logits(part: Any) -> Any:
    """Return a loss or metric that was named, for logits where it can read probabilities, too."""
    config = part.get_config()
    return (
        type(part).from_config({**config, "from_logits": True}) if "from_logits" in config else part
    )


def _reads_probabilities(part: Any) -> bool:
    return part.get_config().get("from_logits") is False
