"""Over many holdouts of a known population, a certified policy keeps its promise."""

import math
import os
import re
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving import CascadePolicy, certify_cascade
from keras_mrl_serving.cascade.bounds import chance_of_so_few, chance_of_such_a_drop
from tests.helpers.galleries import Refuses

DIMS = (8, 32, 128)
RISK, DELTA = 0.02, 0.1
SOAK = bool(os.environ.get("KERAS_MRL_SOAK"))
HOLDOUTS = 1000 if SOAK else 12


def population(rows: int = 20_000) -> tuple[Any, Any]:
    """Rows of which many are easy and some hard, and logits that are overconfident."""
    rng = np.random.default_rng(7)
    labels = rng.integers(0, 10, rows)
    hardness = rng.choice([0.5, 1.5], rows, p=[0.7, 0.3])[:, None, None]
    noise = np.array([1.0, 0.75, 0.6])[None, :, None] * hardness * rng.normal(size=(rows, 3, 10))
    return 4 * (2 * np.eye(10)[labels][:, None] + noise).astype(np.float32), labels


def true_risk(policy: CascadePolicy, logits: Any, labels: Any, kind: str = "harm") -> float:
    columns = [DIMS.index(dim) for dim in policy.dims]
    is_right = policy.route(logits[:, columns])[0] == labels
    is_full_right = logits[:, -1].argmax(-1) == labels
    if kind == "harm":
        return float(np.mean(is_full_right & ~is_right))
    return float(np.mean(is_full_right) - np.mean(is_right))


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore:To promise a")
@pytest.mark.parametrize("kind", ["harm", "accuracy_drop"])
def test_the_promise_fails_in_at_most_delta_of_the_holdouts(kind: str) -> None:
    logits, labels = population()
    rng = np.random.default_rng(1)
    num_broken, dims, risks = 0, [], []
    for draw in range(HOLDOUTS):
        rows = rng.integers(0, len(labels), 1200)
        policy = certify_cascade(
            logits[rows], labels[rows], DIMS, kind, DELTA, seed=draw, alpha=RISK
        )
        assert policy.guarantee is not None
        assert policy.guarantee.kind == kind
        risks.append(true_risk(policy, logits, labels, kind))
        num_broken += risks[-1] > RISK
        assert policy.holdout is not None
        dims.append(policy.holdout.expected_dim)
    # A binomial at the promised rate lies above the second once in a thousand.
    limit = (DELTA + 0.02) * HOLDOUTS
    if not SOAK:
        limit = DELTA * HOLDOUTS + 3.1 * math.sqrt(HOLDOUTS * DELTA * (1 - DELTA))
    assert num_broken <= limit, (num_broken, np.mean(risks), np.mean(dims))
    assert np.mean(risks) > (RISK / 10 if kind == "harm" else -RISK)  # it uses the risk it may take
    assert np.mean(dims) < 0.75 * DIMS[-1]


def test_the_guarantee_counts_the_rows_that_were_not_searched() -> None:
    logits, labels = population(2001)
    policy = certify_cascade(logits, labels, DIMS, RISK, DELTA)
    assert policy.guarantee is not None
    assert policy.guarantee.size == 1001
    # The second half of the seed's order.
    tested = np.random.default_rng(0).permutation(2001)[1000:]
    errors = true_risk(policy, logits[tested], labels[tested]) * 1001
    assert policy.guarantee.errors == round(errors) > 0
    assert chance_of_so_few(policy.guarantee.errors, 1001, RISK) <= DELTA
    assert CascadePolicy.from_json(policy.to_json()) == policy
    assert policy.holdout is not None
    assert policy.holdout.size == 2001


@pytest.mark.filterwarnings("ignore:To promise a risk of")
def test_policies_stricter_than_those_searched_are_tested_first() -> None:
    """Without them three of these eight holdouts would leave the full dim alone."""
    logits, labels = population()
    for seed in range(8):
        rows = np.random.default_rng(seed).integers(0, len(labels), 1200)
        policy = certify_cascade(logits[rows], labels[rows], DIMS, 0.01, 0.1, seed=seed)
        assert len(policy.dims) > 1


