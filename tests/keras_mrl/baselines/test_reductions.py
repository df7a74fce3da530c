"""Nets of one dim, and the features of such a net cut to fewer coordinates."""

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from sklearn.decomposition import PCA

from keras_mrl import MatryoshkaClassifier
from keras_mrl.baselines import (
    first_coordinates,
    fixed_features,
    low_rank_head,
    principal_components,
    random_probe,
)
from keras_mrl.evaluation import linear_probe
from tests.helpers import digits
from tests.helpers.laws import exactly
from tests.helpers.small_models import (
    NUM_CLASSES,
    X,
    Y,
    as_numpy,
    classifier,
    compiled,
    cross_entropy,
)

RANDOM = np.random.default_rng(0)
LABELS = np.arange(60) % 3
SHIFTED = (RANDOM.normal(size=(60, 8)) + LABELS[:, None]).astype("float32")
MIXED = RANDOM.normal(size=(50, 6)) @ RANDOM.normal(size=(6, 6)) + RANDOM.normal(size=6)
KERNEL, BIAS = RANDOM.normal(size=(9, 5)).astype("float32"), RANDOM.normal(size=5)
PLAIN = RANDOM.normal(size=(20, 9)).astype("float32")


def body(dim: int) -> keras.Model:
    return keras.Sequential([keras.Input((5,)), keras.layers.Dense(dim)])


def train(model: MatryoshkaClassifier) -> None:
    compiled(model).fit(X, Y, epochs=2, batch_size=12, verbose=0)


