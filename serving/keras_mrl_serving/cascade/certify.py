"""A cascade with a promise: how often it may be wrong where the full dim would be right.

The error that `certify_cascade` bounds is 0 or 1 for each row, so the number of errors is binomial
and its tail is exact: no other bound is needed.

Policies are tested in an order that the other half of the holdout fixed, until the first fails;
all before it hold together, without a correction for their number. Of policies with equally many
errors on that half the most expensive is tested first. Begun with the cheapest, whose errors are
few by luck, the tests often ended at once (91 dims instead of 77 for the same promise).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from operator import itemgetter

import numpy as np
import numpy.typing as npt

from ..contract import check_dims
from ..inputs import check_holdout
from .confidence import Floats, check_confidence, fit_temperatures
from .policy import CascadePolicy, Guarantee, Stage
from .search import DimCosts, Holdout, candidates, falling
from .thresholds import midway

_METHOD = "certified: searched on one half of the holdout, tested on the other"


def certify_cascade(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    dims: Sequence[int],
    risk: float = 0.01,
    delta: float = 0.05,
    costs: npt.ArrayLike | None = None,
    cumulative: bool = False,
    confidence: str = "max_probability",
    seed: int = 0,
) -> CascadePolicy:
    """Return the cheapest policy found that keeps a promise, with the promise in it.

    The promise: with probability at least 1 - delta over the draw of the holdout, a new row of the
    same kind has a chance of at most `risk` that the full dim is right and the cascade wrong. It
    holds whatever the model is and however its confidences are distributed.

    One half of the holdout, drawn at random, fits a temperature per dim and searches policies. On
    the other half they are tested in turn, the safest first, until one fails; the cheapest that
    passed is returned. Where none passes that is the full dim alone, which keeps any such promise.

    Args:
        logits: What `predict` of the nested model returns for the holdout.
        labels: Class ids of the holdout, from 0. It must share no row with the training data.
        dims: The dims of the head.
        risk: The chance promised, between 0 and 1.
        delta: How often the promise may fail, between 0 and 1.
        costs: As in `search_cascades`.
        cumulative: As in `search_cascades`.
        confidence: How sure a row is, as in `CascadePolicy`.
        seed: Seed of the halves.

    Shapes:
        logits: `(rows, num_dims, num_classes)`. labels: `(rows,)`.

    Formula:
        k errors in n rows pass if P(Binomial(n, risk) <= k) <= delta; tested in a fixed sequence,
        all that pass before the first failure hold together

    Raises:
        ValueError: If the holdout is too small for the promise (the message says how many rows
            would do), `risk` or `delta` is none, or as `search_cascades`.

    Reference:
        Angelopoulos et al., Learn then Test, arXiv 2110.01052.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> labels = rng.integers(0, 3, 1000)
        >>> noise = np.array([1.0, 0.5])[None, :, None] * rng.normal(size=(1000, 2, 3))
        >>> scores = 3 * np.eye(3)[labels][:, None] + noise
        >>> policy = certify_cascade(scores, labels, (8, 64), risk=0.02)
        >>> policy.guarantee.risk, policy.guarantee.size, policy.holdout.expected_dim < 64
        (0.02, 500, True)
    """
    dims = check_dims(dims)
    scores, truth = check_holdout(logits, labels, len(dims))
    dim_costs = DimCosts.checked(dims if costs is None else costs, dims, cumulative)
    check_confidence(confidence)
    _check_promise(risk, delta, len(truth))
    order = np.random.default_rng(seed).permutation(len(truth))
    searched, tested = order[: len(order) // 2], order[len(order) // 2 :]
    scales = fit_temperatures(scores[searched], truth[searched])
    holdout = Holdout.measured(scores, truth, dims, scales, confidence)
    tested_half = holdout.rows(tested)
    best = holdout.judged(CascadePolicy((Stage(dims[-1], None, scales[-1]),), confidence))
    errors, least_cost = 0, dim_costs.mean(best)
    for policy in _safest_first(holdout.rows(searched), dim_costs):
        wrong = tested_half.num_harmed(policy)
        if chance_of_so_few(wrong, len(tested), risk) > delta:
            if len(best.stages) == 1:
                _warn_that_none_passed(wrong, len(tested), risk, delta)
            break
        # The cost is that on the searched half: the promise is about errors alone.
        cost = dim_costs.mean(policy)
        if cost < least_cost:
            best, errors, least_cost = policy, wrong, cost
    guarantee = Guarantee(float(risk), float(delta), len(tested), errors)
    return replace(holdout.judged(best), method=_METHOD, guarantee=guarantee)


def _check_promise(risk: float, delta: float, num_rows: int) -> None:
    for name, value in (("risk", risk), ("delta", delta)):
        if not isinstance(value, Real) or not 0 < value < 1:
            raise ValueError(
                f"{name} must lie between 0 and 1, both excluded. "
                f"Received: {name}={value!r}. Give for example 0.01."
            )
    tested, needed = num_rows - num_rows // 2, least_rows(risk, delta)
    if tested < needed:
        raise ValueError(
            f"To promise a risk of {risk} with delta={delta}, the half of the holdout that tests "
            f"must hold {needed} rows even if none is an error. "
            f"Received: {tested} of {num_rows} rows. "
            f"Give {2 * needed} rows or more, or promise less."
        )


def _warn_that_none_passed(wrong: int, tested: int, risk: float, delta: float) -> None:
    needed = rows_for(wrong / tested, risk, delta)
    remedy = f"Give about {2 * needed} rows, or promise less" if needed else "Promise less"
    warnings.warn(
        f"To promise a risk of {risk} with delta={delta}, the safest cascade must err on few of "
        f"the rows that test it. Received: {wrong} errors on {tested} rows, too many: the full dim "
        f"alone is returned. {remedy}.",
        stacklevel=3,
    )


_SHARES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)


def _safest_first(holdout: Holdout, costs: DimCosts) -> list[CascadePolicy]:
    """Return policies in the order they are tested: from the safest to the cheapest."""
    # A row that the full dim has wrong, too, may be decided anywhere.
    harmless = replace(holdout, is_right=holdout.is_right | ~holdout.is_right[:, -1:])
    policies = candidates(harmless, costs)
    dims = [stage.dim for stage in holdout.stages]
    ascending = dict(zip(dims, np.sort(holdout.confidence, axis=0).T, strict=True))
    policies += [_stricter(policy, ascending, share) for policy in policies for share in _SHARES]
    judged = map(holdout.judged, policies)
    measured = [(holdout.num_harmed(policy), costs.mean(policy), policy) for policy in judged]
    in_order = sorted(measured, key=lambda one: (one[0], -one[1]))
    return [policy for *_, policy in falling(in_order, itemgetter(1))]


def _stricter(policy: CascadePolicy, ascending: dict[int, Floats], share: float) -> CascadePolicy:
    """Return the policy that accepts at each stage the surest `share` of this policy's rows."""
    stages = []
    for stage in policy.stages[:-1]:
        confidences = ascending[stage.dim]
        num_accepted = int((confidences > np.float32(stage.threshold)).sum())
        threshold = midway(confidences, len(confidences) - int(share * num_accepted))
        stages.append(replace(stage, threshold=threshold))
    return replace(policy, stages=(*stages, policy.stages[-1]))


