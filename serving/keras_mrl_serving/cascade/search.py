"""Cascades searched as a whole: for each cost the most accurate policy found on a holdout.

The thresholds of all stages are searched together, as `cuts` says. Where there are exits, a cascade
has at most four stages: more overfit the holdout. The sets of stages that are worth a search are
those that are best for one of a few prices of a wrong answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from numbers import Real
from operator import itemgetter

import numpy as np
import numpy.typing as npt

from ..inputs import as_float64
from .confidence import check_confidence, check_temperatures, confidence_of
from .cuts import Bools, Cuts, Floats, RankedRows, falling, fill_front, prices, search_cuts
from .policy import MOST_STAGES, CascadePolicy, choose_confidence, learned, report_exits
from .stages import Logits, Stage, StageKey, has_exits, labelled_stages
from .thresholds import midway

Costs = npt.ArrayLike | Callable[[Sequence[StageKey]], npt.ArrayLike]

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
    logits: Logits,
    labels: npt.ArrayLike,
    dims: Sequence[int] | None = None,
    costs: Costs | None = None,
    cumulative: bool = False,
    temperatures: Sequence[float] | None = None,
    confidence: str | None = None,
) -> CascadeFront:
    """Search the thresholds of all stages together, for every price of a wrong answer and cost.

    The paper's procedure (`CascadePolicy.learn`) looks at each pair of stages alone, and accepts at
    the first only where that costs no row of the holdout. Here each threshold is moved in turn to
    its best place given the others, until none moves. The paper's policy is compared as well, so
    no policy of the front is worse than it at its cost. A stage that accepts no row is left out.

    Args:
        logits: What `predict` of the nested model returns for the holdout; or that of its
            `all_exits()`, by exit; or logits by stage, as `stage_logits` makes them. Of exits, the
            policies found have at most four stages.
        labels: Class ids of the holdout, from 0. It must share no row with the training data nor
            with the data the cascade is judged on.
        dims: The dims of the head; left out where logits are by stage.
        costs: What each stage costs: multiply-adds, or measured milliseconds. None means the dims
            themselves, which says nothing of exits. A function takes the exits and dims of a
            policy's stages and returns their costs: `measure_costs(model).of`.
        cumulative: Whether a row pays for all stages up to the one that decides, or for that one
            alone, as in the paper's expected dim. What `measure_costs` returns has them in it
            already.
        temperatures: One per stage, as `fit_temperatures` returns; None means ones.
        confidence: How sure a row is, as in `CascadePolicy`.

    Shapes:
        logits: `(rows, num_dims, num_classes)`, or so for each exit, or `(rows, num_classes)` for
        each stage. labels: `(rows,)`.

    Returns:
        The front, from the cheapest policy to the most accurate.

    Raises:
        ValueError: If shapes do not fit, there are no rows, these are probabilities, costs or
            temperatures are not one finite number above 0 per stage, or there are exits and no
            costs.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> labels = rng.integers(0, 3, 200)
        >>> noise = np.array([2.0, 0.5])[None, :, None] * rng.normal(size=(200, 2, 3))
        >>> logits = 3 * np.eye(3)[labels][:, None] + noise
        >>> front = search_cascades(logits, labels, (8, 64))
        >>> policy = front.cheapest_within(0.005)
        >>> policy.dims, policy.holdout.expected_dim < 64
        ((8, 64), True)
        >>> by_exit = {"early": logits[:, :1], "last": logits[:, 1:]}
        >>> front = search_cascades(by_exit, labels, (64,), costs=[1.0, 4.0])
        >>> front.cheapest_within(0.005).keys
        (('early', 64), (None, 64))
    """
    scores, truth, keys = labelled_stages(logits, labels, dims)
    stage_costs = StageCosts.checked(costs, keys, cumulative)
    scales = check_temperatures(temperatures, len(keys))
    measure = choose_confidence(confidence, keys)
    holdout = Holdout.measured(scores, truth, keys, scales, measure)
    policies = candidates(holdout, stage_costs, fill=True)
    if not has_exits(keys) or len(keys) <= MOST_STAGES:
        policies.append(learned(scores, truth, keys, scales, measure))
    judged = map(holdout.judged, policies)
    measured = [(stage_costs.mean(p), -p.holdout.accuracy, p) for p in judged if p.holdout]
    front = falling(sorted(measured, key=itemgetter(0, 1)), itemgetter(1))
    return CascadeFront(tuple(policy for *_, policy in front), tuple(cost for cost, *_ in front))


@dataclass(frozen=True)
class StageCosts:
    """What each stage costs a row.

    Args:
        of: The costs of the stages of a policy, by their exits and dims.
        cumulative: Whether a row pays for all stages up to the one that decides, or for it alone.
        skipping_pays: Whether a stage that is not asked is not paid for.

    Examples:
        >>> policy = CascadePolicy((Stage(8, 0.9), Stage(64, None)))
        >>> judged = replace(policy, holdout=policy.evaluate([[[9, 0], [9, 0]]], [0]))
        >>> StageCosts.checked((2.0, 5.0), policy.keys, cumulative=True).mean(judged)
        2.0
    """

    of: Callable[[Sequence[StageKey]], npt.ArrayLike]
    cumulative: bool
    skipping_pays: bool

    @classmethod
    def checked(cls, costs: Costs | None, keys: Sequence[StageKey], cumulative: bool) -> StageCosts:
        """Return one cost per stage.

        Raises:
            ValueError: If they are not finite and positive, differ by more than 1e12, or are not
                given for exits.
        """
        if costs is None and has_exits(keys):
            raise ValueError(
                "What an exit costs cannot be read from its dims. Received: logits of exits and "
                "costs=None. Give costs=measure_costs(model).of, or one number per stage."
            )
        if callable(costs):
            _check_costs(costs(keys), keys)
            return cls(costs, cumulative, skipping_pays=True)
        prices = _check_costs([dim for _, dim in keys] if costs is None else costs, keys)
        by_stage = dict(zip(keys, prices.tolist(), strict=True))
        return cls(lambda asked: [by_stage[key] for key in asked], cumulative, cumulative)

    def of_stages(self, keys: Sequence[StageKey]) -> Floats:
        """Return the cost of a row by the stage that decides, for a policy of these stages."""
        prices = np.asarray(self.of(keys), np.float64)
        return np.cumsum(prices) if self.cumulative else prices

    def mean(self, policy: CascadePolicy) -> float:
        """Return the mean cost of a row of the policy's holdout."""
        exits = (0.0,) if policy.holdout is None else policy.holdout.exit_fractions
        return float(np.dot(exits, self.of_stages(policy.keys)))


