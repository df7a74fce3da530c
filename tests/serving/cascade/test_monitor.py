"""Drift: rarely seen where there is none, always where there is much."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving import CascadePolicy, CascadeReport, Stage, exit_drift, oracle_report

DIMS = (8, 32, 128)
SHARES = (0.6, 0.3, 0.1)
HOLDOUT = CascadeReport(0.8, 0.8, 30.0, 40.0, SHARES, 2000)
POLICY = CascadePolicy((Stage(8, 0.9), Stage(32, 0.8), Stage(128, None)), holdout=HOLDOUT)
RNG = np.random.default_rng(0)


def test_of_the_same_rows_it_is_seen_as_often_as_the_level_says() -> None:
    """Both histograms are drawn: the holdout is a sample, too."""
    values = []
    for draw in range(200):
        fractions = tuple((RNG.multinomial(500, SHARES) / 500).tolist())
        policy = replace(POLICY, holdout=replace(HOLDOUT, exit_fractions=fractions, size=500))
        values.append(exit_drift(policy, RNG.choice(DIMS, 300, p=SHARES), seed=draw).p_value)
    assert 0.01 < np.mean(np.array(values) <= 0.1) < 0.19
    assert 0.35 < np.mean(values) < 0.65


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


def test_a_policy_without_a_holdout() -> None:
    text = (
        "Drift is seen against the holdout of a policy. Received: a policy without. "
        "Learn it, or set it: dataclasses.replace(policy, holdout=policy.evaluate(...))."
    )
    with pytest.raises(ValueError, match=rf"\A{re.escape(text)}\Z"):
        exit_drift(replace(POLICY, holdout=None), [8])


@pytest.mark.parametrize(
    ("dims", "received"),
    [([], "float64 of shape (0,)"), ([9], "int64 of shape (1,)"), ([[8]], "int64 of shape (1, 1)")],
)
def test_dims_that_are_none_of_the_policy(dims: Any, received: str) -> None:
    text = (
        f"dims must be one of 8, 32, 128 for each row. Received: {received}. "
        "Give client.classify_adaptive(...).dim."
    )
    with pytest.raises(ValueError, match=rf"\A{re.escape(text)}\Z"):
        exit_drift(POLICY, dims)


def test_no_policy_beats_the_oracle() -> None:
    labels = RNG.integers(0, 5, 300)
    noise = np.array([1.2, 1.0, 0.8])[None, :, None] * RNG.normal(size=(300, 3, 5))
    logits = 2 * (np.eye(5)[labels][:, None] + noise)
    right = logits.argmax(-1) == labels[:, None]
    report = oracle_report(logits, labels, DIMS)
    assert report.accuracy == right.any(1).mean()
    stops = [
        next((dim for dim, is_right in zip(DIMS, row, strict=True) if is_right), 8) for row in right
    ]
    assert report.expected_dim == pytest.approx(np.mean(stops))
    policy = CascadePolicy.learn(logits, labels, DIMS)
    assert policy.holdout is not None
    assert policy.holdout.accuracy <= report.accuracy
