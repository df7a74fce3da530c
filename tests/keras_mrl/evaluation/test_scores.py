"""The measures of every dim, beside scikit-learn's on handwritten digits."""

from typing import Any

import keras
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead
from keras_mrl.evaluation import (
    evaluate,
    expected_calibration_error,
    score_embeddings,
    score_head,
)
from keras_mrl.evaluation import neighbors as neighbors_module
from keras_mrl.evaluation.neighbors import nearest_ids
from tests.laws import exactly

pytestmark = pytest.mark.backend

DIMS = (4, 16, 64)
RNG = np.random.default_rng(0)
DIGITS = load_digits()
ROWS = RNG.permutation(len(DIGITS.target))
# Noise, so that no two neighbours are equally near.
FEATURES = (DIGITS.data + RNG.normal(size=DIGITS.data.shape, scale=1)).astype(np.float32)
GALLERY, QUERIES = ROWS[:1200], ROWS[1200:]


def cut(rows: Any, dim: int) -> Any:
    part = FEATURES[rows, 16 : 16 + dim].astype(np.float64)  # the first rows of pixels are empty
    return part / np.linalg.norm(part, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def scores() -> Any:
    wide = np.concatenate([FEATURES[:, 16:], FEATURES[:, :16]], axis=1)
    labels = DIGITS.target
    return score_embeddings(
        wide[QUERIES], labels[QUERIES], wide[GALLERY], labels[GALLERY], (4, 16, 48), k=10
    )


@pytest.mark.parametrize("dim", [4, 16, 48])
def test_neighbours_are_scikit_learns(scores: Any, dim: int) -> None:
    gallery, queries = cut(GALLERY, dim), cut(QUERIES, dim)
    labels, wanted = DIGITS.target[GALLERY], DIGITS.target[QUERIES]
    for name, k in (("nn1", 1), ("knn", 10)):
        fitted = KNeighborsClassifier(k, algorithm="brute").fit(gallery, labels)
        assert scores[dim][name] == pytest.approx(fitted.score(queries, wanted))
    found = NearestNeighbors(n_neighbors=10).fit(gallery).kneighbors(queries)[1]
    assert scores[dim]["p10"] == pytest.approx((labels[found] == wanted[:, None]).mean())
    exact = NearestNeighbors(n_neighbors=10).fit(cut(GALLERY, 48)).kneighbors(cut(QUERIES, 48))[1]
    shared = [len(set(a) & set(b)) / 10 for a, b in zip(found, exact, strict=True)]
    assert scores[dim]["recall10"] == pytest.approx(np.mean(shared))
    assert 0 < scores[dim]["map10"] <= scores[dim]["p10"]


def test_a_head_is_scored_as_scikit_learn_does() -> None:
    kernel, bias = RNG.normal(size=(32, 10)) / 50, RNG.normal(size=10)
    logits = FEATURES[:, :32] @ kernel.astype(np.float32) + bias
    found = score_head(FEATURES, DIGITS.target, kernel, bias)
    assert found["top1"] == pytest.approx((logits.argmax(1) == DIGITS.target).mean())
    assert found["top5"] == pytest.approx(top_k_accuracy_score(DIGITS.target, logits, k=5))
    assert found["ece"] == pytest.approx(
        expected_calibration_error(logits, DIGITS.target), abs=1e-6
    )


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_the_calibration_error_is_its_loop(bins: int) -> None:
    logits = RNG.normal(size=(300, 5), scale=2)
    labels = RNG.integers(0, 5, 300)
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    total = 0.0
    for bin_ in range(bins):
        inside = [i for i in range(300) if bin_ / bins <= shares[i].max() < (bin_ + 1) / bins]
        if inside:
            right = np.mean([shares[i].argmax() == labels[i] for i in inside])
            sure = np.mean([shares[i].max() for i in inside])
            total += len(inside) / 300 * abs(right - sure)
    assert expected_calibration_error(logits, labels, bins) == pytest.approx(total, abs=1e-6)


@pytest.mark.parametrize("rows", [10, 11, 700, 5000])
def test_nearest_rows_do_not_depend_on_the_blocks(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery, queries = RNG.normal(size=(rows, 12)), RNG.normal(size=(33, 12))
    whole = nearest_ids(gallery, queries, 8, 10)
    unit = gallery[:, :8] / np.linalg.norm(gallery[:, :8], axis=1, keepdims=True)
    np.testing.assert_array_equal(whole, np.argsort(-(queries[:, :8] @ unit.T), axis=1)[:, :10])
    monkeypatch.setattr(neighbors_module, "_ROWS", 7)
    monkeypatch.setattr(neighbors_module, "_QUERIES", 5)
    np.testing.assert_array_equal(nearest_ids(gallery, queries, 8, 10), whole)


def test_of_equal_rows_the_earlier_is_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors_module, "_ROWS", 4)
    gallery = np.ones((30, 3))
    assert nearest_ids(gallery, gallery[:2], 3, 6).tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def model_and_rows() -> tuple[Any, Any, Any]:
    keras.utils.set_random_seed(0)
    backbone = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])
    model = MatryoshkaClassifier(backbone, MatryoshkaHead(10, dims=DIMS))
    return model, DIGITS.data.astype(np.float32) / 16, DIGITS.target


