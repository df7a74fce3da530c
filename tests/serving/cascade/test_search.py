"""The search beside every threshold there is and beside the paper's procedure."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_mrl_serving import CascadeFront, CascadePolicy, search_cascades
from keras_mrl_serving.cascade.confidence import max_probability
from keras_mrl_serving.cascade.cuts import RankedRows
from keras_mrl_serving.cascade.policy import Stage
from tests.helpers.galleries import Refuses
from tests.helpers.holdouts import DIMS, holdouts, noisy_holdout

FEWER = settings(max_examples=100)  # each is a whole search


def cost_of(policy: CascadePolicy, costs: Any) -> float:
    assert policy.holdout is not None
    by_dim = dict(zip(DIMS, costs, strict=False))
    return float(np.dot(policy.holdout.exit_fractions, [by_dim[dim] for dim in policy.dims]))


@FEWER
@given(holdouts(), st.booleans())
def test_the_front_is_never_worse_than_the_papers_policy_at_its_cost(
    holdout: Any, cumulative: bool
) -> None:
    logits, labels = holdout
    dims = DIMS[: logits.shape[1]]
    costs = np.cumsum(dims) if cumulative else np.asarray(dims)
    front = search_cascades(logits, labels, dims, cumulative=cumulative)
    paper = CascadePolicy.learn(logits, labels, dims)
    cost = cost_of(paper, costs)
    best = front.best_under(cost + 1e-9)
    assert best.holdout is not None
    assert paper.holdout is not None
    assert best.holdout.accuracy >= paper.holdout.accuracy


@FEWER
@given(holdouts())
def test_a_front_rises_and_says_what_it_costs(holdout: Any) -> None:
    logits, labels = holdout
    dims = DIMS[: logits.shape[1]]
    front = search_cascades(logits, labels, dims)
    accuracies = [p.holdout.accuracy for p in front.policies if p.holdout]
    assert len(accuracies) == len(front.policies)
    assert accuracies == sorted(set(accuracies))
    assert list(front.costs) == sorted(set(front.costs))
    for policy, cost in zip(front.policies, front.costs, strict=True):
        assert policy.holdout is not None
        assert cost == pytest.approx(policy.holdout.expected_dim)
        columns = [dims.index(dim) for dim in policy.dims]
        assert policy.evaluate(logits[:, columns], labels) == policy.holdout
    full = float(np.mean(logits[:, -1].argmax(-1) == labels))
    assert accuracies[-1] >= full


@FEWER
@given(holdouts())
def test_of_two_stages_the_best_for_every_price_is_found(holdout: Any) -> None:
    """Every point of the lower hull of all thresholds is on the front."""
    logits, labels = holdout
    if logits.shape[1] < 2:
        return
    logits, dims = logits[:, :2], DIMS[:2]
    front = search_cascades(logits, labels, dims)
    confidences = np.unique(max_probability(logits[:, 0])).tolist()
    every = [
        CascadePolicy((Stage(dims[0], threshold), Stage(dims[1], None))).evaluate(logits, labels)
        for threshold in (-1.0, *confidences)
    ]
    of_front = [policy.holdout for policy in front.policies if policy.holdout]
    for price in (1e-3, 0.02, 0.3, 5.0):
        price *= dims[1]
        least, least_of_front = (
            min(report.expected_dim - price * report.accuracy for report in reports)
            for reports in (every, of_front)
        )
        assert least_of_front <= least + 0.2 * price / len(labels) + 1e-6


NOISE = (0.8, 0.5, 0.35)  # each dim is less noisy than the one before


def test_targets_on_rows_that_were_not_searched() -> None:
    logits, labels = noisy_holdout(0, 20_000, NOISE)
    front = search_cascades(logits[:10_000], labels[:10_000], DIMS[:3])
    for share in (0.005, 0.05):
        policy = front.cheapest_within(share)
        columns = [DIMS.index(dim) for dim in policy.dims]
        fresh = policy.evaluate(logits[10_000:, columns], labels[10_000:])
        assert fresh.accuracy > fresh.full_accuracy - share - 0.015
        assert fresh.expected_dim < 0.75 * DIMS[2]
    assert front.cheapest_within(0.05).holdout != front.cheapest_within(0.005).holdout
    under = front.best_under(30)
    assert under.holdout is not None
    assert under.holdout.expected_dim <= 30
    cheaper = [p for p, c in zip(front.policies, front.costs, strict=True) if c <= 30]
    assert under is cheaper[-1]


def test_a_stage_that_is_dearer_and_no_better_is_left_out() -> None:
    logits, labels = noisy_holdout(0, 500, NOISE)
    logits[:, 1] = logits[:, 2]
    front = search_cascades(logits, labels, DIMS[:3], costs=(1, 1001, 1000))
    several = {p.dims for p, cost in zip(front.policies, front.costs, strict=True) if cost > 1}
    assert several == {(DIMS[0], DIMS[2])}


def test_where_every_dim_asked_is_paid_for_some_are_not_asked() -> None:
    """Each policy's cost is that of its own stages, and those that begin higher are searched."""
    logits, labels = noisy_holdout(0, 1000, NOISE)
    front = search_cascades(logits, labels, DIMS[:3], cumulative=True)
    assert len({policy.dims[0] for policy in front.policies}) > 1
    for policy, cost in zip(front.policies, front.costs, strict=True):
        assert policy.holdout is not None
        assert cost == pytest.approx(policy.holdout.cumulative_dim)


