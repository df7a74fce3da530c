"""Months of production: the true harm lies in the interval as often as it should."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving import Audits, estimate_harm
from keras_mrl_serving.cascade.audits import audit_seed, check_audit_rate, draw_audited
from keras_mrl_serving.results import Classification
from tests.helpers.galleries import Refuses

MONTHS = 100
REQUESTS = 30_000


def month(seed: int) -> tuple[Audits, Audits]:
    """All requests of a month and the 1% of them that were audited, with labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, REQUESTS)
    drift = rng.uniform(0.005, 0.03)  # the share where only the last stage is right
    full = np.where(rng.random(REQUESTS) < 0.9, labels, (labels + 1) % 10)
    adaptive = np.where(rng.random(REQUESTS) < drift, (labels + 2) % 10, full)
    adaptive = np.where((full != labels) & (rng.random(REQUESTS) < 0.1), labels, adaptive)
    audited = rng.random(REQUESTS) < 0.01
    return (
        Audits(adaptive, full, labels),
        Audits(adaptive[audited], full[audited], labels[audited]),
    )


def harm_of(audits: Audits) -> float:
    adaptive, full, labels = map(np.asarray, (audits.adaptive, audits.full, audits.labels))
    return float(np.mean((full == labels) & (adaptive != labels)))


def test_the_true_harm_is_covered_in_at_least_90_of_100_months() -> None:
    covered, estimates, truths = 0, [], []
    for seed in range(MONTHS):
        everything, audited = month(seed)
        truths.append(harm_of(everything))
        estimate = estimate_harm(audited)
        covered += estimate.low <= truths[-1] <= estimate.high
        estimates.append(estimate.harm)
        assert estimate.high < 0.08
    assert covered >= 90
    assert np.mean(estimates) == pytest.approx(np.mean(truths), abs=0.003)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_rows_without_a_label_widen_the_interval_and_no_more(share: float) -> None:
    """Whichever of the differing rows are labelled, the truth is covered."""
    covered = 0
    for seed in range(MONTHS):
        everything, audited = month(seed)
        labels = np.array(audited.labels)
        labels[np.random.default_rng(seed).random(len(labels)) >= share] = -1
        estimate = estimate_harm(Audits(audited.adaptive, audited.full, labels))
        known = estimate_harm(audited)
        assert estimate.low <= known.low <= known.high <= estimate.high
        assert estimate.unlabelled <= estimate.differing == known.differing
        covered += estimate.low <= harm_of(everything) <= estimate.high
    assert covered >= 90


def test_only_rows_that_differ_need_a_label() -> None:
    _, audited = month(0)
    differs = np.asarray(audited.adaptive) != np.asarray(audited.full)
    few = Audits(audited.adaptive, audited.full, np.where(differs, np.asarray(audited.labels), -1))
    assert estimate_harm(few) == estimate_harm(audited)


def test_of_unlabelled_rows_as_many_are_harm_as_of_labelled_ones() -> None:
    adaptive, full = np.zeros(100, int), np.repeat([1, 0], [8, 92])
    for labels, harm in (([], 0.08), ([1, 0, 0, 0], 0.02), ([1, 1, 1, 1], 0.08), ([0], 0.0)):
        known = np.full(100, -1)
        known[: len(labels)] = labels
        assert estimate_harm(Audits(adaptive, full, known)).harm == harm
    assert estimate_harm(Audits(adaptive, full)).harm == 0.08


def test_audits_add_up() -> None:
    (_, january), (_, february) = month(0), month(1)
    both = january + february
    assert len(both) == len(january) + len(february)
    assert harm_of(both) * len(both) == pytest.approx(
        harm_of(january) * len(january) + harm_of(february) * len(february)
    )
    assert len(Audits([], []) + january) == len(january)


REFUSED: list[tuple[Any, Any, Any, str]] = [
    ([0, 1], [0], None, "full as int64 of shape (1,) for 2 rows"),
    ([0, 1], [0, 1], [0, -2], "labels as int64 of shape (2,) for 2 rows"),
    ([0, -1], [0, 1], None, "adaptive as int64 of shape (2,) for 2 rows"),
    ([0.0, 1.0], [0, 1], None, "adaptive as float64 of shape (2,) for 2 rows"),
]


