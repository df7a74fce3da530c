"""Temperatures beside a search over a fine grid, and what they do to a cascade."""

import re
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving import CascadePolicy, fit_temperatures, search_cascades

RNG = np.random.default_rng(0)
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


def test_none_on_a_fine_grid_is_better() -> None:
    grid = np.geomspace(0.01, 100, 2000)
    for at, found in enumerate(fit_temperatures(LOGITS, LABELS)):
        tried = [cross_entropy(LOGITS[:, at], t) for t in grid]
        assert cross_entropy(LOGITS[:, at], found) <= min(tried) + 1e-7
        assert found == pytest.approx(grid[int(np.argmin(tried))], rel=0.02)


def test_they_undo_a_scale() -> None:
    first = np.array(fit_temperatures(LOGITS, LABELS))
    again = np.array(fit_temperatures(LOGITS * 7, LABELS))
    np.testing.assert_allclose(again, 7 * first, rtol=1e-4)


def test_rows_that_are_all_right_get_the_sharpest_and_no_overflow() -> None:
    logits = 1e4 * np.eye(4)[LABELS][:, None]
    assert fit_temperatures(logits, LABELS)[0] == pytest.approx(1e-3, rel=1e-3)


def test_a_policy_carries_them() -> None:
    scales = fit_temperatures(LOGITS, LABELS)
    policy = CascadePolicy.learn(LOGITS, LABELS, (8, 64), scales)
    assert tuple(stage.temperature for stage in policy.stages) == scales
    for found in search_cascades(LOGITS, LABELS, (8, 64), temperatures=scales).policies:
        by_dim = dict(zip((8, 64), scales, strict=True))
        assert all(stage.temperature == by_dim[stage.dim] for stage in found.stages)


@pytest.mark.parametrize("given", [(1.0,), (1.0, 0.0), (1.0, float("inf")), (1.0, -1.0)])
def test_temperatures_that_are_none(given: Any) -> None:
    text = (
        "temperatures must be one finite number above 0 per dim. "
        f"Received: temperatures={given!r} for 2 dims. Give what fit_temperatures returns."
    )
    with pytest.raises(ValueError, match=rf"\A{re.escape(text)}\Z"):
        CascadePolicy.learn(LOGITS, LABELS, (8, 64), given)