@pytest.mark.parametrize("seed", range(3))
def test_of_two_dims_no_threshold_is_better_within_a_budget(seed: int) -> None:
    """The best for a budget need not be the best for any price of a mistake."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, 1000)
    logits = rng.normal(size=(1000, 2, 3))
    logits[:, 0] *= 0.5 + rng.random((1000, 1))
    logits[np.arange(1000), 0, labels] += rng.choice([0.0, 1.0, 2.0], 1000)
    logits[np.arange(1000), 1, labels] += 2
    dims = (8, 128)
    front = search_cascades(logits, labels, dims)
    weights = np.exp(logits[:, 0] - logits[:, 0].max(-1, keepdims=True))
    order = np.argsort(-(1 / weights.sum(-1)))
    right = (np.argmax(logits, axis=-1) == labels[:, None])[order]
    accepted = np.arange(1001)
    accuracy = (
        np.append(0, np.cumsum(right[:, 0])) + np.append(np.cumsum(right[::-1, 1])[::-1], 0)
    ) / 1000
    cost = (8 * accepted + 128 * (1000 - accepted)) / 1000
    for budget in (20, 32, 48, 64, 96):
        policy = front.best_under(budget)
        assert policy.holdout is not None
        # A step of cost is 200th of the way from 8 to 128.
        assert policy.holdout.accuracy >= accuracy[cost <= budget - 0.6].max() - 1e-9
    for share in (0.0, 0.01, 0.05):
        policy = front.cheapest_within(share)
        assert policy.holdout is not None
        enough = cost[accuracy >= accuracy[0] - share - 1e-12]
        assert policy.holdout.expected_dim <= enough.min() + 0.6


def test_no_cut_parts_rows_that_tie() -> None:
    confidence = np.array([[0.5, 1], [0.2, 1], [0.5, 1], [0.9, 1]], np.float32)
    rows = RankedRows(confidence, np.ones((4, 2), bool), np.array([1.0, 8.0]))
    costs, _ = rows.sweep(rows.never(), 0)
    assert costs.tolist() == [4.0, 11.0, np.inf, 25.0, 32.0]


def test_costs_need_not_rise() -> None:
    """Measured ones may not: the head of a dim is the same to a clock, the backbone comes first."""
    logits, labels = noisy_holdout(0, 300, NOISE)
    for costs, cumulative in (((1.57, 1.56, 1.57), False), ((50.0, 0.1, 0.4), True)):
        front = search_cascades(logits, labels, DIMS[:3], costs, cumulative=cumulative)
        for policy, cost in zip(front.policies, front.costs, strict=True):
            assert policy.holdout is not None
            paid = [costs[DIMS.index(dim)] for dim in policy.dims]
            paid = np.cumsum(paid).tolist() if cumulative else paid
            assert cost == pytest.approx(np.dot(policy.holdout.exit_fractions, paid))


def test_sure_logits_of_some_dims_are_no_probabilities() -> None:
    """A part of what was given whole is not looked at again."""
    labels = np.array([0, 1] * 20)
    logits = np.stack([np.eye(2)[labels], 9 * np.eye(2)[labels] - 4], axis=1)
    assert search_cascades(logits, labels, (8, 64)).policies[0].dims[0] == 8


def test_one_dim_is_its_own_cascade() -> None:
    logits, labels = noisy_holdout(0, 50, NOISE)
    front = search_cascades(logits[:, :1], labels, (8,))
    assert [policy.dims for policy in front.policies] == [(8,)]
    assert front.costs == (8.0,)


SHARE = "share must be a number of at least 0. Received: share={}. Give 0.005 for half a point."
COST = (
    "cost must be a finite number. "
    "Received: cost={!r}. Give what a row may cost, in the unit of the search."
)
REFUSED_TARGETS: list[tuple[Callable[[CascadeFront], object], str]] = [
    (lambda front: front.cheapest_within(-0.1), SHARE.format(-0.1)),
    (lambda front: front.cheapest_within(float("nan")), SHARE.format("nan")),
    (lambda front: front.cheapest_within(None), SHARE.format(None)),  # type: ignore[arg-type]
    (lambda front: front.best_under("x"), COST.format("x")),  # type: ignore[arg-type]
    (lambda front: front.best_under(float("inf")), COST.format(float("inf"))),
    (
        lambda front: front.best_under(7.9),
        "The cheapest policy costs 8 a row. Received: cost=7.9. Give at least that.",
    ),
]


@pytest.mark.parametrize(("call", "text"), REFUSED_TARGETS)
def test_targets_that_are_refused(
    call: Callable[[CascadeFront], object], text: str, refuses: Refuses
) -> None:
    logits, labels = noisy_holdout(0, 50, NOISE[:1])
    front = search_cascades(logits, labels, (8,))
    with refuses(ValueError, text):
        call(front)


NO_COSTS = (
    "costs must be one positive number per stage, finite and of one scale. "
    "Received: costs={} for 3 stages. Give what each stage costs."
)
NO_REALS = (
    "costs must be an array of real numbers. Received: {}. "
    "Give a NumPy array of floats, every row as long as the others."
)
NAN, INF = float("nan"), float("inf")
REFUSED_COSTS: list[tuple[Any, str]] = [
    *(
        (costs, NO_COSTS.format(costs))
        for costs in (
            (1.0,),
            (0.0, 1.0, 2.0),
            (1.0, -1.0, 2.0),
            (1.0, 2.0, NAN),
            (1.0, 2.0, INF),
            (1.0, 2.0, 1e13),
        )
    ),
    (("a", "b", "c"), NO_REALS.format("<U1 of shape (3,)")),
    ({"a": 1}, NO_REALS.format("dict")),
    (
        [[1], [2, 3]],
        NO_REALS.format(
            "list (setting an array element with a sequence. The requested array has an "
            "inhomogeneous shape after 1 dimensions. The detected shape was (2,) + inhomogeneous "
            "part)"
        ),
    ),
]


@pytest.mark.parametrize(("costs", "text"), REFUSED_COSTS)
def test_costs_that_are_refused(costs: Any, text: str, refuses: Refuses) -> None:
    logits, labels = noisy_holdout(0, 50, NOISE)
    with refuses(ValueError, text):
        search_cascades(logits, labels, DIMS[:3], costs)
