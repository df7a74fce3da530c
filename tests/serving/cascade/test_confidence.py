"""Confidences beside float64 written out, and temperatures beside a search over a fine grid."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mrl_serving import CascadePolicy, fit_temperatures, search_cascades
from keras_mrl_serving.cascade.confidence import (
    CONFIDENCES,
    confidence_of,
    max_probability,
    softmax,
)
from keras_mrl_serving.cascade.thresholds import midway
from tests.helpers.galleries import Refuses
from tests.helpers.holdouts import Array, holdouts, noisy_holdout

RNG = np.random.default_rng(0)


def by_hand(measure: str, logits: Any, temperature: float) -> float:
    exponentials = [np.exp(float(x) / temperature) for x in logits]
    probabilities = sorted((x / sum(exponentials) for x in exponentials), reverse=True)
    return {
        "max_probability": probabilities[0],
        "margin": probabilities[0] - (probabilities[1] if len(probabilities) > 1 else 0),
        "entropy": sum(p * np.log(p) for p in probabilities if p),
    }[measure]


@pytest.mark.parametrize("measure", CONFIDENCES)
@pytest.mark.parametrize("classes", [1, 2, 7])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_they_are_those_of_the_formulas(measure: str, classes: int, temperature: float) -> None:
    logits = RNG.normal(size=(20, classes), scale=3)
    confidence = confidence_of(measure, logits, temperature)
    assert confidence.dtype == np.float32
    expected = [by_hand(measure, row, temperature) for row in logits]
    np.testing.assert_allclose(confidence, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("measure", CONFIDENCES)
def test_the_surest_and_the_least_sure(measure: str) -> None:
    sure = confidence_of(measure, np.array([[1000.0, 0.0, 0.0]]))
    unsure = confidence_of(measure, np.zeros((1, 3)))
    assert float(sure[0]) == (0.0 if measure == "entropy" else 1.0)
    least = {"max_probability": 1 / 3, "margin": 0.0, "entropy": -np.log(3)}[measure]
    assert float(unsure[0]) == pytest.approx(least)


@pytest.mark.parametrize("measure", CONFIDENCES)
def test_a_threshold_can_accept_all_some_or_none(measure: str) -> None:
    logits = np.concatenate([RNG.normal(size=(8, 3)), np.zeros((1, 3)), [[1000.0, 0, 0]]])
    ascending = np.sort(confidence_of(measure, logits))
    for first in (0, 3, len(ascending)):
        threshold = np.float32(midway(ascending, first))
        assert (ascending > threshold).sum() == len(ascending) - first


@pytest.mark.parametrize("measure", CONFIDENCES)
def test_a_threshold_is_sought_over_all_values_of_a_measure(measure: str) -> None:
    """The narrow dim is right where its logits differ by 2, the wide dim where they do by 0.3."""
    gaps = np.array([0.3, 2, 2, 2, 2, 2])
    narrow = np.stack([gaps, np.zeros(6), np.zeros(6)], axis=-1)
    logits = np.stack([narrow, np.tile([0.0, 9.0, 0.0], (6, 1))], axis=1)
    policy = CascadePolicy.learn(logits, [1, 0, 0, 0, 0, 0], (8, 64), confidence=measure)
    assert policy.holdout is not None
    assert policy.holdout.accuracy == 1
    assert policy.holdout.exit_fractions == (5 / 6, 1 / 6)


@pytest.mark.parametrize("measure", CONFIDENCES)
def test_a_cascade_learns_and_routes_by_each(measure: str) -> None:
    logits, labels = noisy_holdout(0, 400, noise=(0.8, 0.4))
    policy = CascadePolicy.learn(logits, labels, (8, 64), confidence=measure)
    assert policy.confidence == measure
    assert policy.holdout is not None
    assert 0 < policy.holdout.exit_fractions[0] < 1
    threshold = np.float32(policy.stages[0].threshold)
    _, stage_of = policy.route(logits)
    np.testing.assert_array_equal(stage_of == 0, confidence_of(measure, logits[:, 0]) > threshold)
    assert CascadePolicy.from_json(policy.to_json()) == policy
    front = search_cascades(logits, labels, (8, 64), confidence=measure)
    assert {p.confidence for p in front.policies} == {measure}
    assert front.best_under(policy.holdout.expected_dim).holdout.accuracy >= (  # type: ignore[union-attr]
        policy.holdout.accuracy
    )


@given(st.floats(2.0**-10, 1, width=32, exclude_max=True))
def test_a_threshold_never_rounds_up_to_what_it_accepts(confidence: float) -> None:
    low = np.float32(confidence)
    ascending = np.array([low, np.nextafter(low, np.float32(2))])
    thresholds = [np.float32(midway(ascending, first)) for first in range(3)]
    assert [(ascending > threshold).sum() for threshold in thresholds] == [2, 1, 0]


@given(holdouts(), st.floats(0.1, 10))
def test_softmax_is_that_of_float64(holdout: tuple[Array, Array], temperature: float) -> None:
    logits, _ = holdout
    probabilities = softmax(logits, temperature)
    assert probabilities.dtype == np.float32
    scaled = logits.astype(np.float64) / temperature
    exponentials = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    expected = exponentials / exponentials.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(max_probability(logits, temperature), probabilities.max(axis=-1))


def test_softmax_of_large_logits_does_not_overflow() -> None:
    np.testing.assert_array_equal(softmax(np.array([1e30, -1e30, 0.0])), [1, 0, 0])


LABELS = RNG.integers(0, 4, 600)
TRUE = (
    RNG.normal(size=(600, 2, 4)) + np.array([1.0, 2.0])[None, :, None] * np.eye(4)[LABELS][:, None]
)
LOGITS = TRUE * np.array([4.0, 0.3])[None, :, None]


def cross_entropy(logits: Any, temperature: float) -> float:
    scaled = logits / temperature
    scaled = scaled - scaled.max(-1, keepdims=True)
    logs = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    return float(-logs[np.arange(len(LABELS)), LABELS].mean())


def test_no_temperature_on_a_fine_grid_is_better() -> None:
    grid = np.geomspace(0.01, 100, 2000)
    for column, temperature in enumerate(fit_temperatures(LOGITS, LABELS)):
        losses = [cross_entropy(LOGITS[:, column], t) for t in grid]
        assert cross_entropy(LOGITS[:, column], temperature) <= min(losses) + 1e-7
        assert temperature == pytest.approx(grid[int(np.argmin(losses))], rel=0.02)


def test_temperatures_undo_a_scale() -> None:
    first = np.array(fit_temperatures(LOGITS, LABELS))
    again = np.array(fit_temperatures(LOGITS * 7, LABELS))
    np.testing.assert_allclose(again, 7 * first, rtol=1e-4)


def test_rows_that_are_all_right_get_the_sharpest_and_no_overflow() -> None:
    logits = 1e4 * np.eye(4)[LABELS][:, None]
    assert fit_temperatures(logits, LABELS)[0] == pytest.approx(1e-3, rel=1e-3)


def test_a_policy_carries_temperatures() -> None:
    scales = fit_temperatures(LOGITS, LABELS)
    policy = CascadePolicy.learn(LOGITS, LABELS, (8, 64), scales)
    assert tuple(stage.temperature for stage in policy.stages) == scales
    by_dim = dict(zip((8, 64), scales, strict=True))
    for policy in search_cascades(LOGITS, LABELS, (8, 64), temperatures=scales).policies:
        assert all(stage.temperature == by_dim[stage.dim] for stage in policy.stages)


@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 0.0), (1.0, float("inf")), (1.0, -1.0)])
def test_temperatures_that_are_refused(temperatures: Any, refuses: Refuses) -> None:
    text = (
        "temperatures must be one finite number above 0 per stage. "
        f"Received: temperatures={temperatures!r} for 2 stages. Give what fit_temperatures returns."
    )
    with refuses(ValueError, text):
        CascadePolicy.learn(LOGITS, LABELS, (8, 64), temperatures)
