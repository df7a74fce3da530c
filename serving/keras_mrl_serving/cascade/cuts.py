"""Thresholds as cuts: how many rows, in order of confidence, a stage leaves below its threshold.

The cuts of all stages are searched together. First the best cuts are sought for many prices of a
wrong answer, each cut moved in turn to its best place given the others (`search_cuts`). What is
best for a price lies on the convex hull of cost and mistakes; between the corners of the hull,
`fill_front` looks for the fewest mistakes at each step of cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool]
Floats = npt.NDArray[np.float64]
Cuts = tuple[int, ...]  # of all stages but the last
Point = tuple[float, float, Cuts]  # mistakes, cost
T = TypeVar("T")


def falling(items: Iterable[T], value: Callable[[T], float]) -> list[T]:
    """Return the items whose value is less than that of every item before them.

    Examples:
        >>> falling([3, 5, 1, 1, 2, 0], float)
        [3, 1, 0]
    """
    lowest: list[T] = []
    for item in items:
        if not lowest or value(item) < value(lowest[-1]):
            lowest.append(item)
    return lowest


_SWEEPS = 20
_PRICES = 60
_LOWEST_PRICE = 1e-3  # of a mistake, in rows that are decided at the dearest dim


class RankedRows:
    """Rows in order of their confidence at each stage, which cuts divide.

    Args:
        confidence: `(rows, stages)`.
        is_right: Whether deciding a row at a stage is no mistake, `(rows, stages)`.
        costs: Cost of a row that is decided at each stage, `(stages,)`.

    Examples:
        >>> sure, right = np.float32([[0.9, 1], [0.2, 1]]), [[1, 1], [0, 1]]
        >>> rows = RankedRows(sure, right, np.array([1.0, 8.0]))
        >>> rows.never()
        (2,)
        >>> costs, mistakes = rows.sweep(rows.never(), 0)
        >>> costs.tolist(), mistakes.tolist()  # of accepting all, the surer one, none
        ([2.0, 9.0, 16.0], [1.0, 0.0, 0.0])
    """

    def __init__(self, confidence: npt.ArrayLike, is_right: npt.ArrayLike, costs: Floats) -> None:
        self.costs = costs
        self._mistakes = (~np.asarray(is_right, bool)).astype(np.float64)
        self.num_rows = len(self._mistakes)
        self._paid = np.broadcast_to(costs, self._mistakes.shape)
        values = np.asarray(confidence)
        self._order = np.argsort(values, axis=0, kind="stable")
        self._rank = np.argsort(self._order, axis=0)
        ascending = np.take_along_axis(values, self._order, axis=0)
        # A threshold goes between two confidences that differ: rows that tie go the same way.
        self._may_cut = np.ones((self.num_rows + 1, values.shape[1]), bool)
        self._may_cut[1:-1] = ascending[1:] > ascending[:-1]

    def never(self) -> Cuts:
        """Return the cuts that accept no row before the last stage."""
        return (self.num_rows,) * (self._rank.shape[1] - 1)

    def weigh(self, cuts: Cuts) -> Point:
        """Return the mistakes and the cost of all rows under some cuts."""
        decided, rows = self._decided(cuts), np.arange(self.num_rows)
        mistakes, cost = self._mistakes[rows, decided].sum(), self._paid[rows, decided].sum()
        return float(mistakes), float(cost), cuts

    def descend(self, cuts: Cuts, price: float) -> Cuts:
        """Move the cuts in turn until no move makes `cost + price * mistakes` smaller."""
        for _ in range(_SWEEPS):
            before = cuts
            for stage in reversed(range(len(cuts))):
                costs, mistakes = self.sweep(cuts, stage)
                losses = costs + price * mistakes
                # Of equal losses the last: the cut that accepts least.
                best = len(losses) - 1 - int(np.argmin(losses[::-1]))
                cuts = (*cuts[:stage], best, *cuts[stage + 1 :])
            if cuts == before:
                break
        return cuts

    def sweep(self, cuts: Cuts, stage: int) -> tuple[Floats, Floats]:
        """Return the cost and the mistakes of all rows for every cut of one stage.

        The other cuts stay as they are. A cut between rows that tie is impossible, and costs
        infinitely much.

        Args:
            cuts: The cuts of all stages but the last.
            stage: The stage whose cut is swept, from accepting all rows to accepting none.

        Returns:
            Both `(rows + 1,)`.
        """
        decided = self._decided((*cuts[:stage], self.num_rows, *cuts[stage + 1 :]))
        reaches = (decided > stage)[self._order[:, stage]]
        totals = []
        for by_stage in (self._paid, self._mistakes):
            without = by_stage[np.arange(self.num_rows), decided]
            saved = (without - by_stage[:, stage])[self._order[:, stage]] * reaches
            totals.append(without.sum() - np.append(np.cumsum(saved[::-1])[::-1], 0.0))
        costs, mistakes = totals
        return np.where(self._may_cut[:, stage], costs, np.inf), mistakes

    def _decided(self, cuts: Cuts) -> npt.NDArray[np.int64]:
        """Return the stage that decides each row."""
        accepted = self._rank[:, : len(cuts)] >= np.asarray(cuts)
        last = np.full((self.num_rows, 1), True)
        return np.argmax(np.concatenate([accepted, last], axis=1), axis=1)


def search_cuts(rows: RankedRows) -> set[Cuts]:
    """Return the best cuts found for many prices of a mistake.

    Prices rise from next to nothing to one that outweighs all rows; each search begins where the
    last one ended, and once more at the start.

    Examples:
        >>> sure, right = np.float32([[0.9, 1], [0.2, 1]]), [[1, 1], [0, 1]]
        >>> cuts = search_cuts(RankedRows(sure, right, np.array([1.0, 8.0])))
        >>> sorted(cuts)  # the narrow stage accepts both rows, the surer one, or none
        [(0,), (1,), (2,)]
    """
    start = rows.never()
    hull = {start}
    for price in prices(_PRICES, rows.num_rows, rows.costs.max()):
        start = rows.descend(start, price)
        hull |= {start, rows.descend(rows.never(), price)}
    return hull


def prices(number: int, num_rows: int, dearest: float) -> list[float]:
    """Return prices of a mistake, from next to nothing to one that outweighs all rows.

    Args:
        number: How many.
        num_rows: Number of rows.
        dearest: What a row costs that is decided at the dearest stage.

    Examples:
        >>> [round(price, 2) for price in prices(3, 50, 2.0)]
        [0.0, 0.63, 200.0]
    """
    listed: list[float] = (np.geomspace(_LOWEST_PRICE, 2 * num_rows, number) * dearest).tolist()
    return listed


_STEPS = 200  # of cost, from the cheapest stage to the dearest
_ROUNDS = 4


def fill_front(rows: RankedRows, hull: Iterable[Cuts]) -> set[Cuts]:
    """Return cuts for every step of cost, none of them both dearer and worse than another.

    Each cut of the hull is swept over all rows while the others stay, and the best of each step
    is kept; then the new cuts are swept in the same way.

    Args:
        rows: The rows.
        hull: The cuts to begin with, as `search_cuts` returns them.

    Examples:
        >>> sure, right = np.float32([[0.9, 1], [0.2, 1]]), [[1, 1], [0, 1]]
        >>> rows = RankedRows(sure, right, np.array([1.0, 8.0]))
        >>> sorted(fill_front(rows, [rows.never()]))  # accepting both costs less, and a mistake
        [(0,), (1,)]
    """
    best: dict[int, Point] = {}
    first_points = [rows.weigh(cuts) for cuts in {*hull, rows.never()}]
    new_points = sorted(first_points)
    for _ in range(_ROUNDS):
        before = set(best.values())
        for _, _, cuts in new_points:
            for stage in range(len(cuts)):
                for step, point in _best_of_steps(rows, cuts, stage):
                    best[step] = min(best.get(step, point), point)
        new_points = sorted(set(best.values()) - before)
    by_cost = sorted([*first_points, *best.values()], key=itemgetter(1, 0, 2))
    return {cuts for *_, cuts in falling(by_cost, itemgetter(0))}


def _best_of_steps(rows: RankedRows, cuts: Cuts, stage: int) -> Iterator[tuple[int, Point]]:
    """Return the best point of each step of cost that moving one cut reaches."""
    costs, mistakes = rows.sweep(cuts, stage)
    least, most = rows.costs.min() * rows.num_rows, rows.costs.max() * rows.num_rows
    places = np.flatnonzero(np.isfinite(costs))
    steps = np.ceil((costs[places] - least) / max(most - least, 1e-300) * _STEPS).astype(np.int64)
    # Fewest mistakes first, of equal ones the cut that accepts most, in one number.
    keys = mistakes[places].astype(np.int64) * len(costs) + places
    best = np.full(_STEPS + 2, np.iinfo(np.int64).max)
    np.minimum.at(best, np.clip(steps, 0, _STEPS + 1), keys)
    for step in np.flatnonzero(best < np.iinfo(np.int64).max).tolist():
        cut = int(best[step] % len(costs))
        moved = (*cuts[:stage], cut, *cuts[stage + 1 :])
        yield step, (float(mistakes[cut]), float(costs[cut]), moved)