def chance_of_so_few(errors: int, size: int, risk: float) -> float:
    """Return the chance of at most so many errors in `size` rows if each were one with `risk`.

    It is the p-value of "the risk is larger": a binomial tail, exact for losses of 0 and 1.

    Examples:
        >>> round(chance_of_so_few(0, 299, 0.01), 4)
        0.0495
        >>> chance_of_so_few(3, 3, 0.5)
        1.0
    """
    k = np.arange(errors + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, size + 1)))])
    log_ways = log_factorial[size] - log_factorial[k] - log_factorial[size - k]
    log_terms = log_ways + k * math.log(risk) + (size - k) * math.log1p(-risk)
    largest = log_terms.max()
    return float(min(1.0, math.exp(largest) * np.exp(log_terms - largest).sum()))


def least_rows(risk: float, delta: float) -> int:
    """Return how many rows without an error it takes to promise anything.

    Examples:
        >>> least_rows(risk=0.01, delta=0.05)
        299
    """
    return math.ceil(math.log(delta) / math.log1p(-risk))


_MOST_ROWS = 1_000_000


def rows_for(rate: float, risk: float, delta: float) -> int | None:
    """Return about how many rows it takes to promise `risk` where a share `rate` are errors.

    Args:
        rate: The share of errors to expect.
        risk: As in `Guarantee`.
        delta: As in `Guarantee`.

    Returns:
        None where errors are as frequent as the risk, or nearly: no number would do.

    Examples:
        >>> rows_for(0.0, risk=0.01, delta=0.05), rows_for(0.005, risk=0.01, delta=0.05)
        (299, 1326)
        >>> rows_for(0.02, risk=0.01, delta=0.05)
    """
    rows = least_rows(risk, delta)
    while rows < _MOST_ROWS and rate < risk:
        if chance_of_so_few(math.ceil(rate * rows), rows, risk) <= delta:
            return rows
        rows += rows // 20 + 1
    return None
