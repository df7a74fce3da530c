"""A cascade with a promise: how often it may be wrong where the last stage would be right.

Two risks can be bounded. `harm` counts the rows that the last stage has right and the cascade
wrong. `accuracy_drop` subtracts the rows that the cascade has right and the last stage wrong: it is
the loss of accuracy. `bounds` holds the test of each.

Policies are tested in an order that the other half of the holdout fixed, until the first fails;
all before it hold together, without a correction for their number. Those that change few rows come
first: a policy that gains many rows on the half that it was searched on may do so by luck, and as
the first in the order it would end the tests. Of policies with equally many
errors on that half the most expensive is tested first. Begun with the cheapest, whose errors are
few by luck, the tests often ended at once (91 dims instead of 77 for the same promise).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from .bounds import chance_of_so_few, chance_of_such_a_drop, least_rows, rows_for
from .confidence import Floats, fit_temperatures
from .cuts import falling
from .policy import ACCURACY_DROP, HARM, CascadePolicy, Guarantee, choose_confidence
from .search import Costs, Holdout, StageCosts, candidates
from .stages import Logits, StageKey, labelled_stages
from .thresholds import midway

_METHOD = "certified: searched on one half of the holdout, tested on the other"


def certify_cascade(
    logits: Logits,
    labels: npt.ArrayLike,
    dims: Sequence[int] | None = None,
    risk: str | float = HARM,
    delta: float = 0.05,
    costs: Costs | None = None,
    cumulative: bool = False,
    confidence: str | None = None,
    seed: int = 0,
    *,
    alpha: float = 0.01,
) -> CascadePolicy:
    """Return the cheapest policy found that keeps a promise, with the promise in it.

    The promise, with probability at least 1 - delta over the draw of the holdout, for new rows of
    the same kind: of `harm`, a row has a chance of at most `alpha` that the last stage is right and
    the cascade wrong; of `accuracy_drop`, the cascade's accuracy is at most `alpha` below the last
    stage's. It holds whatever the model is and however its confidences are distributed.

    One half of the holdout, drawn at random, fits a temperature per stage and searches policies. On
    the other half they are tested in turn, the safest first, until one fails; the cheapest that
    passed is returned. Where none passes that is the last stage alone, which keeps any such
    promise.

    Args:
        logits: As in `search_cascades`.
        labels: Class ids of the holdout, from 0. It must share no row with the training data.
        dims: The dims of the head; left out where logits are by stage.
        risk: "harm" or "accuracy_drop". A number means harm of at most so much, as `alpha` does.
        delta: How often the promise may fail, between 0 and 1.
        costs: As in `search_cascades`.
        cumulative: As in `search_cascades`.
        confidence: How sure a row is, as in `CascadePolicy`.
        seed: Seed of the halves.
        alpha: What is promised to be at most so much, between 0 and 1: 0.01 is one point.

    Shapes:
        logits: As in `search_cascades`. labels: `(rows,)`.

    Formula:
        of harm, k errors in n rows pass if P(Binomial(n, alpha) <= k) <= delta; of accuracy_drop,
        by `chance_of_such_a_drop`; tested in a fixed sequence, all that pass before the first
        failure hold together

    Raises:
        ValueError: If the holdout is too small for the promise (the message says how many rows
            would do), `risk`, `alpha` or `delta` is none, or as `search_cascades`.

    Reference:
        Angelopoulos et al., Learn then Test, arXiv 2110.01052; Jazbec et al., Fast yet Safe,
        arXiv 2405.20915, for exits.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> labels = rng.integers(0, 3, 1000)
        >>> noise = np.array([1.0, 0.5])[None, :, None] * rng.normal(size=(1000, 2, 3))
        >>> scores = 3 * np.eye(3)[labels][:, None] + noise
        >>> policy = certify_cascade(scores, labels, (8, 64), risk="harm", alpha=0.02)
        >>> policy.guarantee.risk, policy.guarantee.size, policy.holdout.expected_dim < 64
        (0.02, 500, True)
        >>> policy = certify_cascade(scores, labels, (8, 64), risk="accuracy_drop", alpha=0.02)
        >>> policy.guarantee.kind, policy.holdout.expected_dim < 64
        ('accuracy_drop', True)
    """
    scores, truth, keys = labelled_stages(logits, labels, dims)
    stage_costs = StageCosts.checked(costs, keys, cumulative)
    measure = choose_confidence(confidence, keys)
    promise = _Promise.checked(risk, alpha, delta, len(truth))
    order = np.random.default_rng(seed).permutation(len(truth))
    searched, tested = order[: len(order) // 2], order[len(order) // 2 :]
    scales = fit_temperatures(scores[searched], truth[searched])
    holdout = Holdout.measured(scores, truth, keys, scales, measure)
    tested_half = holdout.rows(tested)
    best = holdout.judged(CascadePolicy((holdout.stages[-1],), measure))
    counts, least_cost = (0, 0), stage_costs.mean(best)
    for policy in _safest_first(holdout.rows(searched), stage_costs, promise):
        errors, gains = promise.counted(tested_half.changes(policy))
        if not promise.is_kept(errors, gains, len(tested)):
            if len(best.stages) == 1:
                _warn_that_none_passed(promise, errors, gains, len(tested))
            break
        # The cost is that on the searched half: the promise is about errors alone.
        cost = stage_costs.mean(policy)
        if cost < least_cost:
            best, counts, least_cost = policy, (errors, gains), cost
    guarantee = Guarantee(promise.alpha, promise.delta, len(tested), *counts, promise.kind)
    return replace(holdout.judged(best), method=_METHOD, guarantee=guarantee)


@dataclass(frozen=True)
class _Promise:
    """What is to be promised."""

    kind: str
    alpha: float
    delta: float

    @classmethod
    def checked(cls, risk: Any, alpha: Any, delta: Any, num_rows: int) -> _Promise:
        number = "alpha"
        if not isinstance(risk, str):  # the spelling of before there were two risks
            number, alpha, risk = "risk", risk, HARM
        if risk not in (HARM, ACCURACY_DROP):
            raise ValueError(
                f"risk must be {HARM!r} or {ACCURACY_DROP!r}. "
                f"Received: risk={risk!r}. Choose one, and give alpha=0.01 for one point."
            )
        limits: list[tuple[str, Any]] = [(number, alpha), ("delta", delta)]
        for name, value in limits:
            if not isinstance(value, Real) or not 0 < float(value) < 1:
                raise ValueError(
                    f"{name} must lie between 0 and 1, both excluded. "
                    f"Received: {name}={value!r}. Give for example 0.01."
                )
        promise = cls(risk, float(alpha), float(delta))
        tested = num_rows - num_rows // 2
        needed = promise.rows_for(0, 0)
        if needed is None or tested < needed:
            rows = needed or math.inf
            raise ValueError(
                f"To promise {promise}, the half of the holdout that tests must hold {rows} rows "
                f"even if none is an error. Received: {tested} of {num_rows} rows. "
                f"Give {2 * rows} rows or more, or promise less."
            )
        return promise

    def __str__(self) -> str:
        risk = "a risk" if self.kind == HARM else "a drop of accuracy"
        return f"{risk} of {self.alpha} with delta={self.delta}"

    def counted(self, changes: tuple[int, int]) -> tuple[int, int]:
        """Return the errors and the gains that count."""
        return (changes[0], 0) if self.kind == HARM else changes

    def is_kept(self, errors: int, gains: int, size: int) -> bool:
        """Whether so many errors and gains in `size` rows show that the promise is kept."""
        if self.kind == HARM:
            return chance_of_so_few(errors, size, self.alpha) <= self.delta
        slack = self.delta / 100
        return chance_of_such_a_drop(errors, gains, size, self.alpha, slack) <= self.delta

    def rows_for(self, error_rate: float, gain_rate: float) -> int | None:
        """Return about how many rows show it; None where no number would."""
        least = least_rows(self.alpha, self.delta)
        if self.kind == HARM and not error_rate:
            return least
        if error_rate - gain_rate >= self.alpha:
            return None

        def passes(rows: int) -> bool:
            return self.is_kept(math.ceil(error_rate * rows), math.floor(gain_rate * rows), rows)

        return rows_for(passes, least)


def _warn_that_none_passed(promise: _Promise, errors: int, gains: int, tested: int) -> None:
    needed = promise.rows_for(errors / tested, gains / tested)
    remedy = f"Give about {2 * needed} rows, or promise less" if needed else "Promise less"
    less = f", less {gains} that only the cascade has right" if gains else ""
    warnings.warn(
        f"To promise {promise}, the safest cascade must err on few of "
        f"the rows that test it. Received: {errors} errors on {tested} rows{less}, too many: "
        f"the last stage alone is returned. {remedy}.",
        stacklevel=3,
    )


_SAFETY = 3.0  # standard deviations: gains that the search found may be luck
_SHARES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)


def _safest_first(holdout: Holdout, costs: StageCosts, promise: _Promise) -> list[CascadePolicy]:
    """Return policies in the order they are tested: from the safest to the cheapest."""
    searched = holdout
    if promise.kind == HARM:  # a row that the last stage has wrong, too, may be decided anywhere
        searched = replace(holdout, is_right=holdout.is_right | ~holdout.is_right[:, -1:])
    policies = candidates(searched, costs)
    ascending = dict(zip(holdout.keys, np.sort(holdout.confidence, axis=0).T, strict=True))
    policies += [_stricter(policy, ascending, share) for policy in policies for share in _SHARES]
    judged = map(holdout.judged, policies)
    measured = []
    for policy in judged:
        errors, gains = promise.counted(holdout.changes(policy))
        likely_worst = errors - gains + _SAFETY * math.sqrt(errors + gains)
        measured.append((likely_worst, costs.mean(policy), policy))
    in_order = sorted(measured, key=lambda one: (one[0], -one[1]))
    return [policy for *_, policy in falling(in_order, itemgetter(1))]


def _stricter(
    policy: CascadePolicy, ascending: dict[StageKey, Floats], share: float
) -> CascadePolicy:
    """Return the policy that accepts at each stage the surest `share` of this policy's rows."""
    stages = []
    for stage in policy.stages[:-1]:
        confidences = ascending[stage.key]
        num_accepted = int((confidences > np.float32(stage.threshold)).sum())
        threshold = midway(confidences, len(confidences) - int(share * num_accepted))
        stages.append(replace(stage, threshold=threshold))
    return replace(policy, stages=(*stages, policy.stages[-1]))
