"""Metrics that need no logits: those that a loss and a rank per row decide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from ..losses.reduction import aligned
from .perplexity import Perplexity

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
