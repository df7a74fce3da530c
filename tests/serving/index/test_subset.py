"""The rows of a filter as an index of their own: as near to a query as they are in the whole."""

from functools import cache
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving.index import FirstStage
from keras_mrl_serving.index.base import best_first
from keras_mrl_serving.index.first_stage import import_faiss
from keras_mrl_serving.index.shortlister import Shortlister
from keras_mrl_serving.index.subset import row_codes, subset_index
from keras_mrl_serving.projection import Projection
from tests.helpers.galleries import clusters

ROWS = clusters(0, 700, 20)  # not a multiple of the 32 rows of a block
QUERIES = clusters(1, 25, 20)
TURN = np.linalg.qr(np.random.default_rng(0).normal(size=(20, 20)))[0]

GRAPHS = ["HNSW8", "HNSW8_SQ8", "HNSW8_SQbf16", "PCA10,HNSW8", "Projected8,HNSW8_SQ8"]
CODES = ["PQ10x4fs", "PQ5x4fs", "PCA8,PQ4x4fs", "OPQ5_10,PQ5x4fs", "Projected8,PQ4x4fs"]
OTHERS = ["Flat", "SQ8", "PQ10x4fs_64", "IVF8,PQ10x4fs", "IVF8_HNSW8,Flat", "RaBitQ"]


@cache
def built(factory: str, metric: str = "cosine") -> Shortlister:
    projection = Projection(TURN, (8,)) if factory.startswith("Projected") else None
    spec = FirstStage.usual(factory)
    spec = FirstStage(factory, spec.settings, projection)
    return Shortlister.build(ROWS, spec, metric, lambda _done, _rows: None)


def taken(first: Any, rows: Any) -> Any:
    faiss = import_faiss()
    codes = row_codes(faiss, first)
    assert codes is not None
    return subset_index(faiss, first, codes, rows)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("factory", [*GRAPHS, *CODES])
@pytest.mark.parametrize("left", [350, 33, 32, 1])
def test_rows_are_as_near_as_in_the_whole(factory: str, metric: str, left: int) -> None:
    first = built(factory, metric)
    if "HNSW" in factory:
        first.set("efSearch=700")  # all rows
    rows = np.sort(np.random.default_rng(left).permutation(700)[:left])
    index = taken(first.index, rows)
    scores, numbers = index.search(QUERIES, left)
    assert (np.sort(numbers, axis=1) == rows).all()
    every_score, every_number = first.index.search(QUERIES, 700)
    for query in range(len(QUERIES)):
        there = every_number[query] >= 0  # a graph may not lead to all
        score_of = dict(zip(every_number[query, there], every_score[query, there], strict=True))
        pairs = zip(numbers[query].tolist(), scores[query].tolist(), strict=True)
        compared = [(score_of[number], score) for number, score in pairs if number in score_of]
        assert len(compared) > 0.8 * left - 1
        expected, received = np.array(compared).reshape(-1, 2).T
        np.testing.assert_allclose(received, expected, rtol=1e-4, atol=1e-4)
    order = best_first(numbers, scores if metric != "l2" else -scores)
    np.testing.assert_array_equal(np.take_along_axis(scores, order, 1), scores)


@pytest.mark.parametrize("factory", CODES[:-1])  # FAISS clones no projection
def test_codes_of_4_bits_are_packed_as_faiss_packs_them(factory: str) -> None:
    """Beside FAISS's own way, which removes rows one by one."""
    faiss = import_faiss()
    first = built(factory)
    rows = np.flatnonzero(np.random.default_rng(0).random(700) < 0.6)
    ours = taken(first.index, rows)
    theirs = faiss.clone_index(first.index)
    inner = theirs
    while isinstance(inner := faiss.downcast_index(inner), faiss.IndexPreTransform):
        inner = inner.index
    inner.remove_ids(np.setdiff1d(np.arange(700), rows))
    scores, numbers = theirs.search(QUERIES, 20)
    our_scores, our_numbers = ours.search(QUERIES, 20)
    np.testing.assert_array_equal(our_scores, scores)
    np.testing.assert_array_equal(np.sort(our_numbers), np.sort(rows[numbers]))


def test_a_graph_over_codes_of_another_kind_is_walked() -> None:
    first = built("HNSW8_PQ2x4")
    assert taken(first.index, np.arange(5)) is None


@pytest.mark.parametrize("factory", OTHERS)
def test_other_kinds_have_no_codes_to_take(factory: str) -> None:
    assert row_codes(import_faiss(), built(factory).index) is None


@pytest.mark.parametrize("factory", ["PCA8,PQ4x4fs", "HNSW8_SQ8"])
def test_a_subset_lives_as_long_as_it_is_held(factory: str) -> None:
    """FAISS frees what Python no longer holds: transforms, quantisers, the numbers of rows."""
    faiss = import_faiss()
    first = faiss.clone_index(built(factory).index)
    index = taken(first, np.arange(0, 700, 7))
    expected = index.search(QUERIES, 5)[1]
    del first
    others = [np.ones(size) for size in range(1, 20_000, 7)]
    np.testing.assert_array_equal(index.search(QUERIES, 5)[1], expected)
    assert others
