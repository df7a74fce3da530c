"""Logits by exit, by stage and as an array are one thing to everything that takes them."""

import json
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving import (
    CascadePolicy,
    ManifestError,
    Stage,
    certify_cascade,
    fit_temperatures,
    oracle_report,
    search_cascades,
    stage_logits,
)
from keras_mrl_serving.cascade.policy import check_no_exits
from keras_mrl_serving.cascade.stages import check_stages
from tests.helpers.galleries import Refuses
from tests.helpers.holdouts import noisy_holdout

DIMS = (8, 64)
NOISE = (1.2, 0.9, 0.8, 0.6, 0.5, 0.4)  # of two dims at three exits
KEYS = (("early", 8), ("early", 64), ("middle", 8), ("middle", 64), (None, 8), (None, 64))
COSTS = dict(zip(KEYS, (1.0, 1.1, 2.1, 2.2, 4.1, 4.2), strict=True))


def exits(rows: int = 1500, seed: int = 0) -> tuple[dict[str, Any], Any]:
    """Logits as `all_exits().predict` returns them, and labels."""
    logits, labels = noisy_holdout(seed, rows, NOISE)
    return dict(zip(("early", "middle", "last"), np.split(logits, 3, axis=1), strict=True)), labels


def costs_of(keys: Any) -> list[float]:
    """What `measure_costs(model).of` would say."""
    return [COSTS[key] for key in keys]


def learned(rows: int = 1500) -> tuple[CascadePolicy, dict[Any, Any], Any]:
    by_exit, labels = exits(rows)
    by_stage = stage_logits(by_exit, DIMS)
    few = {key: by_stage[key] for key in (KEYS[0], KEYS[3], KEYS[5])}
    return CascadePolicy.learn(few, labels), by_stage, labels


def test_by_exit_and_by_stage_are_the_same() -> None:
    by_exit, labels = exits(700)
    by_stage = stage_logits(by_exit, DIMS)
    assert tuple(by_stage) == KEYS
    assert search_cascades(by_exit, labels, DIMS, costs_of) == (
        search_cascades(by_stage, labels, costs=costs_of)
    )
    assert certify_cascade(by_exit, labels, DIMS, costs=costs_of, alpha=0.05) == (
        certify_cascade(by_stage, labels, costs=costs_of, alpha=0.05)
    )
    assert oracle_report(by_exit, labels, DIMS) == oracle_report(by_stage, labels)
    one = {name: logits[:, -1:] for name, logits in by_exit.items()}
    policy = CascadePolicy.learn(one, labels, (64,))
    assert policy == CascadePolicy.learn(stage_logits(one, (64,)), labels)
    assert policy.keys == (("early", 64), ("middle", 64), (None, 64))


def test_stages_of_the_last_exit_alone_are_dims() -> None:
    logits, labels = noisy_holdout(0, 700, NOISE[:2])
    by_stage: Any = {("last", 8): logits[:, 0], (None, 64): logits[:, 1]}
    finders: tuple[Any, ...] = (
        CascadePolicy.learn,
        search_cascades,
        partial(certify_cascade, alpha=0.05),
        oracle_report,
    )
    for find in finders:
        assert find(by_stage, labels) == find(logits, labels, DIMS)
    assert fit_temperatures(by_stage, labels) == fit_temperatures(logits, labels)
    policy = CascadePolicy.learn(logits, labels, DIMS)
    assert policy.evaluate(by_stage, labels) == policy.evaluate(logits, labels)


