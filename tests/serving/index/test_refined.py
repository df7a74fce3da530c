"""One call of FAISS answers as the stages one by one do, and steps back where it might not."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import FaissIndex, FirstStage, open_index
from keras_mrl_serving.index.facts import IndexFacts
from keras_mrl_serving.index.first_stage import import_faiss
from keras_mrl_serving.index.refined import (
    RefinedIndex,
    has_copies,
    over_rows,
    unscaled,
)
from keras_mrl_serving.index.shortlister import Shortlister
from keras_mrl_serving.results import Neighbors
from tests.helpers.galleries import METRICS, Array, assert_same, assert_ties_by_id, clusters

ROWS = 400
GALLERY, QUERIES = clusters(0, ROWS, 40), clusters(1, 30, 40)
FUNNELS = {
    "two": FunnelSchedule((16, 40), (15,), 6),
    "three": FunnelSchedule((16, 24, 40), (15, 9), 6),
    "one": FunnelSchedule((40,), (), 6),
    "as long as the answer": FunnelSchedule((16, 40), (6,), 6),
}
GRAPH = FirstStage("HNSW8_SQ8", "efSearch=20")
KINDS = (FirstStage("HNSW8", "efSearch=20"), GRAPH, FirstStage("IVF8,PQ8x4fs", "nprobe=3"))

metrics = pytest.mark.parametrize("metric", METRICS)
funnels = pytest.mark.parametrize("funnel", FUNNELS.values(), ids=FUNNELS)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """More wait for one another, where other work has the cores."""
    faiss = import_faiss()
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


def built(
    kind: FirstStage, funnel: FunnelSchedule, metric: str = "cosine", rows: Array = GALLERY
) -> FaissIndex:
    ids = np.random.default_rng(2).permutation(10 * ROWS)[: len(rows)]
    return FaissIndex.build(rows, funnel, ids, metric, first_stage=kind)


class Counted:
    """Counts the answers that one call gave, and those for which it stepped back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given, self.stepped_back = 0, 0
        search_one = RefinedIndex.search_one

        def counted(*arguments: Any) -> Any:
            answer = search_one(*arguments)
            self.given += answer is not None
            self.stepped_back += answer is None
            return answer

        monkeypatch.setattr(RefinedIndex, "search_one", counted)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def in_stages(index: FaissIndex, queries: Array, k: int | None = None) -> Neighbors:
    """The answer of the stages, one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shortlister, "refined", lambda *_: None)
        apart = built(index.first_stage, index.schedule, index.metric)
        return apart.search(queries, k)


@metrics
@funnels
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_one_call_answers_as_the_stages_do(
    kind: FirstStage, funnel: FunnelSchedule, metric: str, counted: Counted
) -> None:
    index = built(kind, funnel, metric)
    for k in (None, 1, 4):
        expected = in_stages(index, QUERIES, k)
        assert_same(index.search(QUERIES, k), expected)
        for row in range(30):
            assert_same(index.search(QUERIES[row : row + 1], k), expected[row : row + 1])
    assert counted.given == 90


@metrics
def test_the_other_first_stages_are_searched_stage_by_stage(metric: str, counted: Counted) -> None:
    """They promise that of rows at the edge of a shortlist that look equal the lowest ids pass."""
    for factory in ("Flat", "SQ8", "IVF8,Flat", "RaBitQ", "BFlat"):
        built(FirstStage(factory), FUNNELS["two"], metric).search(QUERIES[:1])
    assert (counted.given, counted.stepped_back) == (0, 0)


@metrics
@pytest.mark.parametrize("few", [100, 1_000])  # copies that are kept as a set
@pytest.mark.parametrize("num_copied", [0, 1, 100])
def test_it_steps_back_where_an_answer_has_a_copy(
    num_copied: int, few: int, metric: str, counted: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of copies the graph met, the lowest ids pass, as where the stages are searched apart."""
    monkeypatch.setattr(RefinedIndex, "copies_as_set", few)
    rows = np.concatenate([GALLERY[:300], np.tile(GALLERY[:num_copied], (2, 1))])
    queries = np.concatenate([GALLERY[:1], QUERIES])
    index = built(FirstStage("HNSW8", "efSearch=40"), FUNNELS["two"], metric, rows)
    together = index.search(queries)
    for row in range(len(queries)):
        assert_same(index.search(queries[row : row + 1]), together[row : row + 1])
    assert (counted.stepped_back > 0) == (num_copied > 0)
    if num_copied:
        assert together.ids[0, :3].tolist() == sorted(index.ids[[0, 300, 300 + num_copied]])


