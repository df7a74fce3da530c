"""Whether a net is as often right as it says."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_mrl_serving.cascade.confidence import softmax
from keras_mrl_serving.inputs import as_float32, check_holdout

from .._dims import check_count
from .._labels import as_labels


def expected_calibration_error(logits: Any, labels: Any, bins: int = 15) -> float:
    """Return by how much the confidence of the best class misses the accuracy, in the mean.

    Args:
        logits: `(rows, num_classes)`.
        labels: Class ids, `(rows,)`.
        bins: Number of bins of equal width that confidences from 0 to 1 are put in.

    Formula:
        ECE = sum_b |b| / rows * |accuracy of b - mean confidence of b|

    Raises:
        ValueError: If shapes do not fit, rows are none, or probabilities were given.

    Reference:
        Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599.

    Examples:
        >>> sure = [[9.0, 0.0], [9.0, 0.0]]
        >>> round(expected_calibration_error(sure, [0, 0]), 3)
        0.0
        >>> round(expected_calibration_error(sure, [0, 1]), 3)  # sure of both, right once
        0.5
    """
    count = check_count("bins", bins, 15)
    scores, truth = as_float32("logits", logits), as_labels(labels)
    if scores.ndim != 2 or truth.shape != scores.shape[:1]:
        raise ValueError(
            "logits must be (rows, num_classes) with one label per row. "
            f"Received: logits of shape {scores.shape} and labels of shape {truth.shape}. "
            "Give what predict() returns at one dim, and class ids."
        )
    nested, truth = check_holdout(scores[:, None], truth, 1)
    shares = softmax(nested[:, 0])
    return calibration_error(shares.max(axis=-1), shares.argmax(axis=-1) == truth, count)


def calibration_error(confidence: Any, right: Any, bins: int = 15) -> float:
    """Return the same of rows whose confidence is known, and whether they are right.

    Examples:
        >>> from keras_mrl.evaluation.calibration import calibration_error
        >>> calibration_error([0.75, 0.75], [True, False])
        0.25
    """
    sure = np.asarray(confidence, np.float64)
    of = np.minimum((sure * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(of, right - sure, minlength=bins)).sum() / len(sure))
