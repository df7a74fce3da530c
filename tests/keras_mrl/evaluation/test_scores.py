"""What neighbours are worth, beside scikit-learn's on handwritten digits."""

import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from keras_mrl.evaluation import neighbors as neighbors_module
from keras_mrl.evaluation import score_embeddings
from keras_mrl.evaluation.evaluate import _vote
from tests.helpers.laws import exactly

pytestmark = pytest.mark.backend

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


@pytest.mark.parametrize("k", [1, 2, 5, 10])
@pytest.mark.parametrize("classes", [2, 4, 1000])
@pytest.mark.parametrize("dtype", [int, str])
def test_the_vote_is_the_most_frequent_label_and_of_equal_ones_the_smallest(
    k: int, classes: int, dtype: type[Any]
) -> None:
    named = RNG.integers(0, classes, (500, k)).astype(dtype)
    for row, found in zip(named.tolist(), _vote(named).tolist(), strict=True):
        votes = Counter(row)
        assert found == min(label for label in votes if votes[label] == max(votes.values()))


def test_the_memory_of_a_vote_does_not_grow_with_the_labels() -> None:
    peaks = []
    for classes in (10, 50_000):
        named = RNG.integers(0, classes, (10_000, 10))
        tracemalloc.start()
        _vote(named)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
    assert peaks[1] < 8 * named.nbytes


def test_labels_may_be_columns() -> None:
    gallery, queries = FEATURES[GALLERY[:200]], FEATURES[QUERIES[:50]]
    shown, asked = DIGITS.target[GALLERY[:200]], DIGITS.target[QUERIES[:50]]
    plain = score_embeddings(queries, asked, gallery, shown, (4, 64))
    assert score_embeddings(queries, asked[:, None], gallery, shown[:, None], (4, 64)) == plain


def test_labels_of_two_kinds_are_refused() -> None:
    gallery, queries = FEATURES[GALLERY[:200]], FEATURES[QUERIES[:50]]
    shown, asked = DIGITS.target[GALLERY[:200]], DIGITS.target[QUERIES[:50]].astype(str)
    sentence = (
        "Labels of queries and gallery must be of one kind. "
        "Received: strings for the queries, numbers for the gallery. "
        "Name the classes alike on both sides, best by integers."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        score_embeddings(queries, asked, gallery, shown, (4, 64))


@pytest.mark.parametrize("k", [0, -3, 2.0, True, "10", None])
def test_k_is_a_positive_integer(k: Any) -> None:
    x, y = FEATURES[:30], DIGITS.target[:30]
    text = f"k must be a positive integer. Received: k={k!r}. Give for example 10."
    with pytest.raises(ValueError, match=exactly(text)):
        score_embeddings(x, y, x, y, (4,), k=k)


def test_k_may_be_an_integer_of_any_library() -> None:
    x, y = FEATURES[:30], DIGITS.target[:30]
    found = score_embeddings(x, y, x, y, (4,), k=np.int64(3))  # type: ignore[arg-type]
    assert found == score_embeddings(x, y, x, y, (4,), k=3)
    assert list(found[4]) == ["nn1", "knn", "p3", "map3", "recall3"]


def test_progress_shows_before_the_widest_search_is_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(neighbors_module, "_ROWS", 10)
    x, y = FEATURES[:30], DIGITS.target[:30]
    score_embeddings(x, y, x, y, (64,), k=3, verbose=1)
    said = capsys.readouterr().out
    assert "0/3" in said
    assert "3/3" in said