def test_a_seed_draws_the_halves() -> None:
    logits, labels = population(1500)
    first, again, other = (
        certify_cascade(logits, labels, DIMS, RISK, DELTA, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again != other


def test_every_process_finds_the_same() -> None:
    """Whatever order its hashes give to a set: two dims are alike, so that policies tie."""
    code = """if True:
        import json, numpy as np
        from keras_mrl_serving import certify_cascade, search_cascades
        rng, dims, costs, policies = np.random.default_rng(0), (8, 16, 32, 64), (8, 8, 8, 64), []
        for _ in range(4):
            labels = rng.integers(0, 4, 80)
            noise = np.array([1.5, 1.5, 1.5, 1])[:, None] * rng.normal(size=(80, 4, 4))
            noise[:, 1] = noise[:, 0]
            scores = np.round(2 * np.eye(4)[labels][:, None] + noise) - 9
            policies += search_cascades(scores, labels, dims, costs).policies
            policies.append(certify_cascade(scores, labels, dims, 0.2, costs=costs))
        print(json.dumps([policy.to_json() for policy in policies]))
    """
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in (0, 2, 3)
    }
    assert len(outputs) == 1


def test_where_no_small_dim_can_be_trusted_the_full_dim_decides() -> None:
    """Small dims that guess: the search finds nothing to test but the last."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 900)
    logits = rng.normal(size=(900, 3, 10))
    logits[:, -1] += 9 * np.eye(10)[labels]
    policy = certify_cascade(logits, labels, DIMS, RISK, DELTA)
    assert true_risk(policy, logits, labels) <= RISK
    assert policy.holdout is not None
    assert policy.holdout.expected_dim > 0.9 * DIMS[-1]


def test_a_holdout_that_is_too_small_is_refused(refuses: Refuses) -> None:
    logits, labels = population(400)
    text = (
        "To promise a risk of 0.01 with delta=0.05, the half of the holdout that tests must hold "
        "299 rows even if none is an error. Received: 200 of 400 rows. "
        "Give 598 rows or more, or promise less."
    )
    with refuses(ValueError, text):
        certify_cascade(logits, labels, DIMS)


def test_where_the_safest_policy_fails_a_warning_says_how_many_rows_would_do() -> None:
    logits, labels = population(5980)
    halves = [slice(start, start + 598) for start in range(0, 5980, 598)]  # room for no error
    with pytest.warns(
        UserWarning, match=r"\ATo promise a risk of 0.01 with delta=0.05, the "
    ) as caught:
        policies = [certify_cascade(logits[rows], labels[rows], DIMS) for rows in halves]
    text = (
        r".* the safest cascade must err on few of the rows that test it. "
        r"Received: (\d) errors on 299 rows, too many: the last stage alone is returned. "
        r"Give about (\d+) rows, or promise less."
    )
    match = re.fullmatch(text, str(caught[0].message))
    assert match
    assert [policy.dims for policy in policies].count(DIMS[-1:]) == len(caught) < 10
    errors, rows = map(int, match.groups())
    assert chance_of_so_few(math.ceil(errors / 299 * rows / 2), rows // 2, 0.01) <= 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(certify_cascade(*population(2 * rows), DIMS).dims) > 1


@pytest.mark.parametrize("name", ["risk", "alpha", "delta"])
@pytest.mark.parametrize("value", [0, 1, -0.1, float("nan"), None])
def test_promises_that_are_refused(name: str, value: Any, refuses: Refuses) -> None:
    text = (
        f"{name} must lie between 0 and 1, both excluded. "
        f"Received: {name}={value!r}. Give for example 0.01."
    )
    with refuses(ValueError, text):
        certify_cascade(*population(50), DIMS, **{name: value})


def test_a_risk_that_is_no_risk_is_refused(refuses: Refuses) -> None:
    text = (
        "risk must be 'harm' or 'accuracy_drop'. Received: risk='surprise'. Choose one, and give "
        "alpha=0.01 for one point."
    )
    with refuses(ValueError, text):
        certify_cascade(*population(50), DIMS, "surprise")


@pytest.mark.filterwarnings("ignore:To promise a")
def test_a_number_as_risk_is_harm_of_at_most_so_much() -> None:
    logits, labels = population(1500)
    old = certify_cascade(logits, labels, DIMS, RISK, DELTA)
    assert old == certify_cascade(logits, labels, DIMS, risk="harm", alpha=RISK, delta=DELTA)
    assert old == certify_cascade(logits, labels, DIMS, risk=RISK, delta=DELTA, alpha=0.5)


def test_the_net_loss_counts_gains_too() -> None:
    """The same rows pass at a lower dim where gains are taken off."""
    logits, labels = population(6000)
    harm, drop = (
        certify_cascade(logits, labels, DIMS, kind, DELTA, alpha=RISK)
        for kind in ("harm", "accuracy_drop")
    )
    assert drop.guarantee is not None
    tested = np.random.default_rng(0).permutation(6000)[3000:]
    columns = [DIMS.index(dim) for dim in drop.dims]
    is_right = drop.route(logits[tested][:, columns])[0] == labels[tested]
    is_full_right = logits[tested, -1].argmax(-1) == labels[tested]
    assert drop.guarantee.errors == (is_full_right & ~is_right).sum()
    assert drop.guarantee.gains == (is_right & ~is_full_right).sum() > 0
    assert harm.holdout is not None
    assert drop.holdout is not None
    assert drop.holdout.expected_dim < harm.holdout.expected_dim
    written = drop.to_json()
    # The key that a reader of 0.1.0 takes for a promise about harm stays empty.
    assert written["guarantee"] is None
    assert CascadePolicy.from_json(written) == drop


def test_a_drop_needs_more_rows_and_says_how_many() -> None:
    logits, labels = population(700)
    with pytest.raises(ValueError, match="To promise a drop of accuracy of") as caught:
        certify_cascade(logits, labels, DIMS, "accuracy_drop", alpha=0.01)
    match = re.search(r"must hold (\d+) rows even if none is an error", str(caught.value))
    assert match
    assert chance_of_such_a_drop(0, 0, int(match[1]), 0.01) <= 0.05


def test_gains_by_luck_do_not_end_the_tests_at_once() -> None:
    """Stages that are wrong apart gain rows on the half that is searched, and lose them again."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 6000)
    hardness = rng.choice([0.5, 2.0], (6000, 1), p=[0.85, 0.15])
    rng.integers(4, 30, 6000)
    noise = [1.2 * 1.8, 1.8, 1.2 * 1.4, 1.4, 1.2 * 1.1, 1.1]
    logits = [4 * np.eye(10)[labels] + n * hardness * rng.normal(size=(6000, 10)) for n in noise]
    keys = [(exit_, dim) for exit_ in ("block1", "block3", None) for dim in (16, 64)]
    reached = {"block1": 0.2, "block3": 0.5, None: 1.0}
    policy = certify_cascade(
        dict(zip(keys, (array[:4000] for array in logits), strict=True)),
        labels[:4000],
        risk="accuracy_drop",
        costs=lambda asked: [reached[exit_] + 0.01 * i for i, (exit_, _) in enumerate(asked, 1)],
    )
    assert len(policy.keys) > 1
