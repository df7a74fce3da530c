"""A training step of a classifier that goes from features to loss and metrics, without logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

from .._masks import mask_of
from ..layers import MatryoshkaHead
from ..losses import MatryoshkaLoss
from ..losses.crossentropy import nested_crossentropy
from ..losses.reduction import REDUCTIONS, row_weights
from ..metrics import MatryoshkaMetric
from ..metrics.rows import row_values

_SPARSE = keras.losses.SparseCategoricalCrossentropy
_DENSE = keras.losses.CategoricalCrossentropy


@dataclass(frozen=True)
class RowwiseStep:
    """What a compiled classifier computes of every row.

    Args:
        loss: A nested cross-entropy from logits.
        metrics: Those that losses and ranks decide.
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
    ) -> Any:
        """Return the loss of a batch, and update the metrics with it.

        Args:
            head: Whose kernels are read.
            features: `(batch, ..., width)`, with the mask of the backbone.
            labels: What the loss takes for one dim.
            sample_weight: None, `(batch,)`, or one per label.
            seed: What `dims_per_step` draws from.
            training: Whether a gradient will be asked for.
        """
        dims, config = head.dims or (), self.loss.loss.get_config()
        for metric in (*self.metrics, *self.weighted_metrics):
            _check_dims(metric, dims)
        kernels, biases = head.parameters()
        mask, like = mask_of(features), features[..., 0]
        labels, targets = _labels(
            labels, features, head.num_classes, isinstance(self.loss.loss, _DENSE)
        )
        kept = mask
        if config.get("ignore_class") is not None:
            counted = ops.not_equal(labels, config["ignore_class"])
            kept = counted if mask is None else ops.logical_and(mask, counted)
        said = nested_crossentropy(
            ops.reshape(features, (-1, features.shape[-1])),
            kernels,
            biases or None,
            targets,
            dims,
            weights=self.loss.weights_for(len(dims), seed if training else None),
            row_weights=ops.reshape(
                row_weights(self.loss.reduction, like, sample_weight, kept), (-1,)
            ),
            label_smoothing=config.get("label_smoothing", 0.0),
            training=training,
        )
        shape = (*ops.shape(like), len(dims))
        losses, ranks = ops.reshape(said.losses, shape), ops.reshape(said.ranks, shape)
        for metric in self.metrics:
            metric.update_rows(losses, ranks, labels, None, mask)
        for metric in self.weighted_metrics:
            metric.update_rows(losses, ranks, labels, sample_weight, mask)
        return said.loss


def rowwise_step(
    loss: Any, metrics: Any, weighted_metrics: Any, loss_weights: Any
) -> RowwiseStep | None:
    """Return the step that needs no logits for what a classifier is compiled with; None if none."""
    if type(loss) is not MatryoshkaLoss or type(loss.loss) not in (_SPARSE, _DENSE):
        return None
    config = loss.loss.get_config()
    if not config["from_logits"] or config.get("axis", -1) != -1 or loss_weights is not None:
        return None
    if loss.reduction not in REDUCTIONS or loss.dtype != "float32":
        return None
    found = []
    for given in (metrics, weighted_metrics):
        flat = keras.tree.flatten(given or [])
        if not all(_needs_no_logits(metric, config.get("label_smoothing", 0.0)) for metric in flat):
            return None
        found.append(tuple(flat))
    return RowwiseStep(loss, *found)


def no_logits(features: Any, head: MatryoshkaHead) -> Any:
    """Return the logits of no row, `(0, ..., num_dims, num_classes)`."""
    none = ops.expand_dims(ops.zeros_like(features[:0, ..., :1]), -1)
    return none * ops.zeros((len(head.dims or ()), head.num_classes), dtype=none.dtype)


def _needs_no_logits(metric: Any, smoothing: float) -> bool:
    return type(metric) is MatryoshkaMetric and row_values(metric.metric, smoothing) is not None


def _check_dims(metric: MatryoshkaMetric, dims: tuple[int, ...]) -> None:
    if metric.dims != dims:
        raise ValueError(
            "A MatryoshkaMetric must name the dims of the head. "
            f"Received: {metric.name!r} with dims={metric.dims} for a head of {dims}. "
            f"Write MatryoshkaMetric(..., dims={dims})."
        )


def _labels(labels: Any, features: Any, num_classes: int, dense: bool) -> tuple[Any, Any]:
    """Return integer labels in the shape of the features' rows, and what the rows are to say."""
    labels = ops.convert_to_tensor(labels)
    per_class = len(labels.shape) == len(features.shape)
    if dense and (not per_class or labels.shape[-1] != num_classes):
        raise ValueError(
            "CategoricalCrossentropy takes a share of every class per row. "
            f"Received: labels of shape {tuple(labels.shape)} for {num_classes} classes. "
            "Use SparseCategoricalCrossentropy for integer labels."
        )
    if not dense and per_class and labels.shape[-1] != 1:
        raise ValueError(
            "SparseCategoricalCrossentropy takes one integer per row. "
            f"Received: labels of shape {tuple(labels.shape)} for {num_classes} classes. "
            "Use CategoricalCrossentropy for one-hot labels, or take their argmax."
        )
    if dense:
        shares = ops.reshape(ops.cast(labels, "float32"), (-1, num_classes))
        return ops.argmax(labels, axis=-1), shares
    if keras.backend.standardize_dtype(labels.dtype) == "bool":
        labels = ops.cast(labels, "int32")
    labels = ops.reshape(labels, ops.shape(features)[:-1])
    return labels, ops.reshape(labels, (-1,))
