"""The measures beside loops that say what they mean."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import measures
from keras_mrl_serving.index.facts import IndexFacts
from keras_mrl_serving.index.measures import (
    average_precision_by_label,
    exact_neighbors,
    precision_by_label,
    recall_against,
)
from keras_mrl_serving.results import Neighbors
from tests.serving.index.truth import METRICS, Array, Refuses, Search, assert_nearest, drawn


@st.composite
def answers(draw: st.DrawFn) -> tuple[Array, Array, Array, Array]:
    """Rows found, the true ones, labels of the gallery and of the queries."""
    rows, queries = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    k = draw(st.integers(1, rows))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    found, truth = (np.array([rng.permutation(rows)[:k] for _ in range(queries)]) for _ in "ft")
    return found, truth, rng.integers(0, 3, rows), rng.integers(0, 3, queries)


@given(answers())
def test_recall_is_the_share_of_the_true_neighbours_found(answer: tuple[Array, ...]) -> None:
    found, truth, _, _ = answer
    expected = [len(set(f) & set(t)) / len(t) for f, t in zip(found, truth, strict=True)]
    measured = recall_against(truth)(found)
    assert measured.dtype == np.float64
    np.testing.assert_allclose(measured, expected, rtol=0, atol=1e-15)
    assert (recall_against(truth)(truth[:, ::-1]) == 1).all()


@given(answers())
def test_precision_is_the_share_of_neighbours_with_the_label(answer: tuple[Array, ...]) -> None:
    found, _, have, want = answer
    expected = [np.mean([have[r] == w for r in f]) for f, w in zip(found, want, strict=True)]
    measured = precision_by_label(have.tolist(), want.tolist())(found)
    np.testing.assert_allclose(measured, expected, rtol=0, atol=1e-15)


@given(answers())
def test_average_precision_is_the_precision_at_every_hit_over_k(answer: tuple[Array, ...]) -> None:
    found, _, have, want = answer
    expected = []
    for row, wanted in zip(found, want, strict=True):
        hits, total = 0, 0.0
        for rank, neighbour in enumerate(row, start=1):
            if have[neighbour] == wanted:
                hits += 1
                total += hits / rank
        expected.append(total / len(row))
    measured = average_precision_by_label(have, want)(found)
    np.testing.assert_allclose(measured, expected, rtol=0, atol=1e-15)


def test_labels_may_be_names() -> None:
    names = ["lynx", "ibex", "lynx"]
    found = np.array([[0, 1, 2]])
    assert precision_by_label(names, ["lynx"])(found).tolist() == [2 / 3]
    assert average_precision_by_label(names, ["lynx"])(found).tolist() == [(1 + 2 / 3) / 3]


@given(
    st.integers(0, 2**32),
    st.sampled_from(METRICS),
    st.integers(1, 50),
    st.integers(1, 30),
    st.sampled_from([1, 2, 7, 49, 50, 51, 1000]),
)
def test_exact_neighbours_are_the_nearest_whatever_the_chunks(
    seed: int, metric: str, k: int, dim: int, rows_at_once: int
) -> None:
    gallery, queries = drawn(seed, 50, 30), drawn(seed + 1, 25, 30)
    facts = IndexFacts(FunnelSchedule((30,), (), 1), metric)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "_ROWS_AT_ONCE", rows_at_once)
        rows = exact_neighbors(gallery.astype(np.float64), queries, k, dim, facts)
    assert rows.dtype == np.int64
    assert rows.shape == (25, k)
    assert all(len(set(row)) == k for row in rows.tolist())
    search = Search(queries, gallery, FunnelSchedule((dim,), (), k), np.arange(50), metric)
    scores = np.take_along_axis(search.true_scores(), rows, 1)
    order = np.argsort(-scores, axis=1, kind="stable")  # of near-ties; the loop below bounds them
    assert_nearest(as_found(np.take_along_axis(rows, order, 1), search.true_scores()), search)
    slack = np.take_along_axis(search.slack(), rows, 1)
    assert (scores[:, :-1] + slack[:, :-1] >= scores[:, 1:] - slack[:, 1:]).all()


def as_found(rows: Array, scores: Array) -> Neighbors:
    return Neighbors(rows, np.take_along_axis(scores, rows, 1).astype(np.float32))


def test_exact_neighbours_of_a_gallery_that_is_not_finite(refuses: Refuses) -> None:
    gallery = drawn(0, 9, 4)
    gallery[8, 0] = np.nan
    text = (
        "The gallery must be finite, and so must the squares of their lengths in float32. "
        "Received: NaN, infinity, or rows longer than 1e19. "
        "Look for failed rows where the embeddings were made."
    )
    with refuses(ValueError, text):
        exact_neighbors(gallery, gallery[:1], 1, 4, IndexFacts(FunnelSchedule((4,), (), 1)))
