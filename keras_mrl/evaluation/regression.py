"""Measures of values, as scikit-learn defines them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .multilabel import check_outputs


def score_regression(outputs: Any, targets: Any) -> dict[str, float]:
    """Return `mae`, `rmse` and `r2` of values, each the mean of those of the outputs.

    Args:
        outputs: `(rows, num_values)`, such as what `predict` gives at one dim.
        targets: The same shape; of one value also `(rows,)`.

    Formula:
        R2 = 1 - sum_i (y_i - p_i)^2 / sum_i (y_i - mean(y))^2; where all y are equal, 1 if all p
        are they, otherwise 0

    Raises:
        ValueError: If shapes do not fit, or a number is not finite.

    Examples:
        >>> score_regression([[1.0], [3.0]], [2, 4])
        {'mae': 1.0, 'rmse': 1.0, 'r2': 0.0}
    """
    predicted, expected = check_outputs(outputs, targets, "outputs")
    errors = predicted - expected
    squares = np.square(errors).sum(axis=0)
    spread = np.square(expected - expected.mean(axis=0)).sum(axis=0)
    is_spread = spread > 0
    shares = np.where(is_spread, squares / np.where(is_spread, spread, 1), squares > 0)
    return {
        "mae": float(np.abs(errors).mean()),
        "rmse": float(np.sqrt(squares / len(errors)).mean()),
        "r2": float(np.mean(1 - shares)),
    }
