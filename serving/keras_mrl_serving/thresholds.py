"""Where a threshold goes among the confidences of a holdout."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .confidence import lowest

Floats = npt.NDArray[np.float32]


def paper_grid(measure: str, num_classes: int) -> Floats:
    """Return the 100 thresholds that the paper's procedure tries: from 0.1 to 1.

    Of the other measures they reach over all values there are.

    Examples:
        >>> paper_grid("max_probability", 10)[[0, -1]].tolist()
        [0.10000000149011612, 1.0]
    """
    if measure == "max_probability":
        return np.linspace(0.1, 1.0, 100, dtype=np.float32)
    top = 0.0 if measure == "entropy" else 1.0
    return np.linspace(lowest(measure, num_classes), top, 100, dtype=np.float32)


def smallest_best(
    confidence: Floats,
    right: npt.NDArray[np.bool],
    right_next: npt.NDArray[np.bool],
    grid: Floats,
) -> float:
    """Return the smallest best threshold of one adjacent pair of dims.

    With rows in order of confidence, a threshold accepts a tail of them, so the accuracies of all
    thresholds are two cumulative sums. The best is moved midway between the two confidences that
    it separates.

    Args:
        confidence: At the smaller dim, `(rows,)`.
        right: Whether the smaller dim's class is right.
        right_next: Whether the wider dim's is.
        grid: The thresholds to try, ascending.

    Examples:
        >>> sure, unsure = [True, False], [True, True]
        >>> smallest_best(np.float32([0.75, 0.25]), *map(np.array, (sure, unsure)), [0.1, 0.5])
        0.5
    """
    order = np.argsort(confidence, kind="stable")
    ascending = confidence[order]
    first_accepted = np.searchsorted(ascending, grid, side="right")
    below = np.concatenate([[0], np.cumsum(right_next[order])])
    above = np.concatenate([np.cumsum(right[order][::-1])[::-1], [0]])
    best = int(np.argmax(below[first_accepted] + above[first_accepted]))
    return midway(ascending, int(first_accepted[best]))


def midway(ascending: Floats, first: int) -> float:
    """Return the threshold that accepts exactly `ascending[first:]`, far from both neighbours.

    Examples:
        >>> midway(np.float32([0.25, 0.5, 0.75]), first=1)
        0.375
        >>> midway(np.float32([-0.5, -0.25]), first=0)  # of negative entropies, too
        -1.0
    """
    least = ascending[0] if len(ascending) else np.float32(1)
    under = np.float32(0) if least > 0 else least - np.float32(1)
    below = ascending[first - 1] if first > 0 else under
    above = ascending[first] if first < len(ascending) else np.float32(1)
    middle = np.float32(below + (above - below) / 2)
    return float(middle if below <= middle < above else below)
