"""The cuts between those of the convex hull: for each cost the fewest mistakes that are found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from .cascade_cuts import CutRows, Cuts

_STEPS = 200  # of cost, from the cheapest stage to the dearest
_ROUNDS = 4

_Point = tuple[float, float, Cuts]  # mistakes, cost


def fill_front(holdout: CutRows, found: Iterable[Cuts]) -> set[Cuts]:
    """Return cuts for every step of cost, none of them both dearer and worse than another.

    Each threshold of what was found is swept over all rows while the others stay, and the best of
    each step is kept; what is new is swept in its turn.

    Args:
        holdout: The rows.
        found: Where to begin.

    Examples:
        >>> sure, right = np.float32([[0.9, 1], [0.2, 1]]), [[1, 1], [0, 1]]
        >>> rows = CutRows(sure, right, np.array([1.0, 8.0]))
        >>> sorted(fill_front(rows, [rows.never()]))  # accepting both costs less, and a mistake
        [(0,), (1,)]
    """
    best: dict[int, _Point] = {}
    begun = [_weighed(holdout, cuts) for cuts in {*found, holdout.never()}]
    fresh = sorted(begun)
    for _ in range(_ROUNDS):
        before = set(best.values())
        for _, _, cuts in fresh:
            for stage in range(len(cuts)):
                for step, point in _best_of_steps(holdout, cuts, stage):
                    best[step] = min(best.get(step, point), point)
        fresh = sorted(set(best.values()) - before)
    return _undominated([*begun, *best.values()])


def _weighed(holdout: CutRows, cuts: Cuts) -> _Point:
    cost, wrong = holdout.weigh(cuts)
    return wrong, cost, cuts


def _best_of_steps(holdout: CutRows, cuts: Cuts, stage: int) -> Iterator[tuple[int, _Point]]:
    """The best that moving one cut makes of each step of cost."""
    costs, wrong = holdout.sweep(cuts, stage)
    least, most = holdout.costs.min() * holdout.rows, holdout.costs.max() * holdout.rows
    places = np.flatnonzero(np.isfinite(costs))
    steps = np.ceil((costs[places] - least) / max(most - least, 1e-300) * _STEPS).astype(np.int64)
    # Fewest mistakes first, of equal ones the cut that accepts most, in one number.
    keys = wrong[places].astype(np.int64) * len(costs) + places
    best = np.full(_STEPS + 2, np.iinfo(np.int64).max)
    np.minimum.at(best, np.clip(steps, 0, _STEPS + 1), keys)
    for step in np.flatnonzero(best < np.iinfo(np.int64).max).tolist():
        at = int(best[step] % len(costs))
        yield step, (float(wrong[at]), float(costs[at]), (*cuts[:stage], at, *cuts[stage + 1 :]))


def _undominated(points: Iterable[_Point]) -> set[Cuts]:
    kept: set[Cuts] = set()
    fewest = np.inf
    for wrong, _, cuts in sorted(points, key=lambda point: (point[1], point[0], point[2])):
        if wrong < fewest:
            kept.add(cuts)
            fewest = wrong
    return kept
