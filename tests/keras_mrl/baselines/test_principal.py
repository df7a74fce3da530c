from typing import Any

import numpy as np
import pytest
from sklearn.decomposition import PCA

from keras_mrl.baselines import principal_components, reductions
from tests.helpers.laws import exactly

RANDOM = np.random.default_rng(0)
FEATURES = RANDOM.normal(size=(50, 6)) @ RANDOM.normal(size=(6, 6)) + RANDOM.normal(size=6)


@pytest.mark.parametrize("dim", [1, 3, 6])
def test_it_is_scikit_learns(dim: int) -> None:
    expected = PCA(dim, svd_solver="full").fit(FEATURES)
    received = principal_components(FEATURES, dim)
    np.testing.assert_allclose(received.mean, expected.mean_, rtol=1e-12)
    np.testing.assert_allclose(received.components, expected.components_.T, atol=1e-10)
    np.testing.assert_allclose(
        received.embed(FEATURES), expected.transform(FEATURES), rtol=1e-8, atol=1e-8
    )


def test_it_is_numpys_svd_of_the_centred_features() -> None:
    _, _, right = np.linalg.svd(FEATURES - FEATURES.mean(0), full_matrices=False)
    components = principal_components(FEATURES, 4).components
    np.testing.assert_allclose(np.abs(components), np.abs(right[:4].T), atol=1e-10)


def test_rows_come_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = principal_components(FEATURES, 6)
    monkeypatch.setattr(reductions, "_ROWS", 7)
    blocks = principal_components(FEATURES, 6)
    np.testing.assert_allclose(blocks.components, whole.components, atol=1e-10)


def test_fewer_dims_are_the_first_columns() -> None:
    wide, narrow = (principal_components(FEATURES, dim) for dim in (5, 2))
    np.testing.assert_array_equal(wide.components[:, :2], narrow.components)


def test_float32_far_from_zero_loses_nothing() -> None:
    far = (FEATURES + 1000).astype("float32")
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


@pytest.mark.parametrize("dim", [0, 7])
def test_dims_that_are_not_there_are_refused(dim: int) -> None:
    with pytest.raises(ValueError, match="dims must"):
        principal_components(FEATURES, dim)


@pytest.mark.parametrize("width", [5, 7])
def test_components_read_the_width_they_were_fitted_on(width: int) -> None:
    sentence = (
        "Features must be as wide as those fitted. "
        f"Received: width {width}, fitted on 6. Embed with the same backbone."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        principal_components(FEATURES, 2).embed(np.ones((3, width)))