@pytest.mark.parametrize(("adaptive", "full", "labels", "received"), REFUSED)
def test_audits_that_are_refused(
    adaptive: Any, full: Any, labels: Any, received: str, refuses: Refuses
) -> None:
    text = (
        "Audits are class ids of the same rows, three times; a label may be -1 where it is not "
        f"known. Received: {received}. Give both answers for each audited row."
    )
    with refuses(ValueError, text):
        Audits(adaptive, full, labels)


def test_estimates_that_are_refused(refuses: Refuses) -> None:
    with refuses(ValueError, "An estimate needs audited rows. Received: none. Raise audit_rate."):
        estimate_harm(Audits([], []))
    text = (
        "delta must lie between 0 and 1, both excluded. Received: delta=1. Give for example 0.05."
    )
    with refuses(ValueError, text):
        estimate_harm(Audits([0], [0]), delta=1)


def test_labels_of_an_answer_are_of_all_its_rows(refuses: Refuses) -> None:
    answer = Classification(
        class_ids=np.array([[3], [1], [1]]),
        probabilities=np.ones((3, 1), np.float32),
        confidence=np.ones(3, np.float32),
        dim=np.array([8, 8, 64], np.int32),
        full_class_ids=np.array([-1, 2, 1]),
    )
    both = Audits.of(answer, [0, 4, 5])
    assert [np.asarray(a).tolist() for a in (both.adaptive, both.full, both.labels)] == [
        *([1, 1], [2, 1]),
        [4, 5],
    ]
    assert np.asarray(Audits.of(answer).labels).tolist() == [-1, -1]
    assert len(Audits.of(replace(answer, full_class_ids=None))) == 0
    text = (
        "Audits are class ids of the same rows, three times; a label may be -1 where it is not "
        "known. Received: labels as int64 of shape (2,) for 3 rows. Give both answers for each "
        "audited row."
    )
    with refuses(ValueError, text):
        Audits.of(answer, [4, 5])


def test_each_row_has_the_same_chance_and_a_seed_draws_the_same_rows() -> None:
    drawn = np.stack([draw_audited(50, 0.1, seed) for seed in range(2000)])
    assert drawn.mean() == pytest.approx(0.1, abs=0.005)
    assert drawn.mean(axis=0).min() > 0.06
    np.testing.assert_array_equal(draw_audited(50, 0.5, 3), draw_audited(50, 0.5, 3))
    assert draw_audited(50, 1.0, 0).all()
    assert not draw_audited(50, 0.0, 0).any()


def test_seeds_are_integers_generators_or_new_ones() -> None:
    assert audit_seed(3) == audit_seed(3) != audit_seed(4)
    assert audit_seed(None) != audit_seed(None)
    one, other = np.random.default_rng(0), np.random.default_rng(0)
    seeds = [audit_seed(one) for _ in range(3)]
    assert seeds == [audit_seed(other) for _ in range(3)]
    assert len(set(seeds)) == 3


@pytest.mark.parametrize("rate", [-0.01, 1.5, float("nan"), "0.1", True, None])
def test_rates_that_are_refused(rate: Any, refuses: Refuses) -> None:
    text = (
        "audit_rate must be a share of the rows, in 0..1. "
        f"Received: audit_rate={rate!r}. Give for example 0.01."
    )
    with refuses(ValueError, text):
        check_audit_rate(rate)


@pytest.mark.parametrize("seed", [-1, "x", 0.5])
def test_seeds_that_are_refused(seed: Any, refuses: Refuses) -> None:
    text = (
        "audit_seed must be an integer of at least 0, or a numpy.random.Generator. Received: "
        f"audit_seed={seed!r}. Leave it out for a drawing that nobody can repeat."
    )
    with refuses(ValueError, text):
        audit_seed(seed)