@pytest.mark.backend
def test_there_is_a_net_per_dim_each_as_if_trained_alone() -> None:
    initial: list[list[Any]] = []

    def watched(model: MatryoshkaClassifier) -> None:
        model(X)
        initial.append(model.get_weights())
        train(model)

    models = fixed_features(body, NUM_CLASSES, (2, 4), watched)
    assert [*models] == [2, 4]
    for (dim, model), weights in zip(models.items(), initial, strict=True):
        plain = keras.Sequential([*body(dim).layers, keras.layers.Dense(NUM_CLASSES)])
        plain.compile(keras.optimizers.SGD(0.1), cross_entropy())
        plain(X)
        plain.set_weights(weights)
        plain.fit(X, Y, epochs=2, batch_size=12, verbose=0)
        expected = plain.predict(X, verbose=0)
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(as_numpy(model(X))[:, 0], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(as_numpy(model.at(dim)(X)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.backend
def test_the_recipe_is_that_of_a_nested_net() -> None:
    train(classifier())
    received: list[MatryoshkaClassifier] = []
    models = fixed_features(body, NUM_CLASSES, (2, 4), received.append)
    assert received == [*models.values()]


@pytest.mark.parametrize("width", [2, 8])
def test_a_backbone_of_another_width_is_refused_before_it_is_trained(width: int) -> None:
    sentence = (
        "make_backbone must return features of the width it is asked for. "
        f"Received: a backbone of width {width} for dim 4. End it with keras.layers.Dense(dim)."
    )
    trained: list[MatryoshkaClassifier] = []
    with pytest.raises(ValueError, match=exactly(sentence)):
        fixed_features(lambda _: body(width), NUM_CLASSES, (4,), trained.append)
    assert not trained


def test_dims_that_do_not_ascend_are_refused() -> None:
    sentence = (
        "dims must be strictly increasing positive integers. Received: dims=(4, 2). "
        "Sort them and drop repeats: dims=(2, 4)."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        fixed_features(body, NUM_CLASSES, (4, 2), train)


def test_the_first_coordinates_are_the_first() -> None:
    np.testing.assert_array_equal(first_coordinates(SHIFTED, 3), SHIFTED[:, :3])


@pytest.mark.parametrize("dim", [1, 5, 8])
def test_the_probe_reads_its_coordinates_alone(dim: int) -> None:
    probe = random_probe(SHIFTED, LABELS, dim, seed=1)
    assert len(set(probe.indices)) == dim
    expected = linear_probe(SHIFTED[:, probe.indices], LABELS)
    np.testing.assert_array_equal(
        probe.predict(SHIFTED), expected.predict(SHIFTED[:, probe.indices])
    )
    changed = SHIFTED.copy()
    changed[:, np.setdiff1d(np.arange(8), probe.indices)] = 1e6
    np.testing.assert_array_equal(probe.predict(changed), probe.predict(SHIFTED))


def test_smaller_dims_are_the_first_of_larger_ones() -> None:
    small, large = (random_probe(SHIFTED, LABELS, dim, seed=2).indices for dim in (2, 6))
    np.testing.assert_array_equal(large[:2], small)


def test_another_seed_chooses_others() -> None:
    chosen = {tuple(random_probe(SHIFTED, LABELS, 4, seed=seed).indices) for seed in range(4)}
    assert len(chosen) == 4
    again = random_probe(SHIFTED, LABELS, 4, seed=3).indices
    assert tuple(again) in chosen


def test_labels_of_another_length_are_refused() -> None:
    sentence = (
        "labels must hold one label per row of the features. "
        "Received: labels of shape (59,) for features of shape (60, 4). "
        "Give integer labels, not one-hot rows."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        random_probe(SHIFTED, LABELS[1:], 4)


@pytest.mark.parametrize(
    "reduce",
    [
        first_coordinates,
        principal_components,
        lambda features, dim: random_probe(features, LABELS, dim),
        lambda features, dim: low_rank_head(features[:8].T, None, dim),
    ],
)
@pytest.mark.parametrize(
    ("dim", "sentence"),
    [
        (0, "dims must be strictly increasing positive integers. Received: dims=(0,). "),
        (9, "dims must not exceed the width of the features. Received: dims=(9,) for features of "),
    ],
)
def test_dims_that_are_not_there_are_refused(
    reduce: Callable[[Any, int], Any], dim: int, sentence: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
        reduce(SHIFTED, dim)


@pytest.mark.parametrize("dim", [1, 3, 6])
def test_principal_components_are_scikit_learns(dim: int) -> None:
    expected = PCA(dim, svd_solver="full").fit(MIXED)
    received = principal_components(MIXED, dim)
    np.testing.assert_allclose(received.mean, expected.mean_, rtol=1e-12)
    np.testing.assert_allclose(received.components, expected.components_.T, atol=1e-10)
    np.testing.assert_allclose(
        received.embed(MIXED), expected.transform(MIXED), rtol=1e-8, atol=1e-8
    )


def test_principal_components_are_numpys_svd_of_the_centred_features() -> None:
    _, _, right = np.linalg.svd(MIXED - MIXED.mean(0), full_matrices=False)
    components = principal_components(MIXED, 4).components
    np.testing.assert_allclose(np.abs(components), np.abs(right[:4].T), atol=1e-10)


def test_more_rows_than_a_block_are_all_counted() -> None:
    many = RANDOM.normal(size=(5000, 6)) * np.arange(1, 7) + MIXED[0]
    many[4096:] *= [5, 1, 1, 1, 1, 1]
    expected = PCA(6, svd_solver="full").fit(many)
    components = principal_components(many, 6).components
    np.testing.assert_allclose(np.abs(components), np.abs(expected.components_.T), atol=1e-8)


def test_fewer_dims_are_the_first_columns() -> None:
    wide, narrow = (principal_components(MIXED, dim) for dim in (5, 2))
    np.testing.assert_array_equal(wide.components[:, :2], narrow.components)


def test_float32_far_from_zero_loses_nothing() -> None:
    far = (MIXED + 1000).astype("float32")
    received = principal_components(far, 3)
    expected = PCA(3, svd_solver="full").fit(far.astype("float64"))
    assert received.components.dtype == np.float32
    np.testing.assert_allclose(received.components, expected.components_.T, atol=1e-5)


def test_the_directions_are_orthonormal_even_where_nothing_varies() -> None:
    flat = np.ones((3, 5), "float32")
    components = principal_components(flat, 5).components
    np.testing.assert_allclose(components.T @ components, np.eye(5), atol=1e-6)


@pytest.mark.parametrize(
    "features", [np.ones(3), np.ones((0, 3)), np.full((2, 2), np.inf), np.ones((2, 2, 2))]
)
def test_what_is_no_table_is_refused(features: Any) -> None:
    sentence = (
        "features must be finite numbers (rows, width) with at least one row. "
        f"Received: float64 of shape {features.shape}. "
        "Give what backbone.predict(inputs) returns."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        principal_components(features, 1)


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_a_low_rank_head_is_numpys_truncated_svd(dim: int) -> None:
    left, singular, right = np.linalg.svd(KERNEL.astype("float64"), full_matrices=False)
    nearest = (left[:, :dim] * singular[:dim]) @ right[:dim]
    head = low_rank_head(KERNEL, BIAS, dim)
    np.testing.assert_allclose(head.projection @ head.kernel, nearest, atol=1e-6)
    np.testing.assert_allclose(head.logits(PLAIN), PLAIN @ nearest + BIAS, atol=1e-5)
    error = np.linalg.norm(KERNEL - head.projection @ head.kernel)
    assert error == pytest.approx(np.sqrt((singular[dim:] ** 2).sum()), rel=1e-5)  # the least


@pytest.mark.parametrize("dim", [5, 7, 9])
def test_from_the_rank_on_it_is_the_full_head(dim: int) -> None:
    head = low_rank_head(KERNEL, BIAS, dim)
    assert head.projection.shape == (9, dim)
    assert head.kernel.shape == (dim, 5)
    np.testing.assert_allclose(head.logits(PLAIN), PLAIN @ KERNEL + BIAS, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 5, 9])
def test_coordinates_are_a_rotation_of_the_features(dim: int) -> None:
    head = low_rank_head(KERNEL, BIAS, dim)
    np.testing.assert_allclose(head.projection.T @ head.projection, np.eye(dim), atol=1e-6)
    np.testing.assert_allclose(head.embed(PLAIN), PLAIN @ head.projection, atol=1e-6)


def test_without_bias_there_is_none() -> None:
    head = low_rank_head(KERNEL, None, 5)
    np.testing.assert_allclose(head.logits(PLAIN), PLAIN @ KERNEL, atol=1e-5)


@pytest.mark.backend
def test_a_nested_net_is_far_above_an_svd_at_small_dims() -> None:
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


@pytest.mark.backend
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


@pytest.mark.parametrize(
    ("reader", "width"),
    [
        (random_probe(SHIFTED, LABELS, 2).predict, 8),
        (random_probe(SHIFTED, LABELS, 2).embed, 8),
        (principal_components(MIXED, 2).embed, 6),
        (low_rank_head(KERNEL, BIAS, 2).embed, 9),
        (low_rank_head(KERNEL, BIAS, 2).logits, 9),
    ],
    ids=["probe", "coordinates", "components", "projection", "head"],
)
def test_features_are_as_wide_as_those_fitted(reader: Callable[[Any], Any], width: int) -> None:
    for other in (width - 1, width + 1):
        sentence = (
            "Features must be as wide as those fitted. "
            f"Received: width {other}, fitted on {width}. Embed with the same backbone."
        )
        with pytest.raises(ValueError, match=exactly(sentence)):
            reader(np.ones((3, other)))