def test_one_pass_gives_all_measures() -> None:
    model, x, y = model_and_rows()
    few, shown = QUERIES[:200], GALLERY[:300]
    quality = evaluate(model, x[few], y[few], (x[shown], y[shown]), probe=True, verbose=0)
    logits = model.predict(x[few], verbose=0)
    features = model.backbone.predict(x, verbose=0)
    names = ["top1", "top5", "ece", "nn1", "knn", "p10", "map10", "recall10", "probe"]
    for index, dim in enumerate(DIMS):
        assert list(quality[dim]) == names
        assert all(type(value) is float for value in quality[dim].values())
        assert quality[dim]["top1"] == pytest.approx((logits[:, index].argmax(-1) == y[few]).mean())
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        probe.fit(features[shown, :dim], y[shown])
        expected = probe.score(features[few, :dim], y[few])
        assert quality[dim]["probe"] == pytest.approx(expected, abs=0.011)  # two rows of 200
    assert quality[64]["recall10"] == 1
    only = evaluate(model, x[few], y[few], dims=(16,), verbose=0)
    assert only == {16: {name: quality[16][name] for name in names[:3]}}


def test_a_dim_without_a_head_has_neighbours_alone() -> None:
    model, x, y = model_and_rows()
    quality = evaluate(model, x[:50], y[:50], (x[50:200], y[50:200]), dims=(10, 16), k=3, verbose=0)
    assert list(quality[10]) == ["nn1", "knn", "p3", "map3", "recall3"]
    assert "top1" in quality[16]


def test_what_cannot_be_judged_is_refused() -> None:
    encoder = keras.Sequential([keras.Input((64,)), keras.layers.Dense(8)], name="encoder")
    _, x, y = model_and_rows()
    text = (
        "evaluate needs dims for a model that ends in no MatryoshkaHead. "
        "Received: dims=None for Sequential 'encoder'. "
        "Give the prefix lengths to judge: dims=(8, 16, 32)."
    )
    with pytest.raises(ValueError, match=exactly(text)):
        evaluate(encoder, x, y, (x, y))
    text = (
        "Without a head dims are judged by their neighbours. "
        "Received: gallery=None for Sequential 'encoder'. "
        "Give gallery=(x, y), rows of training for example."
    )
    with pytest.raises(ValueError, match=exactly(text)):
        evaluate(encoder, x, y, dims=(4, 8))
    model, x, y = model_and_rows()
    text = (
        "Without a gallery dims are judged by the head, which has (4, 16, 64). "
        "Received: dims=(10, 16). Give those of the head, or gallery=(x, y)."
    )
    with pytest.raises(ValueError, match=exactly(text)):
        evaluate(model, x[:9], y[:9], dims=(10, 16), verbose=0)
    for labels, received in (
        (y[:9] + 2, "int64 labels from 2 to 10"),
        (y[:9] / 2, "float64 labels"),
    ):
        text = (
            f"labels must be class ids in 0..9. Received: {received}. "
            "Number the classes from 0, as in training."
        )
        with pytest.raises(ValueError, match=exactly(text)):
            evaluate(model, x[:9], labels, verbose=0)
    for k in (0, 2.0, True):
        text = f"k must be a positive integer. Received: k={k!r}. Give for example 10."
        with pytest.raises(ValueError, match=exactly(text)):
            score_embeddings(x, y, x, y, (4,), k=k)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\Abins must be a positive integer. Received: bins=0. "):
        expected_calibration_error(np.zeros((2, 2)), [0, 1], bins=0)