@metrics
def test_of_copies_at_the_edge_of_a_shortlist_the_lowest_id_passes(
    metric: str, counted: Counted
) -> None:
    """The shortlist holds one of two copies, and the answer no two equal scores to tell by."""
    rows, ids = np.concatenate([GALLERY[:50], GALLERY[:50]]), np.arange(100)[::-1]
    for size in (1, 3):
        funnel = FunnelSchedule((16, 40), (size,), 1)
        kind = FirstStage("HNSW8", "efSearch=40")
        index = FaissIndex.build(rows, funnel, ids, metric, first_stage=kind)
        for row in range(30):
            number = 99 - index.search(GALLERY[row : row + 1]).ids.item()
            assert number >= 50  # the second copy, which has the lower id
    assert counted.given == 0


@metrics
def test_equal_scores_are_put_in_order_of_id_where_any_row_may_have_a_copy(metric: str) -> None:
    """Codes of 4 bits: the first stage cannot tell which rows are copies."""
    rows = np.concatenate([GALLERY[:200], GALLERY[:200]])
    funnel = FunnelSchedule((16, 40), (60,), 5)
    ids = np.random.default_rng(3).permutation(ROWS)
    kind = FirstStage("IVF8,PQ8x4fs", "nprobe=8")
    index = FaissIndex.build(rows, funnel, ids, metric, first_stage=kind)
    for row in range(30):
        found = index.search(GALLERY[row : row + 1])
        assert_same(found, index.search(GALLERY[: row + 1])[row:])
        assert_ties_by_id(found)


@metrics
def test_one_row_too_few_is_seen(metric: str) -> None:
    kind = FirstStage("IVF64,PQ8x4fs", "nprobe=1")
    index = built(kind, FUNNELS["as long as the answer"], metric)
    expected = in_stages(index, QUERIES)
    for row in range(30):
        assert_same(index.search(QUERIES[row : row + 1]), expected[row : row + 1])


def test_of_equal_rows_the_lowest_id_is_returned_by_the_first_stage_that_is_usual() -> None:
    """As the exact engine does (faiss #808, #1201)."""
    rows = np.tile(np.eye(8, dtype=np.float32)[:1], (3, 1))
    index = FaissIndex.build(rows, FunnelSchedule((4, 8), (2,), 1))
    assert index.search(rows[:1]).ids.tolist() == [[0]]
    assert index.search(rows).ids.tolist() == [[0], [0], [0]]


@metrics
def test_where_the_first_stage_finds_too_few_it_steps_back(metric: str, counted: Counted) -> None:
    kind, funnel = FirstStage("IVF16,PQ8x4fs", "nprobe=1"), FunnelSchedule((16, 40), (300,), 200)
    index = built(kind, funnel, metric)
    result = index.search(QUERIES[:1])
    assert (counted.given, counted.stepped_back) == (0, 1)
    assert result.ids.shape == (1, 200)
    assert_same(index.search(QUERIES)[:1], result)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("length", [0, 1e-30, 1e-12, 1e-4, 1, 100, 1e5, 1e15])
