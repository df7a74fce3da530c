"""Whether a net is as often right as it says."""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_mrl_serving.confidence import softmax
from keras_mrl_serving.inputs import check_holdout


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
    if not isinstance(bins, int) or bins < 1:
        raise ValueError(f"bins must be a positive integer. Received: bins={bins!r}. Give 15.")
    scores, truth = check_holdout(np.asarray(logits)[:, None], labels, 1)
    shares = softmax(scores[:, 0])
    return calibration_error(shares.max(axis=-1), shares.argmax(axis=-1) == truth, bins)


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
