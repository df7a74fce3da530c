"""Cascades searched as a whole: for each cost the most accurate policy found on a holdout.

The thresholds of all stages are searched together, as *cuts*: a cut is the number of rows, in order
of confidence, that a stage leaves below its threshold. First the best cuts are sought for many
prices of a wrong answer, each threshold moved in turn to its best place given the others
(`search_cuts`). What is best for a price lies on the convex hull of cost and mistakes; between the
corners of the hull, `fill_front` looks for the fewest mistakes at each step of cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from numbers import Real
from operator import itemgetter
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ..contract import check_dims
from ..inputs import as_float64, check_holdout
from .confidence import check_confidence, check_temperatures, confidence_of
from .policy import CascadePolicy, Stage, report_exits
from .thresholds import midway

Bools = npt.NDArray[np.bool]
Floats = npt.NDArray[np.float64]
Cuts = tuple[int, ...]  # of all stages but the last
Point = tuple[float, float, Cuts]  # mistakes, cost
T = TypeVar("T")

_METHOD = "joint search: thresholds in turns, for many prices of a wrong answer"


@dataclass(frozen=True)
class CascadeFront:
    """Policies, cheapest first; no other policy found is both cheaper and as accurate.

    Each carries its report on the holdout in `policy.holdout`. That is optimistic, since the
    thresholds were chosen there: judge the one you take on other rows with `policy.evaluate`.

    Args:
        policies: The policies.
        costs: Mean cost of a row under each.

    Examples:
        >>> sure, unsure = [[3.0, 0.0], [3.0, 0.0]], [[0.1, 0.0], [0.0, 3.0]]
        >>> front = search_cascades([sure, unsure], labels=[0, 1], dims=(8, 64))
        >>> [(policy.holdout.accuracy, cost) for policy, cost in zip(front.policies, front.costs)]
        [(0.5, 8.0), (1.0, 36.0)]
    """

    policies: tuple[CascadePolicy, ...]
    costs: tuple[float, ...]

    def cheapest_within(self, share: float = 0.005) -> CascadePolicy:
        """Return the cheapest policy whose accuracy is within `share` of the full dim's.

        Args:
            share: 0.005 is half a point; 0 asks for the full dim's accuracy or better.

        Raises:
            ValueError: If `share` is negative or no number.
        """
        if not isinstance(share, Real) or not share >= 0:
            raise ValueError(
                "share must be a number of at least 0. "
                f"Received: share={share!r}. Give 0.005 for half a point."
            )
        for policy in self.policies:
            report = policy.holdout
            if report and report.accuracy >= report.full_accuracy - share - 1e-12:
                return policy
        return self.policies[-1]

    def best_under(self, cost: float) -> CascadePolicy:
        """Return the most accurate policy that costs at most `cost` a row.

        Raises:
            ValueError: If none is as cheap, or `cost` is no number.
        """
        if not isinstance(cost, Real) or not isfinite(cost):
            raise ValueError(
                "cost must be a finite number. "
                f"Received: cost={cost!r}. Give what a row may cost, in the unit of the search."
            )
        affordable = [p for p, c in zip(self.policies, self.costs, strict=True) if c <= cost]
        if not affordable:
            raise ValueError(
                f"The cheapest policy costs {self.costs[0]:.4g} a row. "
                f"Received: cost={cost!r}. Give at least that."
            )
        return affordable[-1]


def search_cascades(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    dims: Sequence[int],
    costs: npt.ArrayLike | None = None,
    cumulative: bool = False,
    temperatures: Sequence[float] | None = None,
    confidence: str = "max_probability",
) -> CascadeFront:
    """Search the thresholds of all dims together, for every price of a wrong answer and every cost.

    The paper's procedure (`CascadePolicy.learn`) looks at each pair of dims alone, and accepts at
    the first only where that costs no row of the holdout. Here each threshold is moved in turn to
    its best place given the others, until none moves. The paper's policy is compared as well, so
    no policy of the front is worse than it at its cost.

    Args:
        logits: What `predict` of the nested model returns for the holdout.
        labels: Class ids of the holdout, from 0. It must share no row with the training data nor
            with the data the cascade is judged on.
        dims: The dims of the head.
        costs: What each dim costs: multiply-adds, or measured milliseconds. None means the dims
            themselves.
        cumulative: Whether a row pays for all dims up to the one that decides, or for that one
            alone, as in the paper's expected dim.
        temperatures: One per dim, as `fit_temperatures` returns; None means ones.
        confidence: How sure a row is, as in `CascadePolicy`.

    Shapes:
        logits: `(rows, num_dims, num_classes)`. labels: `(rows,)`.

    Returns:
        The front, from the cheapest policy to the most accurate.

    Raises:
        ValueError: If shapes do not fit, there are no rows, these are probabilities, or costs or
            temperatures are not one finite number above 0 per dim.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> labels = rng.integers(0, 3, 200)
        >>> noise = np.array([2.0, 0.5])[None, :, None] * rng.normal(size=(200, 2, 3))
        >>> front = search_cascades(3 * np.eye(3)[labels][:, None] + noise, labels, (8, 64))
        >>> policy = front.cheapest_within(0.005)
        >>> policy.dims, policy.holdout.expected_dim < 64
        ((8, 64), True)
    """
    dims = check_dims(dims)
    scores, truth = check_holdout(logits, labels, len(dims))
    dim_costs = DimCosts.checked(dims if costs is None else costs, dims, cumulative)
    scales = check_temperatures(temperatures, len(dims))
    holdout = Holdout.measured(scores, truth, dims, scales, confidence)
    policies = candidates(holdout, dim_costs, fill=True)
    policies.append(CascadePolicy.learn(scores, truth, dims, scales, confidence))
    judged = map(holdout.judged, policies)
    measured = [(dim_costs.mean(p), -p.holdout.accuracy, p) for p in judged if p.holdout]
    front = falling(sorted(measured, key=itemgetter(0, 1)), itemgetter(1))
    return CascadeFront(tuple(policy for *_, policy in front), tuple(cost for cost, *_ in front))


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


@dataclass(frozen=True)
class DimCosts:
    """What each dim costs a row.

    Args:
        by_dim: The cost of each dim.
        cumulative: Whether a row pays for all dims up to the one that decides, or for it alone.

    Examples:
        >>> policy = CascadePolicy((Stage(8, 0.9), Stage(64, None)))
        >>> judged = replace(policy, holdout=policy.evaluate([[[9, 0], [9, 0]]], [0]))
        >>> DimCosts({8: 2.0, 64: 5.0}, cumulative=True).mean(judged)
        2.0
    """

    by_dim: dict[int, float]
    cumulative: bool

    @classmethod
    def checked(cls, costs: npt.ArrayLike, dims: tuple[int, ...], cumulative: bool) -> DimCosts:
        """Return one cost per dim.

        Raises:
            ValueError: If they are not finite and positive, or differ by more than 1e12.
        """
        prices = as_float64("costs", costs)
        are_positive = prices.shape == (len(dims),) and (prices > 0).all()
        if not are_positive or not prices.max() < prices.min() * 1e12:
            raise ValueError(
                "costs must be one positive number per dim, finite and of one scale. "
                f"Received: costs={tuple(np.ravel(prices).tolist())} for {len(dims)} dims. "
                "Give what each dim costs."
            )
        return cls(dict(zip(dims, prices.tolist(), strict=True)), cumulative)

    def of_stages(self, dims: tuple[int, ...]) -> Floats:
        """Return the cost of a row by the dim that decides, for a policy of these dims."""
        prices = np.array([self.by_dim[dim] for dim in dims])
        return np.cumsum(prices) if self.cumulative else prices

    def mean(self, policy: CascadePolicy) -> float:
        """Return the mean cost of a row of the policy's holdout."""
        exits = (0.0,) if policy.holdout is None else policy.holdout.exit_fractions
        return float(np.dot(exits, self.of_stages(policy.dims)))


