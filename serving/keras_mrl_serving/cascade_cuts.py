"""Thresholds of all stages searched together, as the number of rows each leaves below it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

_SWEEPS = 20
_PRICES = 60
_LOWEST_PRICE = 1e-3  # of a mistake, in rows that are decided at the dearest dim

Floats = npt.NDArray[np.float64]
Cuts = tuple[int, ...]


def search_cuts(holdout: CutRows) -> set[Cuts]:
    """Return the cuts found best for many prices of a mistake.

    From mistakes that cost next to nothing to one that outweighs all rows, each search from where
    the last one ended and from the start. What is best for a price lies on the convex hull of what
    there is.

    Examples:
        >>> sure, right = np.float32([[0.9, 1], [0.2, 1]]), [[1, 1], [0, 1]]
        >>> cuts = search_cuts(CutRows(sure, right, np.array([1.0, 8.0])))
        >>> sorted(cuts)  # the narrow stage accepts both rows, the surer one, or none
        [(0,), (1,), (2,)]
    """
    start = holdout.never()
    found = {start}
    for price in np.geomspace(_LOWEST_PRICE, 2 * holdout.rows, _PRICES):
        start = holdout.descend(start, price * holdout.costs.max())
        found |= {start, holdout.descend(holdout.never(), price * holdout.costs.max())}
    return found


class CutRows:
    """Rows with their confidence at each stage; a cut says how many rows a stage leaves below it.

    Args:
        confidence: `(rows, stages)`.
        right: Whether a row may be decided at a stage without a mistake, `(rows, stages)`.
        costs: Of a row decided at each stage, `(stages,)`.

    Examples:
        >>> rows = CutRows(np.float32([[0.9, 1], [0.2, 1]]), [[1, 1], [0, 1]], np.array([1.0, 8.0]))
        >>> rows.never()
        (2,)
        >>> costs, wrong = rows.sweep(rows.never(), 0)
        >>> costs.tolist(), wrong.tolist()  # of accepting all, the surer one, none
        ([2.0, 9.0, 16.0], [1.0, 0.0, 0.0])
    """

    def __init__(self, confidence: Any, right: Any, costs: Floats) -> None:
        self.costs = costs
        self.rows = len(right)
        self._wrong = (~np.asarray(right, bool)).astype(np.float64)
        self._paid = np.broadcast_to(costs, self._wrong.shape)
        self._last = np.full((self.rows, 1), True)
        confidence = np.asarray(confidence)
        self._order = np.argsort(confidence, axis=0, kind="stable")
        self._rank = np.argsort(self._order, axis=0)
        ascending = np.take_along_axis(confidence, self._order, axis=0)
        # A threshold goes between two confidences that differ: rows that tie go the same way.
        self._between = np.ones((self.rows + 1, confidence.shape[1]), bool)
        self._between[1:-1] = ascending[1:] > ascending[:-1]

    def never(self) -> Cuts:
        """The cuts that accept no row before the last stage."""
        return (self.rows,) * (self._rank.shape[1] - 1)

    def weigh(self, cuts: Cuts) -> tuple[float, float]:
        """Return the cost and the mistakes of all rows under some cuts."""
        decided, rows = self._decided(cuts), np.arange(self.rows)
        return float(self._paid[rows, decided].sum()), float(self._wrong[rows, decided].sum())

    def descend(self, cuts: Cuts, price: float) -> Cuts:
        """Move the cuts in turns until none makes `cost + price * wrong` smaller."""
        for _ in range(_SWEEPS):
            before = cuts
            for stage in reversed(range(len(cuts))):
                costs, wrong = self.sweep(cuts, stage)
                losses = costs + price * wrong
                # Of equal ones that which accepts least.
                best = len(losses) - 1 - int(np.argmin(losses[::-1]))
                cuts = (*cuts[:stage], best, *cuts[stage + 1 :])
            if cuts == before:
                break
        return cuts

    def sweep(self, cuts: Cuts, stage: int) -> tuple[Floats, Floats]:
        """Return the cost and the mistakes of all rows for every cut of one stage.

        The others stay as they are. A cut between rows that tie is none: it costs infinitely much.

        Args:
            cuts: Of all stages but the last.
            stage: Whose cut is swept, from accepting all rows to accepting none.

        Returns:
            Both `(rows + 1,)`.
        """
        decided = self._decided((*cuts[:stage], self.rows, *cuts[stage + 1 :]))
        reaches = (decided > stage)[self._order[:, stage]]
        totals = []
        for of_stage in (self._paid, self._wrong):
            without = of_stage[np.arange(self.rows), decided]
            saved = (without - of_stage[:, stage])[self._order[:, stage]] * reaches
            totals.append(without.sum() - np.append(np.cumsum(saved[::-1])[::-1], 0.0))
        costs, wrong = totals
        return np.where(self._between[:, stage], costs, np.inf), wrong

    def _decided(self, cuts: Cuts) -> npt.NDArray[np.int64]:
        """The stage that decides each row."""
        accepted = self._rank[:, : len(cuts)] >= np.asarray(cuts)
        return np.argmax(np.concatenate([accepted, self._last], axis=1), axis=1)
