"""What a linear head is worth on the first coordinates of features."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_mrl_serving.cascade.confidence import max_probability
from keras_mrl_serving.inputs import as_float32, check_class_ids

from .._features import Array, check_features
from .._labels import check_labels_of
from .calibration import calibration_error

_ROWS = 4096  # whose logits are made at a time


def score_head(features: Any, labels: Any, kernel: Any, bias: Any) -> dict[str, float]:
    """Return `top1`, `top5` and `ece` of a linear head on the first coordinates of features.

    Of classes with equal logits the first is the likelier one, as for `argmax`.

    Args:
        features: `(rows, width)`.
        labels: Class ids, `(rows,)` or `(rows, 1)`.
        kernel: `(dim, num_classes)`.
        bias: `(num_classes,)`, or None.

    Raises:
        ValueError: If features and labels do not fit, a label names no class, or kernel, bias or
            logits are not finite.

    Examples:
        >>> features, kernel = [[9.0, 0.0, 5.0], [0.0, 9.0, 5.0]], np.eye(2)
        >>> score_head(features, [0, 0], kernel, None)["top1"]
        0.5
    """
    weights, offsets = _check_head(kernel, bias)
    dim, num_classes = weights.shape
    table = check_features(features, dim)
    truth = check_labels_of(table, labels)
    check_class_ids(truth, num_classes)
    classes = np.arange(num_classes)
    ranks, sure = [], []
    with np.errstate(over="ignore", invalid="ignore"):  # refused below, by its name
        for start in range(0, len(table), _ROWS):
            part = slice(start, start + _ROWS)
            logits = table[part, :dim] @ weights + offsets
            of = truth[part, None]
            own = np.take_along_axis(logits, of, axis=1)
            ahead = np.where(classes < of, logits >= own, logits > own)
            ranks.append(np.count_nonzero(ahead, axis=1))
            sure.append(max_probability(logits))
    rank, confidence = np.concatenate(ranks), np.concatenate(sure)
    if not np.isfinite(confidence).all():
        raise ValueError(
            "logits must be finite. "
            f"Received: NaN or infinity in {int((~np.isfinite(confidence)).sum())} of {len(rank)} "
            "rows. Scale the features, or train the head to a finite loss."
        )
    return {
        "top1": float((rank == 0).mean()),
        "top5": float((rank < 5).mean()),
        "ece": calibration_error(confidence, rank == 0),
    }


def _check_head(kernel: Any, bias: Any) -> tuple[Array, Array]:
    """A kernel and a bias as float32; without one, zeros."""
    weights = as_float32("kernel", kernel)
    fits = weights.ndim == 2 and bool(weights.size)
    offsets = np.zeros(weights.shape[-1:], np.float32) if bias is None else as_float32("bias", bias)
    if not fits or offsets.shape != weights.shape[1:]:
        raise ValueError(
            "kernel must be (dim, num_classes), and bias (num_classes,) or None. "
            f"Received: kernel of shape {weights.shape}, bias of shape {offsets.shape}. "
            "Give what head.weights_at(dim) returns."
        )
    if not np.isfinite(weights).all() or not np.isfinite(offsets).all():
        raise ValueError(
            "kernel and bias must be finite. "
            "Received: NaN or infinity. Train the head to a finite loss."
        )
    return weights, offsets
