"""What the other tests trust: the reference's gradient is the slope of the reference's loss."""

import numpy as np
import pytest

from tests.helpers.reference import error_budget, fold, nested_gradient, nested_loss, tie

RANDOM = np.random.default_rng(0)
DIMS = (2, 3, 6)
FEATURES = RANDOM.normal(size=(5, 7))
LABELS = RANDOM.integers(0, 4, size=5)
WEIGHTS = (2.0, 1.0, 0.5)
SAMPLE_WEIGHTS = RANDOM.uniform(0.5, 2, size=5)
KERNEL = RANDOM.normal(size=(6, 4))
BIAS = RANDOM.normal(size=4)
STEP = 1e-6


def tied_loss(features: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> float:
    losses = nested_loss(features, *tie(kernel, bias, DIMS), LABELS, WEIGHTS)
    return float((SAMPLE_WEIGHTS * losses).mean())


@pytest.mark.parametrize("position", [0, 1, 2], ids=["features", "kernel", "bias"])
def test_the_gradient_is_the_slope_of_the_loss(position: int) -> None:
    arguments = [FEATURES, KERNEL, BIAS]
    gradient = nested_gradient(FEATURES, *tie(KERNEL, BIAS, DIMS), LABELS, WEIGHTS, SAMPLE_WEIGHTS)
    computed = (gradient.features, *fold(gradient))[position]
    slope = np.zeros_like(computed)
    for index in np.ndindex(*slope.shape):
        ends = []
        for sign in (-1, 1):
            moved = [argument.copy() for argument in arguments]
            moved[position][index] += sign * STEP
            ends.append(tied_loss(*moved))
        slope[index] = (ends[1] - ends[0]) / (2 * STEP)
    np.testing.assert_allclose(computed, slope, rtol=0, atol=1e-8)


def test_the_loss_of_equal_logits_is_the_log_of_the_classes_at_every_dim() -> None:
    kernels, biases = tie(np.zeros((6, 4)), np.ones(4), DIMS)
    losses = nested_loss(FEATURES, kernels, biases, LABELS, WEIGHTS)
    np.testing.assert_allclose(losses, sum(WEIGHTS) * np.log(4))


def test_the_budget_is_k_times_the_naive_error_and_never_nothing() -> None:
    exact = np.array([1.0, -2.0])
    naive = np.array([1.0, -2.0 + 2**-10], "float32")
    assert error_budget(exact, naive, k=3) == 3 * 2**-10
    assert error_budget(exact, exact.astype("float32"), k=3) == 3 * 2 * 2**-23
