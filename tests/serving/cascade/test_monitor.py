"""Drift is rarely seen where there is none, and always where there is much."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving import CascadePolicy, CascadeReport, Stage, exit_drift, oracle_report
from tests.helpers.galleries import Refuses
from tests.helpers.holdouts import noisy_holdout

DIMS = (8, 32, 128)
SHARES = (0.6, 0.3, 0.1)
HOLDOUT = CascadeReport(0.8, 0.8, 30.0, 40.0, SHARES, 2000)
POLICY = CascadePolicy((Stage(8, 0.9), Stage(32, 0.8), Stage(128, None)), holdout=HOLDOUT)
RNG = np.random.default_rng(0)


def test_without_drift_it_is_seen_as_often_as_the_level_says() -> None:
    """Both histograms are drawn: the holdout is a sample, too."""
    p_values = []
    for draw in range(200):
        fractions = tuple((RNG.multinomial(500, SHARES) / 500).tolist())
        policy = replace(POLICY, holdout=replace(HOLDOUT, exit_fractions=fractions, size=500))
        p_values.append(exit_drift(policy, RNG.choice(DIMS, 300, p=SHARES), seed=draw).p_value)
    assert 0.01 < np.mean(np.array(p_values) <= 0.1) < 0.19
    assert 0.35 < np.mean(p_values) < 0.65


def test_rows_that_stop_elsewhere_are_seen() -> None:
    drift = exit_drift(POLICY, RNG.choice(DIMS, 1000, p=(0.3, 0.4, 0.3)))
    assert drift.p_value == 1e-4
    assert drift.moved == pytest.approx(0.3, abs=0.05)
    assert sum(drift.seen) == pytest.approx(1)


def test_a_stage_that_no_row_left_at() -> None:
    holdout = replace(HOLDOUT, exit_fractions=(0.6, 0.4, 0.0))
    policy = replace(POLICY, holdout=holdout)
    assert exit_drift(policy, [8] * 60 + [32] * 40).p_value > 0.9
    assert exit_drift(policy, [8] * 50 + [32] * 30 + [128] * 20).p_value == 1e-4


def test_few_rows_say_little() -> None:
    assert exit_drift(POLICY, [128]).p_value == pytest.approx(0.1, abs=0.03)


NO_HOLDOUT = (
    "Drift is seen against the holdout of a policy. Received: a policy without. "
    "Learn it, or set it: dataclasses.replace(policy, holdout=policy.evaluate(...))."
)
NO_DIMS = (
    "dims must be one of 8, 32, 128 for each row. Received: {}. "
    "Give client.classify_adaptive(...).dim."
)


@pytest.mark.parametrize(
    ("policy", "dims", "text"),
    [
        (replace(POLICY, holdout=None), [8], NO_HOLDOUT),
        (POLICY, [], NO_DIMS.format("float64 of shape (0,)")),
        (POLICY, [9], NO_DIMS.format("int64 of shape (1,)")),
        (POLICY, [[8]], NO_DIMS.format("int64 of shape (1, 1)")),
    ],
)
def test_rows_that_are_refused(
    policy: CascadePolicy, dims: Any, text: str, refuses: Refuses
) -> None:
    with refuses(ValueError, text):
        exit_drift(policy, dims)


def test_no_policy_beats_the_oracle() -> None:
    logits, labels = noisy_holdout(0, 300, noise=(1.2, 1.0, 0.8))
    is_right = logits.argmax(-1) == labels[:, None]
    report = oracle_report(logits, labels, DIMS)
    assert report.accuracy == is_right.any(1).mean()
    stops = [DIMS[int(np.argmax(row))] for row in is_right]  # the first, if none is right
    assert report.expected_dim == pytest.approx(np.mean(stops))
    policy = CascadePolicy.learn(logits, labels, DIMS)
    assert policy.holdout is not None
    assert policy.holdout.accuracy <= report.accuracy


EXITS = CascadePolicy(
    (Stage(8, 0.9, exit="early"), Stage(32, 0.8, exit="early"), Stage(32, None)), holdout=HOLDOUT
)


@pytest.mark.parametrize("dtype", [str, object, bytes])
def test_rows_that_stopped_at_exits_are_told_apart(dtype: type) -> None:
    """Two stages have one dim."""
    dims = np.array([8] * 60 + [32] * 30 + [32] * 10)
    exits: Any = np.array(["early"] * 90 + ["last"] * 10).astype(dtype)
    assert exit_drift(EXITS, dims, exits=exits).seen == SHARES
    moved: Any = np.array(["early"] * 60 + ["last"] * 40).astype(dtype)
    assert exit_drift(EXITS, dims, exits=moved).p_value < 0.01


REFUSED_EXITS: list[tuple[Any, Any, str]] = [
    (
        [8],
        None,
        "exits must be one of early, last for each row of dims. Received: none for 1 rows. "
        "Give client.classify_adaptive(...).exit.",
    ),
    (
        [8, 8],
        ["early"],
        "exits must be one of early, last for each row of dims. Received: <U5 of shape (1,) for 2 "
        "rows. Give client.classify_adaptive(...).exit.",
    ),
    (
        [8],
        ["middle"],
        "exits must be one of early, last for each row of dims. Received: <U6 of shape (1,) for 1 "
        "rows. Give client.classify_adaptive(...).exit.",
    ),
    (
        [8, 8],
        ["early", "last"],
        "Every row must have stopped at a stage of the policy. Received: 1 rows at other pairs of "
        "exit and dim than (('early', 8), ('early', 32), (None, 32)). Give dims and exits of one "
        "answer by this policy.",
    ),
]


@pytest.mark.parametrize(("dims", "exits", "text"), REFUSED_EXITS)
def test_exits_that_are_refused(dims: Any, exits: Any, text: str, refuses: Refuses) -> None:
    with refuses(ValueError, text):
        exit_drift(EXITS, dims, exits=exits)