@dataclass(frozen=True)
class Holdout:
    """A holdout as a search sees it: how sure each row is at each dim, and where it is right.

    Args:
        stages: A stage per dim, without a threshold.
        measure: The name of the confidence.
        confidence: float32 `(rows, num_dims)`.
        is_right: Whether deciding a row at a dim is no mistake, `(rows, num_dims)`.

    Examples:
        >>> logits = np.float32([[[9, 0], [9, 0]], [[1, 0], [0, 9]]])
        >>> holdout = Holdout.measured(logits, np.array([0, 1]), (8, 64), (1.0, 1.0), "margin")
        >>> policy = CascadePolicy((Stage(8, 0.9), Stage(64, None)), "margin")
        >>> holdout.judged(policy).holdout.exit_fractions
        (0.5, 0.5)
    """

    stages: tuple[Stage, ...]
    measure: str
    confidence: npt.NDArray[np.float32]
    is_right: Bools

    @classmethod
    def measured(
        cls,
        scores: npt.NDArray[np.float32],
        truth: npt.NDArray[np.int64],
        dims: tuple[int, ...],
        temperatures: Sequence[float],
        measure: str,
    ) -> Holdout:
        """Return the holdout of checked logits `(rows, num_dims, num_classes)` and labels."""
        check_confidence(measure)
        confidence = [confidence_of(measure, scores[:, i], t) for i, t in enumerate(temperatures)]
        stages = tuple(map(Stage, dims, [None] * len(dims), temperatures))
        is_right = np.argmax(scores, axis=-1) == truth[:, None]
        return cls(stages, measure, np.stack(confidence, axis=1), is_right)

    def rows(self, chosen: npt.NDArray[np.int64]) -> Holdout:
        """Return the holdout of some of the rows."""
        return replace(self, confidence=self.confidence[chosen], is_right=self.is_right[chosen])

    def _exits(self, policy: CascadePolicy) -> tuple[npt.NDArray[np.int64], Bools]:
        """Return the stage that decides each row, and where the policy's stages are right."""
        all_dims = [stage.dim for stage in self.stages]
        columns = [all_dims.index(dim) for dim in policy.dims]
        thresholds = [-np.inf if s.threshold is None else s.threshold for s in policy.stages]
        stops = self.confidence[:, columns] > np.array(thresholds, np.float32)
        return np.argmax(stops, axis=1), self.is_right[:, columns]

    def judged(self, policy: CascadePolicy) -> CascadePolicy:
        """Return the policy with its report on these rows."""
        return replace(policy, holdout=report_exits(policy.dims, *self._exits(policy)))

    def num_harmed(self, policy: CascadePolicy) -> int:
        """Return how many rows the full dim has right and the policy wrong."""
        stage_of, is_right = self._exits(policy)
        return int((self.is_right[:, -1] & ~is_right[np.arange(len(is_right)), stage_of]).sum())


