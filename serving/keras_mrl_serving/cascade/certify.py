"""A cascade with a promise: how often the full dim would have been right and the cascade is not."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from ..contract import check_dims
from ..inputs import check_holdout
from .confidence import check_confidence, fit_temperatures, midway
from .policy import CascadePolicy, Guarantee, Stage, chance_of_so_few, judge, least_rows, rows_for
from .search import candidates, check_costs, confidences, mean_cost

_SHARES = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
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
    same kind is with a chance of at most `risk` one that the full dim has right and the cascade
    wrong. Whatever the model is and however its confidences are distributed.

    One half of the holdout, drawn at random, fits a temperature per dim and searches policies. On
    the other half they are tested in turn, the safest first, until one fails; the last that passed
    is returned. Where none passes that is the full dim alone, which keeps any such promise.

    Args:
        logits: What `predict` of the nested model returns for the holdout.
        labels: Class ids of the holdout, from 0. It must share no row with the training data.
        dims: The dims of the head.
        risk: The chance promised, between 0 and 1.
        delta: How often the promise may fail, between 0 and 1.
        costs: As in `search_cascades`.
        cumulative: As in `search_cascades`.
        confidence: How sure a row is, as in `CascadePolicy`.
        seed: Of the halves.

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
    prices = check_costs(dims if costs is None else costs, len(dims))
    check_confidence(confidence)
    _check_promise(risk, delta, len(truth))
    order = np.random.default_rng(seed).permutation(len(truth))
    searched, tested = order[: len(order) // 2], order[len(order) // 2 :]
    by_dim = dict(zip(dims, prices.tolist(), strict=True))
    found = _searched(scores[searched], truth[searched], dims, prices, cumulative, confidence)
    best = CascadePolicy((Stage(dims[-1], None, found[-1].stages[-1].temperature),), confidence)
    errors, least = 0, mean_cost(_judged(best, scores, truth, dims), by_dim, cumulative)
    for policy in found:
        wrong = int(_harmed(policy, scores[tested], truth[tested], dims).sum())
        if chance_of_so_few(wrong, len(tested), risk) > delta:
            if len(best.stages) == 1:
                _warn_that_none_passed(wrong, len(tested), risk, delta)
            break
        # Cost is counted where the search was: the promise is about errors alone.
        cost = mean_cost(policy, by_dim, cumulative)
        if cost < least:
            best, errors, least = policy, wrong, cost
    promise = Guarantee(float(risk), float(delta), len(tested), errors)
    return replace(_judged(best, scores, truth, dims), method=_METHOD, guarantee=promise)


def _check_promise(risk: float, delta: float, rows: int) -> None:
    for name, value in (("risk", risk), ("delta", delta)):
        if not isinstance(value, Real) or not 0 < value < 1:
            raise ValueError(
                f"{name} must lie between 0 and 1, both excluded. "
                f"Received: {name}={value!r}. Give for example 0.01."
            )
    tested, needed = rows - rows // 2, least_rows(risk, delta)
    if tested < needed:
        raise ValueError(
            f"To promise a risk of {risk} with delta={delta}, the half of the holdout that tests "
            f"must hold {needed} rows even if none is an error. Received: {tested} of {rows} rows. "
            f"Give {2 * needed} rows or more, or promise less."
        )


def _warn_that_none_passed(wrong: int, tested: int, risk: float, delta: float) -> None:
    needed = rows_for(wrong / tested, risk, delta)
    enough = f"Give about {2 * needed} rows, or promise less" if needed else "Promise less"
    warnings.warn(
        f"To promise a risk of {risk} with delta={delta}, the safest cascade must err on few of "
        f"the rows that test it. Received: {wrong} errors on {tested} rows, too many: the full dim "
        f"alone is returned. {enough}.",
        stacklevel=3,
    )


def _searched(
    scores: Any, truth: Any, dims: tuple[int, ...], prices: Any, cumulative: bool, measure: str
) -> list[CascadePolicy]:
    """Policies in the order they are tested: from the safest to the cheapest."""
    scales = fit_temperatures(scores, truth)
    right = np.argmax(scores, axis=-1) == truth[:, None]
    harmless = right | ~right[:, -1:]
    stages = tuple(map(Stage, dims, [None] * len(dims), scales))
    sure = confidences(measure, scores, scales)
    by_dim = dict(zip(dims, prices.tolist(), strict=True))
    found = candidates(sure, harmless, prices, stages, measure, cumulative)
    columns = {dim: sure[:, at] for at, dim in enumerate(dims)}
    found += [_stricter(policy, columns, share) for policy in found for share in _SHARES]
    judged = [
        (int(_harmed(p, scores, truth, dims).sum()), mean_cost(p, by_dim, cumulative), p)
        for p in (_judged(policy, scores, truth, dims) for policy in found)
    ]
    # Of those as harmless here the dearest first: the cheapest is so by luck, and the first to
    # fail ends the tests.
    kept: list[tuple[int, float, CascadePolicy]] = []
    for harm, cost, policy in sorted(judged, key=lambda one: (one[0], -one[1])):
        if not kept or cost < kept[-1][1]:
            kept.append((harm, cost, policy))
    return [policy for *_, policy in kept]


def _stricter(policy: CascadePolicy, columns: dict[int, Any], share: float) -> CascadePolicy:
    """The policy that accepts at each stage the surest of the rows which this one accepts."""
    stages = []
    for stage in policy.stages[:-1]:
        ascending = np.sort(columns[stage.dim])
        accepted = int((ascending > np.float32(stage.threshold)).sum())
        threshold = midway(ascending, len(ascending) - int(share * accepted))
        stages.append(replace(stage, threshold=threshold))
    return replace(policy, stages=(*stages, policy.stages[-1]))


def _judged(policy: CascadePolicy, scores: Any, truth: Any, dims: tuple[int, ...]) -> CascadePolicy:
    return replace(policy, holdout=judge(policy, _columns(policy, scores, dims), truth))


def _harmed(policy: CascadePolicy, scores: Any, truth: Any, dims: tuple[int, ...]) -> Any:
    """Which rows the full dim has right and the policy wrong."""
    class_ids, _ = policy.route(_columns(policy, scores, dims))
    return (np.argmax(scores[:, -1], axis=-1) == truth) & (class_ids != truth)


def _columns(policy: CascadePolicy, scores: Any, dims: tuple[int, ...]) -> Any:
    return scores[:, [dims.index(dim) for dim in policy.dims]]
