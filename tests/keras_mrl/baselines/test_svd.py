from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl.baselines import low_rank_head
from tests.helpers import digits
from tests.helpers.laws import exactly

pytestmark = pytest.mark.backend

RANDOM = np.random.default_rng(0)
KERNEL, BIAS = RANDOM.normal(size=(9, 5)).astype("float32"), RANDOM.normal(size=5)
FEATURES = RANDOM.normal(size=(20, 9)).astype("float32")


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_it_is_numpys_truncated_svd(dim: int) -> None:
    left, singular, right = np.linalg.svd(KERNEL.astype("float64"), full_matrices=False)
    nearest = (left[:, :dim] * singular[:dim]) @ right[:dim]
    head = low_rank_head(KERNEL, BIAS, dim)
    np.testing.assert_allclose(head.projection @ head.kernel, nearest, atol=1e-6)
    np.testing.assert_allclose(head.logits(FEATURES), FEATURES @ nearest + BIAS, atol=1e-5)
    error = np.linalg.norm(KERNEL - head.projection @ head.kernel)
    assert error == pytest.approx(np.sqrt((singular[dim:] ** 2).sum()), rel=1e-5)  # the least


@pytest.mark.parametrize("dim", [5, 7, 9])
def test_from_the_rank_on_it_is_the_full_head(dim: int) -> None:
    head = low_rank_head(KERNEL, BIAS, dim)
    assert head.projection.shape == (9, dim)
    assert head.kernel.shape == (dim, 5)
    np.testing.assert_allclose(head.logits(FEATURES), FEATURES @ KERNEL + BIAS, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 5, 9])
def test_coordinates_are_a_rotation_of_the_features(dim: int) -> None:
    head = low_rank_head(KERNEL, BIAS, dim)
    np.testing.assert_allclose(head.projection.T @ head.projection, np.eye(dim), atol=1e-6)
    np.testing.assert_allclose(head.embed(FEATURES), FEATURES @ head.projection, atol=1e-6)


def test_without_bias_there_is_none() -> None:
    head = low_rank_head(KERNEL, None, 5)
    np.testing.assert_allclose(head.logits(FEATURES), FEATURES @ KERNEL, atol=1e-5)


def test_a_nested_net_is_far_above_it_at_small_dims() -> None:
    full = digits.trained(dims=(digits.WIDTH,))
    features, labels = digits.features(full, digits.TEST), digits.Y[digits.TEST]
    kernel, bias = full.head.weights_at(digits.WIDTH)
    accuracy = {
        dim: (low_rank_head(kernel, bias, dim).logits(features).argmax(-1) == labels).mean()
        for dim in (2, digits.WIDTH)
    }
    nested = digits.trained().predict(digits.X[digits.TEST], batch_size=1000, verbose=0)
    assert (nested[:, 0].argmax(-1) == labels).mean() > accuracy[2] + 0.3
    assert accuracy[digits.WIDTH] > 0.95


@pytest.mark.parametrize("kernel", [np.ones(3), np.full((3, 2), np.nan), np.zeros((0, 2))])
def test_what_is_no_kernel_is_refused(kernel: Any) -> None:
    sentence = (
        "kernel must be a finite matrix (width, num_classes). "
        f"Received: float64 of shape {kernel.shape}. "
        "Give that of a trained head: model.head.weights_at(width)[0]."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        low_rank_head(kernel, None, 1)


def test_more_dims_than_the_width_are_refused() -> None:
    sentence = (
        "dims must not exceed the width of the features. "
        "Received: dims=(10,) for features of width 9. "
        "Drop the dims above 9, or widen the layer that makes the features."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        low_rank_head(keras.ops.convert_to_tensor(KERNEL), None, 10)


@pytest.mark.parametrize("bias", [np.zeros(4), np.zeros(()), np.zeros((1, 5)), np.full(5, np.inf)])
def test_a_bias_is_a_finite_number_per_class(bias: Any) -> None:
    sentence = (
        "bias must be finite numbers, one per class. "
        f"Received: float64 of shape {bias.shape} for 5 classes. "
        "Give that of the same head: model.head.weights_at(width)[1]."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        low_rank_head(KERNEL, bias, 2)


@pytest.mark.parametrize("width", [8, 10])
def test_a_head_reads_the_width_it_was_factored_from(width: int) -> None:
    sentence = (
        "Features must be as wide as those fitted. "
        f"Received: width {width}, fitted on 9. Embed with the same backbone."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        low_rank_head(KERNEL, BIAS, 2).logits(np.ones((3, width)))
