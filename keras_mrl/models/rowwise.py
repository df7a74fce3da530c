"""A training step of a nested head that goes from features to loss and metrics without logits.

The metrics are updated with the loss, from the values that they average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from .._masks import mask_of
from ..layers import MatryoshkaHead
from ..losses import MatryoshkaLoss
from ..losses.crossentropy import nested_crossentropy
from ..losses.targets import Teacher, check_form
from ..metrics import MatryoshkaMetric, as_weights_of, averaged_values
from ._compiled import check_dims

_SPARSE = keras.losses.SparseCategoricalCrossentropy
_DENSE = keras.losses.CategoricalCrossentropy


def rowwise_step(
    loss: Any, metrics: Any, weighted_metrics: Any, loss_weights: Any
) -> RowwiseStep | None:
    """Return the step for these arguments of `compile`; None if it needs logits."""
    if type(loss) is not MatryoshkaLoss or type(loss.loss) not in (_SPARSE, _DENSE):
        return None
    config = loss.loss.get_config()
    if not config["from_logits"] or config.get("axis", -1) != -1 or loss_weights is not None:
        return None
    if loss.reduction not in _REDUCTIONS or loss.dtype != "float32":
        return None
    groups = [tuple(keras.tree.flatten(group or [])) for group in (metrics, weighted_metrics)]
    smoothing = config.get("label_smoothing", 0.0)
    for metric in (metric for group in groups for metric in group):
        if type(metric) is not MatryoshkaMetric or not averaged_values(metric.metric, smoothing):
            return None
    return RowwiseStep(loss, *groups)


@dataclass(frozen=True)
class RowwiseStep:
    """Loss and metrics of a batch, from its features.

    Args:
        loss: A nested cross-entropy from logits.
        metrics: Metrics that a row's loss and rank decide.
        weighted_metrics: The same, with sample weights.
    """

    loss: MatryoshkaLoss
    metrics: tuple[MatryoshkaMetric, ...]
    weighted_metrics: tuple[MatryoshkaMetric, ...]

    def compute_loss(
        self,
        head: MatryoshkaHead,
        features: Any,
        labels: Any,
        sample_weight: Any,
        seed: Any,
        training: bool,
        weights: Any = None,
        teacher: Teacher | None = None,
    ) -> Any:
        """Return the loss of a batch, and update the metrics with it.

        Args:
            head: The head, for its kernels.
            features: `(batch, ..., width)`, with the mask of the backbone.
            labels: As the loss takes them for one dim.
            sample_weight: None, `(batch,)`, or one per label.
            seed: The seed of `dims_per_step`; None in evaluation.
            training: Whether the loss has a gradient.
            weights: The weight of every dim; None means those of the loss.
            teacher: As for `nested_crossentropy`.
        """
        dims, config = head.dims or (), self.loss.loss.get_config()
        for metric in (*self.metrics, *self.weighted_metrics):
            check_dims(metric, dims)
        kernels, biases = head.parameters()
        is_dense = isinstance(self.loss.loss, _DENSE)
        labels, targets = _labels_and_targets(labels, features, head.num_classes, is_dense)
        mask, like = mask_of(features), features[..., 0]
        counted = mask
        if config.get("ignore_class") is not None:
            not_ignored = ops.not_equal(labels, config["ignore_class"])
            counted = not_ignored if mask is None else ops.logical_and(mask, not_ignored)
        row_weights = _row_weights(self.loss.reduction, like, sample_weight, counted)
        result = nested_crossentropy(
            ops.reshape(features, (-1, features.shape[-1])),
            kernels,
            biases or None,
            targets,
            dims,
            weights=self.loss.weights_for(len(dims), seed) if weights is None else weights,
            row_weights=ops.reshape(row_weights, (-1,)),
            label_smoothing=config.get("label_smoothing", 0.0),
            training=training,
            teacher=teacher,
        )
        shape = (*ops.shape(like), len(dims))
        losses, ranks = ops.reshape(result.losses, shape), ops.reshape(result.ranks, shape)
        for metric in self.metrics:
            metric.update_rows(losses, ranks, labels, None, mask)
        for metric in self.weighted_metrics:
            metric.update_rows(losses, ranks, labels, sample_weight, mask)
        return result.loss


def _labels_and_targets(
    labels: Any, features: Any, num_classes: int, is_dense: bool
) -> tuple[Any, Any]:
    """Return integer labels in the shape of the features' rows, and the targets of the loss."""
    labels = ops.convert_to_tensor(labels)
    check_form(labels, tuple(features.shape[:-1]), num_classes, is_dense)
    if is_dense:
        shares = ops.reshape(ops.cast(labels, "float32"), (-1, num_classes))
        return ops.argmax(labels, axis=-1), shares
    if keras.backend.standardize_dtype(labels.dtype) == "bool":
        labels = ops.cast(labels, "int32")
    labels = ops.reshape(labels, ops.shape(features)[:-1])
    return labels, ops.reshape(labels, (-1,))


_REDUCTIONS = ("sum_over_batch_size", "mean", "sum", "mean_with_sample_weight")


def _row_weights(reduction: str, like: Any, sample_weight: Any, mask: Any) -> Any:
    """Return the weight of each value in the sum that Keras's reduction comes to.

    Args:
        reduction: One of `_REDUCTIONS`.
        like: A tensor of the shape of the values, `(batch, ...)`.
        sample_weight: `(batch,)`, or of that shape; None for ones.
        mask: Which values count, `(batch, ...)`; None for all.
    """
    weights = ops.ones_like(like, dtype="float32")
    count = ops.cast(math.prod(ops.shape(like)), "float32")
    if mask is not None:
        unmasked = ops.cast(ops.reshape(mask, ops.shape(like)), "float32")
        if reduction in ("sum_over_batch_size", "mean"):
            unmasked = unmasked * ops.divide_no_nan(count, ops.sum(unmasked))
        weights = weights * unmasked
    if sample_weight is not None:
        weights = weights * as_weights_of(like, sample_weight)
    if reduction == "sum":
        return weights
    divisor = ops.sum(weights) if reduction == "mean_with_sample_weight" else count
    return ops.divide_no_nan(weights, divisor) / num_replicas()


def num_replicas() -> int:
    """Return how many replicas share a batch: TensorFlow's strategies sum their losses."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return int(tf.distribute.get_strategy().num_replicas_in_sync)


def logits_of_no_row(features: Any, head: MatryoshkaHead) -> Any:
    """Return logits `(0, ..., num_dims, num_classes)`."""
    no_features = ops.expand_dims(ops.zeros_like(features[:0, ..., :1]), -1)
    return no_features * ops.zeros((len(head.dims or ()), head.num_classes), no_features.dtype)
