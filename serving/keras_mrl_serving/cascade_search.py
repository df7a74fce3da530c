"""Cascades searched as a whole: for each cost the most accurate that was found on a holdout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .cascade import CascadePolicy, Stage, max_probability, midway
from .contract import check_dims
from .inputs import check_holdout

_PRICES = 60
_LOWEST_PRICE = 1e-3  # of a wrong answer, in rows that are decided at the last dim
_SWEEPS = 20
_METHOD = "joint search: thresholds in turns, for many prices of a wrong answer"

Floats = npt.NDArray[np.float64]


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
        if not share >= 0:
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
            ValueError: If none is as cheap.
        """
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
) -> CascadeFront:
    """Search the thresholds of all dims together, for every price of a wrong answer.

    The paper's procedure (`CascadePolicy.learn`) looks at each pair of dims alone, and accepts at
    the first only where that costs no row of the holdout. Here the thresholds are moved in turns,
    each to its best place given the others, until none moves; the paper's policy is among those
    compared, so that none of the front is worse than it at its cost.

    Args:
        logits: What `predict` of the nested model returns for the holdout.
        labels: Class ids of the holdout, from 0. It must share no row with the training data nor
            with the data the cascade is judged on.
        dims: The dims of the head.
        costs: What a row costs that is decided at each dim, increasing: multiply-adds, or measured
            milliseconds. None means the dims themselves, so that the cost is the expected dim. A
            dim costs the same whichever dims are asked before it: where asking is what costs,
            search from several first dims on, and compare `policy.holdout.cumulative_dim`.

    Shapes:
        logits: `(rows, num_dims, num_classes)`. labels: `(rows,)`.

    Returns:
        The front, from the cheapest policy to the most accurate.

    Raises:
        ValueError: If shapes do not fit, rows are none, probabilities were given, or the costs do
            not increase.

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
    prices = _check_costs(dims if costs is None else costs, len(dims))
    confidence = max_probability(scores)
    right = np.argmax(scores, axis=-1) == truth[:, None]
    holdout = _Holdout(confidence, right, prices)
    found = {holdout.never()}
    start = holdout.never()
    # From mistakes that cost next to nothing to one that outweighs all rows, each search from where
    # the last one ended and from the start.
    for price in np.geomspace(_LOWEST_PRICE, 2 * len(truth), _PRICES):
        start = holdout.descend(start, price * prices[-1])
        found |= {start, holdout.descend(holdout.never(), price * prices[-1])}
    policies = [_policy(confidence, cut, dims) for cut in found]
    policies.append(CascadePolicy.learn(scores, truth, dims))
    columns = {dim: at for at, dim in enumerate(dims)}
    judged = [
        replace(p, holdout=p.evaluate(scores[:, [columns[dim] for dim in p.dims]], truth))
        for p in policies
    ]
    return _front(judged, dict(zip(dims, prices.tolist(), strict=True)))


def _check_costs(costs: npt.ArrayLike, stages: int) -> Floats:
    checked = np.asarray(costs, dtype=np.float64)
    if checked.shape != (stages,) or not (np.diff(checked, prepend=0) > 0).all():
        raise ValueError(
            "costs must be one positive number per dim, increasing. "
            f"Received: costs={tuple(np.ravel(checked).tolist())} for {stages} dims. "
            "Give what a row costs that is decided at each dim."
        )
    return checked


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

    def never(self) -> tuple[int, ...]:
        """The cuts that accept no row before the last stage."""
        return (len(self._rank),) * (self._rank.shape[1] - 1)

    def descend(self, cuts: tuple[int, ...], price: float) -> tuple[int, ...]:
        """Move the cuts in turns until none makes `cost + price * wrong` smaller."""
        losses = self._costs + price * self._wrong
        for _ in range(_SWEEPS):
            before = cuts
            for stage in reversed(range(len(cuts))):
                cuts = (*cuts[:stage], self._best(cuts, stage, losses), *cuts[stage + 1 :])
            if cuts == before:
                break
        return cuts

    def _best(self, cuts: tuple[int, ...], stage: int, losses: Floats) -> int:
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


def _policy(confidence: Any, cuts: tuple[int, ...], dims: tuple[int, ...]) -> CascadePolicy:
    """The policy of some cuts, without the stages that accept no row."""
    stages = [
        Stage(dim, midway(np.sort(confidence[:, at]), cut))
        for at, (dim, cut) in enumerate(zip(dims, cuts, strict=False))
        if cut < len(confidence)
    ]
    return CascadePolicy((*stages, Stage(dims[-1], None)), method=_METHOD)


def _front(policies: Sequence[CascadePolicy], costs: dict[int, float]) -> CascadeFront:
    """Of policies that know their holdout, those of which none is cheaper and as accurate."""
    judged = []
    for policy in policies:
        report = policy.holdout
        if report is not None:
            prices = [costs[dim] for dim in policy.dims]
            judged.append((float(np.dot(report.exit_fractions, prices)), report.accuracy, policy))
    kept: list[tuple[float, float, CascadePolicy]] = []
    for cost, accuracy, policy in sorted(judged, key=lambda one: (one[0], -one[1])):
        if not kept or accuracy > kept[-1][1]:
            kept.append((cost, accuracy, policy))
    return CascadeFront(tuple(p for *_, p in kept), tuple(c for c, *_ in kept))
