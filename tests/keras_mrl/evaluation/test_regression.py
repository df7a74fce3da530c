"""Errors of values and R2: equal to scikit-learn's."""

import numpy as np
import pytest
from sklearn import metrics

from keras_mrl.evaluation import score_regression


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("width", [1, 3])
def test_they_are_those_of_scikit_learn(seed: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    targets = rng.normal(size=(30, width)) * 10 + 1000
    outputs = (targets + rng.normal(size=targets.shape)).astype(np.float32)
    expected = {
        "mae": metrics.mean_absolute_error(targets, outputs),
        "rmse": metrics.root_mean_squared_error(targets, outputs),
        "r2": metrics.r2_score(targets, outputs),
    }
    assert score_regression(outputs, targets) == pytest.approx(expected, rel=1e-6)
    if width == 1:
        assert score_regression(outputs, targets[:, 0]) == score_regression(outputs, targets)


def test_equal_targets_have_the_r2_of_scikit_learn() -> None:
    targets = np.full((4, 2), 3.0)
    for outputs in (targets, targets + np.array([0, 1])):
        assert score_regression(outputs, targets)["r2"] == metrics.r2_score(targets, outputs)


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Received: labels of shape \(3,\) for outputs \(3, 2\)"):
        score_regression(np.ones((3, 2)), np.ones(3))
    with pytest.raises(ValueError, match=r"\Aoutputs must be finite. Received: NaN or infinity"):
        score_regression([[np.inf]], [1])
