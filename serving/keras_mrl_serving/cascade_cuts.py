"""Thresholds of all stages searched together, as the number of rows each leaves below it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_SWEEPS = 20
_PRICES = 60
_LOWEST_PRICE = 1e-3  # of a mistake, in rows that are decided at the last dim

Floats = npt.NDArray[np.float64]
Cuts = tuple[int, ...]


def search_cuts(confidence: Any, right: Any, costs: Floats) -> set[Cuts]:
    """Return the cuts found best for many prices of a mistake.

    From mistakes that cost next to nothing to one that outweighs all rows, each search from where
    the last one ended and from the start.

    Args:
        confidence: `(rows, stages)`.
        right: Whether a row may be decided at a stage without a mistake, `(rows, stages)`.
        costs: Of a row decided at each stage, `(stages,)`.

    Examples:
        >>> cuts = search_cuts(np.float32([[0.9, 1], [0.2, 1]]), [[1, 1], [0, 1]], np.array([1, 8]))
        >>> sorted(cuts)  # the narrow stage accepts both rows, the surer one, or none
        [(0,), (1,), (2,)]
    """
    holdout = _Holdout(np.asarray(confidence), np.asarray(right, bool), costs)
    start = holdout.never()
    found = {start}
    for price in np.geomspace(_LOWEST_PRICE, 2 * len(right), _PRICES):
        start = holdout.descend(start, price * costs[-1])
        found |= {start, holdout.descend(holdout.never(), price * costs[-1])}
    return found


class _Holdout:
    """Rows with their confidence at each stage; a cut says how many rows a stage leaves below it.

    Args:
        confidence: `(rows, stages)`.
        right: Whether each stage's class is right, `(rows, stages)`.
        costs: `(stages,)`.
    """

    def __init__(self, confidence: Any, right: Any, costs: Floats) -> None:
        self._wrong = (~right).astype(np.float64)
        self._costs = costs
        self._order = np.argsort(confidence, axis=0, kind="stable")
        self._rank = np.argsort(self._order, axis=0)
        ascending = np.take_along_axis(confidence, self._order, axis=0)
        # A threshold goes between two confidences that differ: rows that tie go the same way.
        self._between = np.ones((len(confidence) + 1, confidence.shape[1]), bool)
        self._between[1:-1] = ascending[1:] > ascending[:-1]

    def never(self) -> Cuts:
        """The cuts that accept no row before the last stage."""
        return (len(self._rank),) * (self._rank.shape[1] - 1)

    def descend(self, cuts: Cuts, price: float) -> Cuts:
        """Move the cuts in turns until none makes `cost + price * wrong` smaller."""
        losses = self._costs + price * self._wrong
        for _ in range(_SWEEPS):
            before = cuts
            for stage in reversed(range(len(cuts))):
                cuts = (*cuts[:stage], self._best(cuts, stage, losses), *cuts[stage + 1 :])
            if cuts == before:
                break
        return cuts

    def _best(self, cuts: Cuts, stage: int, losses: Floats) -> int:
        """The cut of one stage that is best given those of the others."""
        accepted = self._rank[:, : len(cuts)] >= np.asarray(cuts)
        reaches = ~accepted[:, :stage].any(axis=1)
        later = losses[:, -1].copy()
        for after in reversed(range(stage + 1, len(cuts))):
            later = np.where(accepted[:, after], losses[:, after], later)
        saved = np.where(reaches, later - losses[:, stage], 0.0)[self._order[:, stage]]
        gain = np.concatenate([np.cumsum(saved[::-1])[::-1], [0.0]])  # of accepting rows from here
        gain[~self._between[:, stage]] = -np.inf
        return int(len(gain) - 1 - np.argmax(gain[::-1]))  # of equal ones that which accepts least
