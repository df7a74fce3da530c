"""Cascades searched as a whole: for each cost the most accurate that was found on a holdout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from ..contract import check_dims
from ..inputs import as_float64, check_holdout
from .confidence import check_confidence, check_temperatures, confidence_of, midway
from .policy import CascadePolicy, Stage, first_sure, report_exits

# Thresholds of all stages searched together, as the number of rows each leaves below it.

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


# The cuts between those of the convex hull: for each cost the fewest mistakes that are found.

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


_METHOD = "joint search: thresholds in turns, for many prices of a wrong answer"


@dataclass(frozen=True)
class CascadeFront:
    """The policies of which none other is both cheaper and as accurate, cheapest first.

    Each carries what the holdout said of it in `policy.holdout`. That is optimistic, since the
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
    the first only where that costs no row of the holdout. Here the thresholds are moved in turns,
    each to its best place given the others, until none moves; the paper's policy is among those
    compared, so that none of the front is worse than it at its cost.

    Args:
        logits: What `predict` of the nested model returns for the holdout.
        labels: Class ids of the holdout, from 0. It must share no row with the training data nor
            with the data the cascade is judged on.
        dims: The dims of the head.
        costs: What each dim costs: multiply-adds, or measured milliseconds. None means the dims
            themselves.
        cumulative: Whether a row pays for every dim it is asked at, or for the last alone, as in
            the paper's expected dim.
        temperatures: One per dim, as `fit_temperatures` returns; None means ones.
        confidence: How sure a row is, as in `CascadePolicy`.

    Shapes:
        logits: `(rows, num_dims, num_classes)`. labels: `(rows,)`.

    Returns:
        The front, from the cheapest policy to the most accurate.

    Raises:
        ValueError: If shapes do not fit, rows are none, probabilities were given, or costs or
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
    prices = check_costs(dims if costs is None else costs, len(dims))
    scales = check_temperatures(temperatures, len(dims))
    sure = confidences(check_confidence(confidence), scores, scales)
    right = np.argmax(scores, axis=-1) == truth[:, None]
    stages = tuple(map(Stage, dims, [None] * len(dims), scales))
    policies = candidates(sure, right, prices, stages, confidence, cumulative, fill=True)
    policies.append(CascadePolicy.learn(scores, truth, dims, scales, confidence))
    judged = [judged_by(policy, dims, sure, right) for policy in policies]
    by_dim = dict(zip(dims, prices.tolist(), strict=True))
    return _front((mean_cost(policy, by_dim, cumulative), policy) for policy in judged)


def confidences(
    measure: str, scores: npt.NDArray[np.float32], scales: Sequence[float]
) -> npt.NDArray[np.float32]:
    """Return how sure each row is at each dim, `(rows, num_dims)`.

    Examples:
        >>> confidences("max_probability", np.zeros((1, 2, 4), np.float32), (1.0, 1.0)).tolist()
        [[0.25, 0.25]]
    """
    sure = [confidence_of(measure, scores[:, i], scale) for i, scale in enumerate(scales)]
    return np.stack(sure, axis=1)


def judged_by(
    policy: CascadePolicy, dims: tuple[int, ...], confidence: Any, right: Any
) -> CascadePolicy:
    """Return the policy with the report of rows whose confidences are known already.

    Args:
        policy: It asks some of the dims.
        dims: All of them.
        confidence: `(rows, num_dims)`, measured as the policy measures.
        right: Whether each dim's class is right, `(rows, num_dims)`.

    Examples:
        >>> policy = CascadePolicy((Stage(8, 0.5), Stage(64, None)))
        >>> sure, right = np.float32([[0.9, 1], [0.2, 1]]), np.array([[True, True], [False, True]])
        >>> judged_by(policy, (8, 64), sure, right).holdout.exit_fractions
        (0.5, 0.5)
    """
    columns = [dims.index(dim) for dim in policy.dims]
    stage_of = first_sure(confidence[:, columns], [stage.threshold for stage in policy.stages])
    return replace(policy, holdout=report_exits(policy.dims, stage_of, right[:, columns]))