def test_a_policy_looks_its_stages_up() -> None:
    policy, by_stage, labels = learned()
    own = np.stack([by_stage[key] for key in policy.keys], axis=1)
    for ours, theirs in zip(policy.route(by_stage), policy.route(own), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert policy.evaluate(by_stage, labels) == policy.evaluate(own, labels) == policy.holdout
    assert policy.confidence == "margin"
    assert CascadePolicy(policy.stages).confidence == "margin"


def test_rows_at_once_are_rows_one_by_one() -> None:
    policy, by_stage, _ = learned(256)
    class_ids, stage_of = policy.route(by_stage)
    assert len(set(stage_of.tolist())) == 3
    for row in range(256):
        single = policy.route({key: logits[row : row + 1] for key, logits in by_stage.items()})
        assert [column.tolist() for column in single] == [[class_ids[row]], [stage_of[row]]]
    none = policy.route({key: logits[:0] for key, logits in by_stage.items()})
    assert [column.shape for column in none] == [(0,), (0,)]


@pytest.mark.parametrize(("threshold", "stage"), [(1.0, 2), (2.0, 2), (-1.0, 0)])
def test_never_to_exit_is_the_last_stage(threshold: float, stage: int) -> None:
    policy, by_stage, _ = learned()
    stages = [Stage(dim, threshold, 1.0, exit_) for exit_, dim in policy.keys[:-1]]
    class_ids, stage_of = CascadePolicy((*stages, policy.stages[-1])).route(by_stage)
    assert set(stage_of.tolist()) == {stage}
    np.testing.assert_array_equal(class_ids, by_stage[policy.keys[stage]].argmax(-1))


def test_what_is_found_over_exits_has_at_most_four_stages() -> None:
    by_exit, labels = exits(800)
    for given in (costs_of, costs_of(KEYS)):
        front = search_cascades(by_exit, labels, DIMS, costs=given)
        assert max(len(policy.stages) for policy in front.policies) in (3, 4)
        for policy, cost in zip(front.policies, front.costs, strict=True):
            assert policy.holdout is not None
            assert policy.confidence == "margin"
            assert cost == pytest.approx(
                np.dot(policy.holdout.exit_fractions, costs_of(policy.keys))
            )
        best = front.cheapest_within(0.005)
        assert best.holdout is not None
        cost = dict(zip(front.policies, front.costs, strict=True))[best]
        assert cost < 0.8 * COSTS[KEYS[-1]]


def test_no_set_of_four_stages_is_much_better_than_the_front() -> None:
    """The sets are chosen by a few prices: searched one by one, none is far below."""
    by_exit, labels = exits(400)
    by_stage = stage_logits(by_exit, DIMS)
    front = search_cascades(by_stage, labels, costs=costs_of)
    for early in combinations(KEYS[:-1], 3):
        some = {key: by_stage[key] for key in (*early, KEYS[-1])}
        other = search_cascades(some, labels, costs=costs_of)
        for policy, cost in zip(other.policies, other.costs, strict=True):
            assert policy.holdout is not None
            if policy.holdout.accuracy < policy.holdout.full_accuracy - 0.1:
                continue
            best = front.best_under(cost + 0.02 * COSTS[KEYS[-1]])
            assert best.holdout is not None
            assert best.holdout.accuracy >= policy.holdout.accuracy - 0.01


def test_a_stage_that_is_not_asked_is_not_paid_for() -> None:
    """Where costs are a function, as `measure_costs(model).of` is."""
    by_exit, labels = exits(800)
    asked: list[Any] = []

    def costs(keys: Any) -> list[float]:
        asked.append(tuple(keys))
        return [COSTS[key] + 0.5 * place for place, key in enumerate(keys)]

    front = search_cascades(by_exit, labels, DIMS, costs=costs)
    for policy, cost in zip(front.policies, front.costs, strict=True):
        assert policy.keys in asked
        assert policy.holdout is not None
        assert cost == pytest.approx(np.dot(policy.holdout.exit_fractions, costs(policy.keys)))


def test_a_policy_with_exits_is_read_back_and_no_reader_without_exits_can_run_it() -> None:
    policy, _, _ = learned()
    written = json.loads(json.dumps(policy.to_json()))
    assert CascadePolicy.from_json(written) == policy
    assert [stage["exit"] for stage in written["exit_stages"]] == ["early", "middle", None]
    # Version 0.1.0 reads `stages`, and of a stage `dim`, `threshold` and `temperature`.
    assert "stages" not in written
    plain = {**written, "stages": written["exit_stages"]}
    del plain["exit_stages"]
    assert CascadePolicy.from_json(plain) == policy  # if someone wrote it so: nothing is dropped
    for entry in written["exit_stages"]:
        entry["exit"] = 3
    with pytest.raises(ManifestError, match="None or 'last' for the last exit"):
        CascadePolicy.from_json(written)


REFUSED_STAGES: list[Any] = [
    ((None, 64), ("early", 8)),
    (("early", 8), ("middle", 8), ("early", 64), (None, 64)),
    (("early", 64), ("early", 8), (None, 8)),
    (("early", 8), ("early", 8), (None, 8)),
    (("early", 0), (None, 8)),
    (("early", 8.0), (None, 8)),
    (("", 8), (None, 8)),
    ((3, 8), (None, 8)),
]


@pytest.mark.parametrize("keys", REFUSED_STAGES)
def test_stages_that_are_refused(keys: Any, refuses: Refuses) -> None:
    text = (
        "Stages go from shallow exits to deep ones, the last exit at the end, and the dims of an "
        f"exit increase. Received: {keys}. Give pairs of an exit and a dim in this order, None or "
        "'last' for the last exit."
    )
    with refuses(ValueError, text):
        check_stages(keys)
    with refuses(ValueError, text):
        stages = [Stage(dim, 0.5, exit=exit_) for exit_, dim in keys]
        CascadePolicy((*stages[:-1], Stage(keys[-1][1], None, exit=keys[-1][0])))


ZEROS = np.zeros((5, 2, 3))
REFUSED_LOGITS: list[tuple[Any, Any, str]] = [
    (
        ZEROS,
        None,
        "An array of logits needs dims. Received: none. Give the dims of the head, or logits by "
        "stage: {(exit, dim): logits}.",
    ),
    (
        {"early": ZEROS, "last": ZEROS},
        None,
        "Logits by stage are a mapping from (exit, dim) to (rows, num_classes). Received: a "
        "mapping from ('early', 'last'). Give stage_logits(logits, dims) of what "
        "all_exits().predict returns.",
    ),
    (
        {("early", 8): ZEROS[:, 0]},
        DIMS,
        "The logits of exits are a mapping from names of exits to (rows, num_dims, num_classes). "
        "Received: stages. Give what all_exits().predict returns; where logits are by stage "
        "already, leave dims out.",
    ),
    (
        {"early": ZEROS, "last": ZEROS[:, :1]},
        DIMS,
        "The logits of an exit must be (rows, num_dims, num_classes). Received: logits of shape "
        "(5, 1, 3) at exit 'last' for 2 dims. Give what all_exits().predict returns, and the dims "
        "of its heads.",
    ),
    (
        {("early", 8): ZEROS[:, 0], (None, 8): ZEROS[:3, 0]},
        None,
        "The logits of a stage must be (rows, num_classes), of the same rows and classes at all "
        "stages. Received: {('early', 8): (5, 3), (None, 8): (3, 3)}. Predict all stages on the "
        "same rows, in their order.",
    ),
    (
        {("early", 8): ZEROS[:, 0] + 1 / 3, (None, 8): ZEROS[:, 0]},
        None,
        "logits must be logits, not probabilities. Received: rows that sum to 1 at ('early', 8). "
        "Leave the softmax out, or give np.log(probabilities).",
    ),
]


@pytest.mark.parametrize(("logits", "dims", "text"), REFUSED_LOGITS)
def test_logits_that_are_refused(logits: Any, dims: Any, text: str, refuses: Refuses) -> None:
    labels = [0, 1, 2, 0, 1]
    for find in (CascadePolicy.learn, search_cascades, oracle_report, certify_cascade):
        with refuses(ValueError, text):
            find(logits, labels, dims)


def test_a_policy_s_stage_without_logits_is_named(refuses: Refuses) -> None:
    policy, by_stage, labels = learned()
    del by_stage["middle", 64]
    text = (
        "logits must hold every stage of the policy. Received: logits of "
        f"{tuple(by_stage)}, without ('middle', 64). Predict that exit and dim, too."
    )
    with refuses(ValueError, text):
        policy.route(by_stage)
    with refuses(ValueError, text):
        policy.evaluate(by_stage, labels)


def test_what_exits_ask_of_a_caller(refuses: Refuses) -> None:
    by_exit, labels = exits(700)
    text = (
        "What an exit costs cannot be read from its dims. Received: logits of exits and "
        "costs=None. Give costs=measure_costs(model).of, or one number per stage."
    )
    with refuses(ValueError, text):
        search_cascades(by_exit, labels, DIMS)
    with refuses(ValueError, text):
        certify_cascade(by_exit, labels, DIMS)
    text = (
        "A cascade over exits has at most 4 stages: more overfit the holdout. "
        f"Received: {KEYS}. Leave stages out of the mapping, or let search_cascades choose."
    )
    with refuses(ValueError, text):
        CascadePolicy.learn(by_exit, labels, DIMS)


def test_who_asks_dims_alone_refuses_exits(refuses: Refuses) -> None:
    policy, _, _ = learned()
    text = (
        "A decoder asks the dims of the last exit. Received: a policy over the exits early, "
        "middle, last. Learn another."
    )
    with refuses(ValueError, text):
        check_no_exits(policy, "A decoder", "Learn another.")
