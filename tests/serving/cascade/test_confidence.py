"""How sure a row is, beside float64 written out."""

import re
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving import CascadePolicy, Stage, search_cascades
from keras_mrl_serving.cascade.confidence import CONFIDENCES, confidence_of, lowest, midway

RNG = np.random.default_rng(0)


def by_hand(measure: str, logits: Any, temperature: float) -> float:
    raised = [np.exp(float(x) / temperature) for x in logits]
    shares = sorted((x / sum(raised) for x in raised), reverse=True)
    return {
        "max_probability": shares[0],
        "margin": shares[0] - (shares[1] if len(shares) > 1 else 0),
        "entropy": sum(p * np.log(p) for p in shares if p),
    }[measure]


@pytest.mark.parametrize("measure", CONFIDENCES)
@pytest.mark.parametrize("classes", [1, 2, 7])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_they_are_those_of_the_formulas(measure: str, classes: int, temperature: float) -> None:
    logits = RNG.normal(size=(20, classes), scale=3)
    found = confidence_of(measure, logits, temperature)
    assert found.dtype == np.float32
    expected = [by_hand(measure, row, temperature) for row in logits]
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("measure", CONFIDENCES)
def test_the_surest_and_the_least_sure(measure: str) -> None:
    sure = confidence_of(measure, np.array([[1000.0, 0.0, 0.0]]))
    unsure = confidence_of(measure, np.zeros((1, 3)))
    assert float(sure[0]) == (0.0 if measure == "entropy" else 1.0)
    assert float(unsure[0]) == pytest.approx(lowest(measure, 3))


@pytest.mark.parametrize("measure", CONFIDENCES)
def test_a_threshold_can_accept_all_some_or_none(measure: str) -> None:
    logits = np.concatenate([RNG.normal(size=(8, 3)), np.zeros((1, 3)), [[1000.0, 0, 0]]])
    ascending = np.sort(confidence_of(measure, logits))
    for first in (0, 3, len(ascending)):
        threshold = np.float32(midway(ascending, first))
        assert (ascending > threshold).sum() == len(ascending) - first


@pytest.mark.parametrize("measure", CONFIDENCES)
def test_a_cascade_learns_and_routes_by_each(measure: str) -> None:
    labels = RNG.integers(0, 5, 400)
    noise = np.array([0.8, 0.4])[None, :, None] * RNG.normal(size=(400, 2, 5))
    logits = 3 * (np.eye(5)[labels][:, None] + noise)
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


def test_a_measure_there_is_not() -> None:
    text = (
        "confidence must be one of max_probability, margin, entropy. "
        "Received: confidence='gut'. Choose one of those."
    )
    with pytest.raises(ValueError, match=rf"\A{re.escape(text)}\Z"):
        CascadePolicy((Stage(8, None),), "gut")