def candidates(
    confidence: Any,
    right: Any,
    costs: Floats,
    stages: tuple[Stage, ...],
    measure: str,
    cumulative: bool,
    fill: bool = False,
) -> list[CascadePolicy]:
    """Return the policies worth comparing: the best for many prices of a mistake.

    Where every dim asked is paid for, those that begin further up are searched by themselves: they
    do not pay for the dims below.

    Args:
        confidence: `(rows, num_dims)`.
        right: Whether deciding a row at a dim is no mistake, `(rows, num_dims)`.
        costs: Of each dim.
        stages: Dims and temperatures.
        measure: The name of the confidence.
        cumulative: Whether all dims asked are paid for.
        fill: Whether those between them are searched, too: best for no price, but for a budget.

    Examples:
        >>> sure, right = np.float32([[0.9, 1], [0.2, 1]]), [[True, True], [False, True]]
        >>> stages = (Stage(8, None), Stage(64, None))
        >>> found = candidates(
        ...     sure, np.array(right), np.array([8.0, 64.0]), stages, "max_probability", False
        ... )
        >>> sorted(policy.dims for policy in found)
        [(8, 64), (8, 64), (64,)]
    """
    found: dict[CascadePolicy, None] = {}  # in an order that every process has
    for first in range(len(stages) if cumulative else 1):
        paid = np.cumsum(costs[first:]) if cumulative else costs
        holdout = CutRows(confidence[:, first:], right[:, first:], paid)
        cuts_found = search_cuts(holdout)
        for cuts in sorted(fill_front(holdout, cuts_found) if fill else cuts_found):
            found[_policy(confidence[:, first:], cuts, stages[first:], measure)] = None
    return list(found)


def mean_cost(policy: CascadePolicy, costs: dict[int, float], cumulative: bool) -> float:
    """Return what a row of the policy's holdout costs in the mean.

    Examples:
        >>> policy = CascadePolicy((Stage(8, 0.9), Stage(64, None)))
        >>> seen = replace(policy, holdout=policy.evaluate([[[9, 0], [9, 0]]], [0]))
        >>> mean_cost(seen, {8: 2.0, 64: 5.0}, cumulative=True)
        2.0
    """
    prices = np.array([costs[dim] for dim in policy.dims])
    exits = (0.0,) if policy.holdout is None else policy.holdout.exit_fractions
    return float(np.dot(exits, np.cumsum(prices) if cumulative else prices))


def check_costs(costs: npt.ArrayLike, num_dims: int) -> Floats:
    """Return one cost per dim.

    Raises:
        ValueError: If they are not finite and positive, or differ by more than 1e12.

    Examples:
        >>> check_costs((8, 64), 2).tolist()
        [8.0, 64.0]
    """
    checked = as_float64("costs", costs)
    positive = checked.shape == (num_dims,) and (checked > 0).all()
    if not positive or not checked.max() < checked.min() * 1e12:
        raise ValueError(
            "costs must be one positive number per dim, finite and of one scale. "
            f"Received: costs={tuple(np.ravel(checked).tolist())} for {num_dims} dims. "
            "Give what each dim costs."
        )
    return checked


def _policy(confidence: Any, cuts: Cuts, stages: tuple[Stage, ...], measure: str) -> CascadePolicy:
    """The policy of some cuts, without the stages that accept no row."""
    kept = [
        replace(stage, threshold=midway(np.sort(confidence[:, at]), cut))
        for at, (stage, cut) in enumerate(zip(stages, cuts, strict=False))
        if cut < len(confidence)
    ]
    return CascadePolicy((*kept, stages[-1]), measure, method=_METHOD)


def _front(judged: Iterable[tuple[float, CascadePolicy]]) -> CascadeFront:
    """Of policies that know their holdout, those of which none is cheaper and as accurate."""
    kept: list[tuple[float, float, CascadePolicy]] = []
    known = [(cost, p.holdout.accuracy, p) for cost, p in judged if p.holdout is not None]
    for cost, accuracy, policy in sorted(known, key=lambda one: (one[0], -one[1])):
        if not kept or accuracy > kept[-1][1]:
            kept.append((cost, accuracy, policy))
    return CascadeFront(tuple(p for *_, p in kept), tuple(c for c, *_ in kept))