def _check_costs(costs: npt.ArrayLike, keys: Sequence[StageKey]) -> Floats:
    prices = as_float64("costs", costs)
    are_positive = prices.shape == (len(keys),) and (prices > 0).all()
    if not are_positive or not prices.max() < prices.min() * 1e12:
        raise ValueError(
            "costs must be one positive number per stage, finite and of one scale. "
            f"Received: costs={tuple(np.ravel(prices).tolist())} for {len(keys)} stages. "
            "Give what each stage costs."
        )
    return prices


@dataclass(frozen=True)
class Holdout:
    """A holdout as a search sees it: how sure each row is at each stage, and where it is right.

    Args:
        stages: The stages, without thresholds.
        measure: The name of the confidence.
        confidence: float32 `(rows, stages)`.
        is_right: Whether deciding a row at a stage is no mistake, `(rows, stages)`.

    Examples:
        >>> logits = np.float32([[[9, 0], [9, 0]], [[1, 0], [0, 9]]])
        >>> keys = [(None, 8), (None, 64)]
        >>> holdout = Holdout.measured(logits, np.array([0, 1]), keys, (1.0, 1.0), "margin")
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
        keys: Sequence[StageKey],
        temperatures: Sequence[float],
        measure: str,
    ) -> Holdout:
        """Return the holdout of checked logits `(rows, stages, num_classes)` and labels."""
        check_confidence(measure)
        confidence = [confidence_of(measure, scores[:, i], t) for i, t in enumerate(temperatures)]
        stages = tuple(
            Stage(dim, None, scale, exit_)
            for (exit_, dim), scale in zip(keys, temperatures, strict=True)
        )
        is_right = np.argmax(scores, axis=-1) == truth[:, None]
        return cls(stages, measure, np.stack(confidence, axis=1), is_right)

    @property
    def keys(self) -> tuple[StageKey, ...]:
        """The exit and the dim of each stage."""
        return tuple(stage.key for stage in self.stages)

    def rows(self, chosen: npt.NDArray[np.int64]) -> Holdout:
        """Return the holdout of some of the rows."""
        return replace(self, confidence=self.confidence[chosen], is_right=self.is_right[chosen])

    def _exits(self, policy: CascadePolicy) -> tuple[npt.NDArray[np.int64], Bools]:
        """Return the stage that decides each row, and where the policy's stages are right."""
        columns = [self.keys.index(key) for key in policy.keys]
        thresholds = [-np.inf if s.threshold is None else s.threshold for s in policy.stages]
        stops = self.confidence[:, columns] > np.array(thresholds, np.float32)
        return np.argmax(stops, axis=1), self.is_right[:, columns]

    def judged(self, policy: CascadePolicy) -> CascadePolicy:
        """Return the policy with its report on these rows."""
        return replace(policy, holdout=report_exits(policy.dims, *self._exits(policy)))

    def changes(self, policy: CascadePolicy) -> tuple[int, int]:
        """Return how many rows the last stage has right and the policy wrong, and the reverse."""
        stage_of, is_right = self._exits(policy)
        decided_right = is_right[np.arange(len(is_right)), stage_of]
        full_right = self.is_right[:, -1]
        return int((full_right & ~decided_right).sum()), int((~full_right & decided_right).sum())