def test_a_query_of_any_length_finds_the_same_rows(length: float, metric: str) -> None:
    if metric == "l2":
        length = min(length, 1e5)
    index = built(GRAPH, FUNNELS["two"], metric)
    queries = QUERIES / np.linalg.norm(QUERIES, axis=1, keepdims=True) * np.float32(length)
    queries = queries.astype(np.float32)
    together = index.search(queries)
    assert np.isfinite(together.scores).all()
    if length and metric != "l2":
        unit = index.search(QUERIES / np.linalg.norm(QUERIES, axis=1, keepdims=True))
        assert (together.ids == unit.ids).mean() > 0.99
    if length > 1e-6 and metric == "cosine":
        np.testing.assert_allclose(together.scores, unit.scores, rtol=0, atol=2e-6)
    for row in range(5):
        assert_same(index.search(queries[row : row + 1]), together[row : row + 1])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_a_query_that_is_not_finite_is_refused(value: float) -> None:
    index = built(GRAPH, FUNNELS["two"])
    query = QUERIES[:1].copy()
    query[0, -1] = value
    with pytest.raises(ValueError, match=r"^The queries must be finite, and so must the squares"):
        index.search(query)


@pytest.mark.parametrize("k", [0, 16, -1, 2.0, "3", True])
def test_a_k_that_the_funnel_does_not_return_is_refused(k: Any) -> None:
    index = built(GRAPH, FUNNELS["two"])
    with pytest.raises(ValueError, match=r"^k must lie in 1\.\.15, "):
        index.search(QUERIES[:1], k)


def test_what_is_no_float32_row_of_the_width_is_taken_as_well(counted: Counted) -> None:
    index = built(GRAPH, FUNNELS["two"])
    expected = index.search(QUERIES[:1])
    assert counted.given == 1
    wider = np.concatenate([QUERIES[:1], QUERIES[:1]], axis=1)
    for query in (QUERIES[:1].astype(np.float64), QUERIES[:1].tolist(), wider):
        assert_same(index.search(query), expected)
    assert_same(index.search(np.asfortranarray(QUERIES)[:1]), expected)
    assert_same(index.search(QUERIES[:1], np.int64(6)), expected)  # type: ignore[arg-type]


def test_an_answer_is_not_overwritten_by_the_next() -> None:
    for ids in (None, np.arange(ROWS)[::-1]):
        index = FaissIndex.build(GALLERY, FUNNELS["two"], ids, first_stage=GRAPH)
        first = index.search(QUERIES[:1])
        kept = Neighbors(first.ids.copy(), first.scores.copy())
        index.search(QUERIES[1:2])
        assert_same(first, kept)
        first.ids[:] = -7
        assert (index.search(QUERIES[:1]).ids >= 0).all()


@metrics
def test_threads_have_buffers_of_their_own(metric: str) -> None:
    index = built(GRAPH, FUNNELS["three"], metric)
    expected = index.search(QUERIES)
    with ThreadPoolExecutor(8) as pool:
        rows = [row % 30 for row in range(600)]
        results = pool.map(lambda row: index.search(QUERIES[row : row + 1]), rows)
        for row, result in zip(rows, results, strict=True):
            assert_same(result, expected[row : row + 1])


@metrics
def test_rows_of_a_saved_index_are_read_where_they_lie(metric: str, tmp_path: Path) -> None:
    index = built(GRAPH, FUNNELS["three"], metric)
    index.save(tmp_path)
    assert_same(open_index(tmp_path).search(QUERIES[:1]), index.search(QUERIES[:1]))
    mapped = np.load(next(tmp_path.glob("rows_40-*.npy")), mmap_mode="r")
    view = over_rows(import_faiss(), mapped, metric)
    assert view.codes.is_owned is False
    assert (view.ntotal, view.codes.size()) == (ROWS, mapped.nbytes)


def test_rows_are_told_from_their_copies() -> None:
    rng = np.random.default_rng(0)
    for width in (1, 3, 4, 8):
        codes = rng.integers(0, 3, size=(300, width)).astype(np.uint8)
        _, kinds, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
        np.testing.assert_array_equal(has_copies(codes), counts[kinds.ravel()] > 1)


