"""Exact search: the nearest rows, which of equal rows comes first, and how early hits come."""

import os
import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import average_precision_score, precision_score

from keras_mrl.evaluation import (
    mean_average_precision_at_k,
    precision_at_k,
    score_embeddings,
)
from keras_mrl.evaluation.neighbors import first_equal, nearest_by_dim, nearest_hits, nearest_ids
from tests.helpers.laws import exactly

RNG = np.random.default_rng(0)
HITS = RNG.random((40, 10)) < RNG.random((40, 1))
HITS[0], HITS[1] = True, False


@pytest.mark.parametrize("rows", [10, 11, 700, 5000])
def test_nearest_rows_do_not_depend_on_the_blocks(rows: int) -> None:
    gallery, queries = (
        RNG.normal(size=(rows, 12)),
        RNG.normal(size=(700, 12)),
    )  # two blocks of these
    unit = gallery[:, :8] / np.linalg.norm(gallery[:, :8], axis=1, keepdims=True)
    expected = np.argsort(-(queries[:, :8] @ unit.T), axis=1)[:, :10]
    for block_rows in (7, 8192):
        ids = nearest_ids(gallery, queries, 8, 10, block_rows=block_rows)
        np.testing.assert_array_equal(ids, expected)


def ranked(gallery: npt.NDArray[Any], queries: npt.NDArray[Any], dim: int, k: int) -> Any:
    """By a score per row that does not depend on where it stands, then by position."""
    cut = gallery[:, :dim].astype(np.float64)
    scores = (queries[:, None, :dim] * cut).sum(axis=-1) / np.linalg.norm(cut, axis=1)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def apart(rows: int, width: int, dim: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Rows at angles so different that no rounding takes one for another, and 300 queries."""
    axis = RNG.normal(size=dim)
    axis /= np.linalg.norm(axis)
    side = RNG.normal(size=(rows, dim))
    side -= (side @ axis)[:, None] * axis
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    angles = RNG.permutation(np.linspace(0.3, 1.4, rows))[:, None]
    cut = RNG.uniform(1, 3, (rows, 1)) * (np.cos(angles) * axis + np.sin(angles) * side)
    rest = RNG.normal(size=(rows, width - dim))
    queries = np.zeros((300, width))
    queries[:, :dim] = axis + 1e-4 * RNG.normal(size=(300, dim))
    return np.concatenate([cut, rest], axis=1).astype(np.float32), queries


@pytest.mark.parametrize("rows", [7, 23, 61, 300, 9000])
@pytest.mark.parametrize("block_rows", [5, 8192])
def test_of_equal_rows_the_earlier_is_nearer(rows: int, block_rows: int) -> None:
    """A matrix product gives equal rows values that differ in the last bit."""
    gallery = np.tile(RNG.normal(size=(1, 129)), (rows, 1))
    queries = RNG.normal(size=(20, 129))
    for part in (queries, *queries[:, None], queries[:3]):
        ids = nearest_ids(gallery, part, 129, 6, block_rows=block_rows)
        assert ids.tolist() == [[0, 1, 2, 3, 4, 5]] * len(part)


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize(("width", "dim"), [(64, 64), (64, 5), (200, 129)])
def test_copies_come_in_the_order_they_stand_in(k: int, width: int, dim: int) -> None:
    rows, queries = apart(50, width, dim)
    twice = np.concatenate([rows, rows])
    mixed = rows[RNG.integers(0, 50, 400)]
    for gallery in (twice, mixed):
        ids = nearest_ids(gallery, queries, dim, k, block_rows=61)
        np.testing.assert_array_equal(ids, ranked(gallery, queries, dim, k))


@pytest.mark.parametrize("dims", [(2, 5, 24), (5,), (17, 24)])
@pytest.mark.parametrize("block_rows", [7, 8192])
def test_one_pass_gives_what_every_dim_alone_gives(dims: tuple[int, ...], block_rows: int) -> None:
    """Rows of few beginnings: equal at some dims and not at others, in any order of ties."""
    gallery = RNG.normal(size=(300, 24)).astype(np.float32)
    gallery[:, :2] = gallery[RNG.integers(0, 6, 300), :2]
    gallery[:, :5] = gallery[RNG.integers(0, 60, 300), :5]
    gallery[200:] = gallery[RNG.integers(0, 200, 100)]
    queries, order = RNG.normal(size=(600, 24)), RNG.permutation(300)
    in_place = nearest_by_dim(gallery, queries, dims, 9, block_rows=block_rows)
    in_order = nearest_by_dim(gallery, queries, dims, 9, block_rows=block_rows, order=order)
    assert list(in_place) == list(in_order) == list(dims)
    for dim in dims:
        np.testing.assert_array_equal(in_place[dim], ranked(gallery, queries, dim, 9))
        expected = order[ranked(gallery[order], queries, dim, 9)]
        np.testing.assert_array_equal(in_order[dim], expected)


def test_a_row_is_its_own_copy_up_to_the_dim_alone() -> None:
    gallery = np.array([[3, 4, 0], [3, 4, 9], [-0.0, 1, 0], [0.0, 1, 5]], np.float32)
    queries = np.array([[3, 4, 9], [0, 1, 5]], np.float32)
    assert nearest_ids(gallery, queries, 2, 2).tolist() == [[0, 1], [2, 3]]
    assert nearest_ids(gallery, queries, 3, 1).tolist() == [[1], [3]]


@pytest.mark.parametrize("block_rows", [7, 8192])
def test_of_equal_scores_the_earlier_is_nearer(block_rows: int) -> None:
    """Different rows with exact products; copies of some stand between them."""
    rows = np.array([[1, y, z] for y in (4, -4) for z in range(-40, 40)], np.float32)
    gallery = np.concatenate([rows, rows[::3], rows])
    queries = np.array([[1, 0, 0], [0, 0, 0], [0, 1, 0]], np.float32)
    lengths = np.linalg.norm(gallery, axis=1)
    scores = queries @ gallery.T / lengths
    expected = np.argsort(-scores, axis=1, kind="stable")[:, :30]
    ids = nearest_ids(gallery, queries, 3, 30, block_rows=block_rows)
    np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize(("copies", "blocks"), [(1, 2), (3, 5)])
def test_progress_is_called_after_every_block(copies: int, blocks: int) -> None:
    gallery, calls = np.tile(RNG.normal(size=(11, 4)), (copies, 1)), []
    nearest_ids(gallery, gallery, 4, 5, lambda: calls.append(1), block_rows=8)
    assert len(calls) == blocks


def test_k_is_an_integer_of_any_library() -> None:
    gallery = RNG.normal(size=(30, 4))
    ids = nearest_ids(gallery, gallery, 4, np.int64(5))  # type: ignore[arg-type]
    np.testing.assert_array_equal(ids, nearest_ids(gallery, gallery, 4, 5))


def test_labels_of_two_kinds_are_refused() -> None:
    rows, names = np.eye(3), np.array(["a", "b", "c"])
    sentence = (
        "Labels of queries and gallery must be of one kind. "
        "Received: strings for the queries, numbers for the gallery. "
        "Name the classes alike on both sides, best by integers."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        nearest_hits(rows, [0, 1, 2], rows, names, 3, 1)
    assert nearest_hits(rows, names, rows, names.astype(object), 3, 1).all()


@pytest.mark.parametrize("dim", [1, 3, 16, 17, 40])
@pytest.mark.parametrize("values", [2, 3, 1000])
def test_the_first_of_equal_rows_is_found(dim: int, values: int) -> None:
    """Sparse rows, many alike at a glance, some of them equal to the end."""
    few = RNG.integers(0, values, (100, 40)) * (RNG.random((100, 40)) < 0.1)
    rows = few[RNG.integers(0, 100, 300)].astype(float)
    rows[rows == 0] *= np.where(RNG.random((rows == 0).sum()) < 0.5, -1, 1)  # zeros of both signs
    seen: dict[tuple[float, ...], int] = {}
    expected = [seen.setdefault(tuple(row[:dim] + 0.0), i) for i, row in enumerate(rows)]
    assert first_equal(rows.astype(np.float32), dim).tolist() == expected
    assert first_equal(rows.astype(np.float64), dim).tolist() == expected


def test_rows_that_all_differ_are_each_their_own() -> None:
    rows = RNG.normal(size=(20_000, 24)).astype(np.float32)
    assert first_equal(rows, 24).tolist() == list(range(20_000))


def test_a_gallery_is_not_copied() -> None:
    gallery = RNG.normal(size=(60_000, 64)).astype(np.float32)
    labels = np.arange(len(gallery)) % 10
    queries = RNG.normal(size=(20, 64)).astype(np.float32)
    tracemalloc.start()
    score_embeddings(queries, labels[:20], gallery, labels, (8, 64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < gallery.nbytes / 3


@pytest.mark.soak
def test_a_large_gallery_is_not_copied() -> None:
    """50,000 x 512 and 10,000 queries at 7 dims under `make soak`; else a fiftieth of that."""
    scale = 1 if os.environ.get("KERAS_MRL_SOAK") else 50
    gallery = RNG.normal(size=(50_000 // scale, 512)).astype(np.float32)
    queries = RNG.normal(size=(10_000 // scale, 512)).astype(np.float32)
    labels = np.arange(len(gallery)) % 100
    tracemalloc.start()
    scores = score_embeddings(
        queries, labels[: len(queries)], gallery, labels, (8, 16, 32, 64, 128, 256, 512)
    )
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert peak < 200
    assert scores[512]["recall10"] == 1


def slow_precision(hits: npt.NDArray[Any]) -> float:
    """The share of the k nearest with the query's label, averaged over queries."""
    total = 0.0
    for row in hits:
        total += sum(1 for hit in row if hit) / len(row)
    return total / len(hits)


def slow_average_precision(hits: npt.NDArray[Any]) -> float:
    """The paper's code: precision@i summed over the hits at rank i, over k (not over the hits)."""
    total = 0.0
    for row in hits:
        hits_so_far, summed = 0, 0.0
        for rank, hit in enumerate(row, start=1):
            if hit:
                hits_so_far += 1
                summed += hits_so_far / rank
        total += summed / len(row)
    return total / len(hits)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_both_equal_their_definition_as_a_slow_loop(k: int) -> None:
    assert precision_at_k(HITS[:, :k]) == pytest.approx(slow_precision(HITS[:, :k]), rel=1e-12)
    expected = slow_average_precision(HITS[:, :k])
    assert mean_average_precision_at_k(HITS[:, :k]) == pytest.approx(expected, rel=1e-12)


def test_precision_is_scikit_learns() -> None:
    everything = np.ones(10)
    expected = np.mean([precision_score(row, everything) for row in HITS])
    assert precision_at_k(HITS) == pytest.approx(expected)


def test_map_is_scikit_learns_average_precision_over_k_and_not_over_the_hits() -> None:
    by_rank = -np.arange(10)
    expected = []
    for row in HITS:
        hits = row.sum()
        expected.append(average_precision_score(row, by_rank) * hits / 10 if hits else 0)
    assert mean_average_precision_at_k(HITS) == pytest.approx(np.mean(expected))
    relevant_only = np.mean([average_precision_score(r, by_rank) for r in HITS if r.any()])
    assert mean_average_precision_at_k(HITS) < relevant_only - 0.05  # the other convention


def test_the_two_differ_by_rank_alone() -> None:
    early, late = np.eye(2, 4, dtype=bool)[:1], np.eye(4, dtype=bool)[3:]
    assert precision_at_k(early) == precision_at_k(late) == 0.25
    assert mean_average_precision_at_k(early) == 0.25
    assert mean_average_precision_at_k(late) == 0.0625


@pytest.mark.parametrize("score", [precision_at_k, mean_average_precision_at_k])
def test_all_hits_are_one_and_none_is_zero(score: Any) -> None:
    assert score(np.ones((3, 10), bool)) == 1
    assert score(np.zeros((3, 10), bool)) == 0
    assert score([[1, 1], [0, 0]]) == 0.5
    assert type(score([[1, 0]])) is float


@pytest.mark.parametrize("score", [precision_at_k, mean_average_precision_at_k])
@pytest.mark.parametrize("shape", [(10,), (0, 10), (3, 0), (2, 3, 4), ()])
def test_what_is_no_table_of_hits_is_refused(score: Any, shape: tuple[int, ...]) -> None:
    sentence = (
        "hits must be booleans (queries, k) with at least one query. "
        f"Received: bool of shape {shape}. "
        "Compare labels: gallery_labels[neighbors.ids] == query_labels[:, None]."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        score(np.zeros(shape, bool))


@pytest.mark.parametrize("score", [precision_at_k, mean_average_precision_at_k])
def test_ids_are_not_taken_for_hits(score: Any) -> None:
    sentence = (
        "hits must be booleans (queries, k) with at least one query. "
        "Received: int64 of shape (2, 2). "
        "Compare labels: gallery_labels[neighbors.ids] == query_labels[:, None]."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        score([[3, 7], [9, 12]])