def candidates(holdout: Holdout, costs: StageCosts, fill: bool = False) -> list[CascadePolicy]:
    """Return the policies worth comparing: the best for many prices of a mistake.

    Where a stage that is not asked is not paid for, policies that begin at a later one are searched
    by themselves. Of exits, sets of at most four stages are searched, each by itself.

    Args:
        holdout: The rows.
        costs: What each stage costs.
        fill: Whether to search policies between these, too: best for no price, but for a budget.

    Examples:
        >>> logits = np.float32([[[9, 0], [9, 0]], [[1, 0], [0, 9]]])
        >>> keys = [(None, 8), (None, 64)]
        >>> holdout = Holdout.measured(logits, np.array([0, 1]), keys, (1.0, 1.0), "margin")
        >>> costs = StageCosts.checked((8.0, 64.0), keys, cumulative=False)
        >>> sorted(policy.dims for policy in candidates(holdout, costs))
        [(8, 64), (8, 64), (64,)]
    """
    policies: dict[CascadePolicy, None] = {}  # in an order that every process has
    for columns in _sets_of_stages(holdout, costs):
        stages, ranked = _ranked(holdout, costs, columns)
        hull = search_cuts(ranked)
        for cuts in sorted(fill_front(ranked, hull) if fill else hull):
            policy = _policy_of(cuts, holdout.confidence[:, columns], stages, holdout.measure)
            policies[policy] = None
    return list(policies)


_FEW_PRICES = 16


def _sets_of_stages(holdout: Holdout, costs: StageCosts) -> list[list[int]]:
    """Return the sets of stages to search, as columns of the holdout, the last in all of them."""
    last = len(holdout.stages) - 1
    if not has_exits(holdout.keys):
        return [
            list(range(first, last + 1)) for first in range(last + 1 if costs.cumulative else 1)
        ]
    most = min(last, MOST_STAGES - 1)
    sizes = range(most + 1) if costs.skipping_pays else [most]
    sets = [[*early, last] for size in sizes for early in itertools.combinations(range(last), size)]
    if len(sets) <= _FEW_PRICES:
        return sets
    best: dict[float, tuple[float, int]] = {}
    for number, columns in enumerate(sets):
        _, ranked = _ranked(holdout, costs, columns)
        cuts = ranked.never()
        for price in prices(_FEW_PRICES, ranked.num_rows, costs.of_stages(holdout.keys).max()):
            cuts = ranked.descend(cuts, price)
            mistakes, cost, _ = ranked.weigh(cuts)
            loss = cost + price * mistakes
            best[price] = min(best.get(price, (loss, number)), (loss, number))
    return [sets[number] for number in sorted({number for _, number in best.values()})]


def _ranked(
    holdout: Holdout, costs: StageCosts, columns: list[int]
) -> tuple[tuple[Stage, ...], RankedRows]:
    stages = tuple(holdout.stages[column] for column in columns)
    stage_costs = costs.of_stages([stage.key for stage in stages])
    ranked = RankedRows(holdout.confidence[:, columns], holdout.is_right[:, columns], stage_costs)
    return stages, ranked


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