def test_queries_are_scaled_only_where_they_must_be() -> None:
    queries = np.array([[3, 4], [3e-9, 4e-9], [3e9, 4e9], [0, 0]], np.float32)
    taken, factors = unscaled(import_faiss(), queries, "cosine")
    expected = np.array([[3.0, 4.0], [3e-3, 4e-3], [0.6, 0.8], [0.0, 0.0]])
    np.testing.assert_allclose(taken, expected, rtol=1e-6)
    np.testing.assert_allclose(factors[:, 0], np.array([0.2, 1.0, 1.0, 1.0]), rtol=1e-6)
    for metric, sign in (("dot", 1), ("l2", -1)):
        taken, factors = unscaled(import_faiss(), queries, metric)
        assert taken is queries
        assert (factors == sign).all()


@metrics
@pytest.mark.parametrize("factory", ["Flat", "HNSW8"])
def test_rows_that_the_first_stage_holds_are_not_kept_twice(
    factory: str, metric: str, tmp_path: Path
) -> None:
    spec = FirstStage.usual(factory)
    index = FaissIndex.build(GALLERY, FUNNELS["one"], metric=metric, first_stage=spec)
    index.save(tmp_path)
    assert not list(tmp_path.glob("rows_*"))
    again = open_index(tmp_path)
    facts = again.facts
    first = Shortlister.build(facts.prefix(GALLERY, 40), spec, metric, lambda _done, _rows: None)
    twice = FaissIndex(facts, again.ids, first, {40: facts.prefix(GALLERY, 40)})
    for queries in (QUERIES, QUERIES[:1]):
        assert_same(again.search(queries), index.search(queries))
        assert_same(index.search(queries), twice.search(queries))
        few = np.arange(0, ROWS, 7)
        assert_same(index.search(queries, among=few), twice.search(queries, among=few))


def test_other_first_stages_hold_no_rows() -> None:
    one = FUNNELS["one"]
    for factory in ("HNSW8_SQ8", "IVF8,Flat", "PCA8,Flat", "BFlat", "SQ8"):
        assert FirstStage(factory).holds_rows(one) is False
    assert FirstStage("Flat").holds_rows(FUNNELS["two"]) is False
    first = Shortlister.build(GALLERY, FirstStage("SQ8"), "dot", lambda _done, _rows: None)
    with pytest.raises(ValueError, match=r"^Rows are read from a first stage that holds them\."):
        FaissIndex(IndexFacts(one), np.arange(ROWS), first, {})


@metrics
@pytest.mark.parametrize("kind", [GRAPH, FirstStage("Flat"), FirstStage("BFlat")], ids=str)
def test_rows_of_half_precision(kind: FirstStage, metric: str, tmp_path: Path) -> None:
    """Half of the bytes; nearly all ids, and scores to the fourth digit."""
    whole, half = (
        FaissIndex.build(
            GALLERY,
            FUNNELS["three"],
            metric=metric,
            first_stage=kind,
            path=tmp_path / str(h),
            half=h,
        )
        for h in (False, True)
    )
    sizes = [
        next((tmp_path / str(h)).glob("rows_40-*")).stat().st_size - 128 for h in (False, True)
    ]
    assert sizes == [4 * 40 * ROWS, 2 * 40 * ROWS]
    expected, result = whole.search(QUERIES), half.search(QUERIES)
    assert (result.ids == expected.ids).mean() > 0.97
    scale = np.abs(expected.scores).max() if metric != "cosine" else 1
    same = result.ids == expected.ids
    assert np.abs(result.scores - expected.scores)[same].max() < 2e-3 * scale
    for row in range(5):
        assert_same(half.search(QUERIES[row : row + 1]), result[row : row + 1])
    filtered = half.search(QUERIES, among=np.arange(0, ROWS, 3))
    assert (filtered.ids % 3 == 0).all()
    half.save(tmp_path / "copy")
    assert_same(open_index(tmp_path / "copy").search(QUERIES), result)
