"""Thresholds between adjacent dims, learned on a holdout by the paper's procedure.

For each adjacent pair of dims on its own, and a grid of 100 thresholds from 0.1 to 1, the accuracy
of "accept at the smaller dim if the confidence exceeds the threshold, else use the wider" is
counted. The smallest threshold of the best accuracy is moved midway between the two holdout
confidences it separates, so that rounding does not decide (Matryoshka Representation Learning,
arXiv 2205.13147).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .confidence import Floats, confidence_of


def learn_thresholds(
    logits: Floats, labels: npt.NDArray[np.int64], temperatures: Sequence[float], confidence: str
) -> list[float]:
    """Return a threshold for every dim but the widest.

    Args:
        logits: Of the holdout, `(rows, num_dims, num_classes)`.
        labels: Class ids, `(rows,)`.
        temperatures: One per dim.
        confidence: The measure, as in `CascadePolicy`.

    Examples:
        >>> logits = np.log([[[3.0, 1.0], [1.0, 9.0]], [[9.0, 1.0], [9.0, 1.0]]])
        >>> learn_thresholds(logits, np.array([1, 0]), (1.0, 1.0), "max_probability")  # .75, .9
        [0.824999988079071]
    """
    grid = _threshold_grid(confidence, logits.shape[-1])
    is_right = np.argmax(logits, axis=-1) == labels[:, None]
    thresholds = []
    for i in range(logits.shape[1] - 1):
        sure = confidence_of(confidence, logits[:, i], temperatures[i])
        thresholds.append(_best_threshold(sure, is_right[:, i], is_right[:, i + 1], grid))
    return thresholds


def _threshold_grid(measure: str, num_classes: int) -> Floats:
    """Return 100 thresholds: the paper's from 0.1 to 1, or over all values of another measure."""
    lowest, highest = {
        "max_probability": (0.1, 1.0),
        "margin": (0.0, 1.0),
        "entropy": (-math.log(num_classes), 0.0),
    }[measure]
    return np.linspace(lowest, highest, 100, dtype=np.float32)


def _best_threshold(
    confidence: Floats,
    is_right: npt.NDArray[np.bool],
    is_right_next: npt.NDArray[np.bool],
    grid: Floats,
) -> float:
    """Return the smallest best threshold between a dim and the next.

    With rows in order of confidence, a threshold accepts a tail of them, so the accuracies of all
    thresholds are two cumulative sums.

    Args:
        confidence: At the smaller dim, `(rows,)`.
        is_right: Whether the smaller dim's class is right.
        is_right_next: Whether the wider dim's class is right.
        grid: The thresholds to try, ascending.
    """
    order = np.argsort(confidence, kind="stable")
    ascending = confidence[order]
    first_accepted = np.searchsorted(ascending, grid, side="right")
    right_below = np.concatenate([[0], np.cumsum(is_right_next[order])])
    right_above = np.concatenate([np.cumsum(is_right[order][::-1])[::-1], [0]])
    best = int(np.argmax(right_below[first_accepted] + right_above[first_accepted]))
    return midway(ascending, int(first_accepted[best]))


def midway(ascending: Floats, first: int) -> float:
    """Return the threshold that accepts exactly `ascending[first:]`, midway to its neighbours.

    Args:
        ascending: Confidences of a holdout.
        first: Position of the first one that is accepted.

    Examples:
        >>> midway(np.float32([0.25, 0.5, 0.75]), first=1)
        0.375
        >>> midway(np.float32([-0.5, -0.25]), first=0)  # of negative entropies, too
        -1.0
    """
    lowest = ascending[0] if len(ascending) else np.float32(1)
    below_all = np.float32(0) if lowest > 0 else lowest - np.float32(1)
    below = ascending[first - 1] if first > 0 else below_all
    above = ascending[first] if first < len(ascending) else np.float32(1)
    middle = np.float32(below + (above - below) / 2)
    return float(middle if below <= middle < above else below)