def candidates(holdout: Holdout, costs: DimCosts, fill: bool = False) -> list[CascadePolicy]:
    """Return the policies worth comparing: the best for many prices of a mistake.

    Where a row pays for all dims up to the one that decides, policies that begin at a wider dim
    are searched by themselves: they do not pay for the dims below.

    Args:
        holdout: The rows.
        costs: What each dim costs.
        fill: Whether to search policies between these, too: best for no price, but for a budget.

    Examples:
        >>> logits = np.float32([[[9, 0], [9, 0]], [[1, 0], [0, 9]]])
        >>> holdout = Holdout.measured(logits, np.array([0, 1]), (8, 64), (1.0, 1.0), "margin")
        >>> costs = DimCosts({8: 8.0, 64: 64.0}, cumulative=False)
        >>> sorted(policy.dims for policy in candidates(holdout, costs))
        [(8, 64), (8, 64), (64,)]
    """
    policies: dict[CascadePolicy, None] = {}  # in an order that every process has
    for first in range(len(holdout.stages) if costs.cumulative else 1):
        stages = holdout.stages[first:]
        confidence = holdout.confidence[:, first:]
        stage_costs = costs.of_stages(tuple(stage.dim for stage in stages))
        ranked = RankedRows(confidence, holdout.is_right[:, first:], stage_costs)
        hull = search_cuts(ranked)
        for cuts in sorted(fill_front(ranked, hull) if fill else hull):
            policies[_policy_of(cuts, confidence, stages, holdout.measure)] = None
    return list(policies)


def _policy_of(
    cuts: Cuts, confidence: npt.NDArray[np.float32], stages: tuple[Stage, ...], measure: str
) -> CascadePolicy:
    """Return the policy of some cuts, without the stages that accept no row."""
    accepting = [
        replace(stage, threshold=midway(np.sort(confidence[:, i]), cut))
        for i, (stage, cut) in enumerate(zip(stages, cuts, strict=False))
        if cut < len(confidence)
    ]
    return CascadePolicy((*accepting, stages[-1]), measure, method=_METHOD)


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
    for price in np.geomspace(_LOWEST_PRICE, 2 * rows.num_rows, _PRICES) * rows.costs.max():
        start = rows.descend(start, price)
        hull |= {start, rows.descend(rows.never(), price)}
    return hull


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
