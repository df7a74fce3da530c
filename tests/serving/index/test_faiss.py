"""`FaissIndex` beside a search in float64 and beside `ExactIndex`."""

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex, FaissIndex, FirstStage
from keras_mrl_serving.index.facts import IndexFacts
from keras_mrl_serving.index.faiss import wider_dims
from keras_mrl_serving.index.filters import Filter
from keras_mrl_serving.index.shortlister import Shortlister
from keras_mrl_serving.results import Neighbors
from tests.helpers.galleries import (
    FLAT,
    METRICS,
    Array,
    Refuses,
    Search,
    assert_lowest_of_copies,
    assert_nearest,
    assert_same,
    assert_scored,
    assert_ties_by_id,
    clusters,
    drawn,
    searches,
)

# First stages over prefixes of 16: those that can select rows while they search, and those that
# cannot.
SELECTING = (
    FLAT,
    FirstStage("HNSW8", "efSearch=20"),
    FirstStage("HNSW8_SQ8", "efSearch=20"),
    FirstStage("IVF8,Flat", "nprobe=3"),
    FirstStage("IVF8,PQ4x4fs", "nprobe=3"),
    FirstStage("PCA8,IVF8,Flat", "nprobe=3"),
    FirstStage("SQ8", ""),
    FirstStage("RaBitQ", ""),
    FirstStage("BFlat", ""),
)
NOT_SELECTING = (
    FirstStage("PQ4x4fs", ""),
    FirstStage("SQ8,RFlat", ""),
    FirstStage("BHNSW8", "efSearch=20"),
    FirstStage("BIVF8", "nprobe=3"),
)
KINDS = {kind.factory: kind for kind in SELECTING + NOT_SELECTING}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
metrics = pytest.mark.parametrize("metric", METRICS)

ROWS = 400
GALLERY, QUERIES = clusters(0, ROWS, 40), clusters(1, 30, 40)
SHORT = FunnelSchedule((16, 24, 40), (15, 9), 6)


@cache  # to train some of them takes a second
def prepared(
    metric: str, kind: FirstStage, schedule: FunnelSchedule = SHORT
) -> tuple[FaissIndex, Search]:
    ids = np.random.default_rng(2).permutation(10 * ROWS)[:ROWS]
    search = Search(QUERIES, GALLERY, schedule, ids, metric)
    return FaissIndex.build(GALLERY, schedule, ids, metric, first_stage=kind), search


class Watched(Shortlister):
    """A first stage that notes the queries, the shortlist and the filter of every search."""

    def __init__(self, index: Any, spec: FirstStage) -> None:
        super().__init__(index, spec)
        self.searches: list[tuple[int, int, Filter | None]] = []

    def search(
        self,
        prefixes: Array,
        size: int,
        only: Filter | None = None,
        ids: Array | None = None,
    ) -> Array:
        self.searches.append((len(prefixes), size, only))
        return super().search(prefixes, size, only, ids)


@cache
def trained(metric: str, kind: FirstStage, dim: int) -> Shortlister:
    prefixes = IndexFacts(FunnelSchedule((dim,), (), 1), metric).prefix(GALLERY, dim)
    return Shortlister.build(prefixes, kind, metric, lambda _done, _rows: None)


def watched(
    metric: str, kind: FirstStage, schedule: FunnelSchedule = SHORT
) -> tuple[FaissIndex, Watched, Search]:
    """As `prepared`, of a first stage that is watched."""
    _, search = prepared(metric, kind, schedule)
    first = Watched(trained(metric, kind, schedule.dims[0]).index, kind)
    facts = IndexFacts(schedule, metric)
    stages = {dim: facts.prefix(GALLERY, dim) for dim in wider_dims(schedule)}
    return FaissIndex(facts, search.ids, first, stages), first, search


anywhere = st.sampled_from(
    [
        FLAT,
        FirstStage("HNSW4", "efSearch=1"),
        FirstStage("IVF1,Flat", ""),
        FirstStage("SQ8", ""),
        FirstStage("RaBitQ", ""),
    ]
)


@given(searches(most_queries=30), anywhere, st.integers(0, 5))
def test_a_funnel_that_shortlists_everything_is_exhaustive_search(
    search: Search, kind: FirstStage, surplus: int
) -> None:
    everything = tuple(len(search.gallery) + surplus for _ in search.schedule.shortlists)
    k = search.schedule.k if everything else len(search.gallery)
    search = search._replace(schedule=FunnelSchedule(search.schedule.dims, everything, k))
    index = FaissIndex.build(
        search.gallery, search.schedule, search.ids, search.metric, first_stage=kind
    )
    result = index.search(search.queries)
    assert_nearest(result, search)
    assert_ties_by_id(result)


@metrics
def test_a_shortlist_of_the_whole_gallery_skips_the_first_stage(metric: str) -> None:
    whole = FunnelSchedule(SHORT.dims, (ROWS, ROWS), 6)
    index, first, search = watched(metric, FirstStage("HNSW8", "efSearch=1"), whole)
    result = index.search(QUERIES)
    assert first.searches == []
    assert_nearest(result, search)
    exact = ExactIndex.build(GALLERY, whole, search.ids, metric).search(QUERIES)
    np.testing.assert_array_equal(result.ids, exact.ids)
    slack = np.take_along_axis(search.slack(), search.rows_of(result.ids), 1)
    assert (np.abs(result.scores - exact.scores) <= slack).all()


@given(searches(most_queries=30))
def test_over_flat_search_it_is_the_exact_funnel(search: Search) -> None:
    index, exact = (
        build(search.gallery, search.schedule, search.ids, search.metric)
        for build in (build_flat, ExactIndex.build)
    )
    result, expected = index.search(search.queries), exact.search(search.queries)
    assert result.ids.shape == expected.ids.shape
    assert_scored(result, search)
    for row, query in enumerate(search.queries):
        ids = search.expected_ids(query, by_id=False)
        if ids is not None:
            assert result.ids[row].tolist() == ids.tolist() == expected.ids[row].tolist()


def build_flat(*args: Any) -> FaissIndex:
    return FaissIndex.build(*args, first_stage=FLAT)


@metrics
def test_a_short_shortlist_of_any_of_them_misses_some(metric: str) -> None:
    """Or the two tests above would pass for any shortlist."""
    index, search = prepared(metric, FLAT)
    result = index.search(QUERIES)
    whole, _ = prepared(metric, FLAT, FunnelSchedule((40,), (), 6))
    assert (result.ids != whole.search(QUERIES).ids).any()
    assert np.mean([search.expected_ids(query) is not None for query in QUERIES]) > 0.9


@metrics
@kinds
def test_the_shortlist_of_an_approximate_first_stage_is_scored_exactly(
    kind: FirstStage, metric: str
) -> None:
    index, search = prepared(metric, kind)
    result = index.search(QUERIES)
    assert result.ids.shape == (30, 6)
    assert_scored(result, search)
    assert_ties_by_id(result)
    truth = np.argsort(-search.true_scores(), axis=1)[:, :6]
    recall = np.mean(
        [len(set(a) & set(b)) / 6 for a, b in zip(truth, search.rows_of(result.ids), strict=True)]
    )
    assert recall > 0.5  # by chance: 30 in 400


@metrics
@kinds
def test_an_answer_does_not_depend_on_the_other_queries(kind: FirstStage, metric: str) -> None:
    """To the last bit, where a shortlist is compared: each row by itself."""
    index, _ = prepared(metric, kind)
    together = index.search(QUERIES)  # of 30, which FAISS hands to BLAS
    order = np.random.default_rng(3).permutation(30)
    permuted = index.search(QUERIES[order])
    assert_same(permuted, Neighbors(together.ids[order], together.scores[order]))
    for row in range(30):
        assert_same(index.search(QUERIES[row : row + 1]), together[row : row + 1])


@metrics
@pytest.mark.parametrize("k", [6, ROWS])
def test_so_it_is_where_the_whole_gallery_is_compared(metric: str, k: int) -> None:
    """BLAS, for more than 20 queries, adds the products up in another order than for fewer."""
    index, _ = prepared(metric, FLAT, FunnelSchedule((16, 40), (ROWS,), k))
    together = index.search(QUERIES)
    for row in range(30):
        assert_same(index.search(QUERIES[row : row + 1]), together[row : row + 1])


@metrics
@pytest.mark.parametrize("num_queries", [1, 30])
@pytest.mark.parametrize(
    "kind",
    [kind for name, kind in KINDS.items() if not re.search("HNSW|x4fs|^B", name)],
    ids=str,
)
def test_of_copies_that_a_first_stage_meets_the_lowest_ids_are_listed(
    kind: FirstStage, num_queries: int, metric: str
) -> None:
    """All but graphs, which may lose sight of copies, and codes so coarse that most rows tie."""
    gallery = GALLERY[np.random.default_rng(5).integers(0, 50, ROWS)]
    ids = np.random.default_rng(6).permutation(ROWS)
    index = FaissIndex.build(gallery, SHORT, ids, metric, first_stage=kind)
    assert_lowest_of_copies(index.search(QUERIES[:num_queries]), gallery, ids)


@given(st.integers(0, 2**32), st.sampled_from(METRICS), st.sampled_from([1, 30]))
def test_copies_of_a_row_come_in_order_of_id(seed: int, metric: str, num_queries: int) -> None:
    rng = np.random.default_rng(seed)
    width, rows = int(rng.integers(2, 40)), int(rng.integers(2, 80))
    originals = drawn(seed, int(rng.integers(1, 20)), width)
    which = rng.integers(0, len(originals), rows)
    ids = rng.permutation(5 * rows)[:rows]
    schedule = FunnelSchedule((max(1, width // 2), width), (max(1, rows - 1),), max(1, rows - 1))
    index = FaissIndex.build(originals[which], schedule, ids, metric, first_stage=FLAT)
    result = index.search(drawn(seed + 1, num_queries, width))
    kind_of = dict(zip(ids.tolist(), which.tolist(), strict=True))
    for row in result.ids.tolist():
        for kind in set(which.tolist()):
            copies = [id_ for id_ in row if kind_of[id_] == kind]
            assert copies == sorted(copies)


@pytest.fixture
def any_filter_asks_the_first_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FaissIndex, "exhaustive_below", 0)


def allowed(search: Search, share: float) -> Array:
    rng = np.random.default_rng(4)
    unknown = np.array([2**62, 2**63 - 1])
    some = rng.permutation(search.ids)[: round(share * ROWS)]
    return np.asarray(rng.permutation(np.concatenate([some, unknown])))


@metrics
@kinds
@pytest.mark.parametrize("share", [0.01, 0.2, 0.9])
@pytest.mark.usefixtures("any_filter_asks_the_first_stage")
def test_a_first_stage_lets_through_what_a_filter_names(
    kind: FirstStage, metric: str, share: float
) -> None:
    index, search = prepared(metric, kind)
    among = allowed(search, share)
    result = index.search(QUERIES, among=among)
    assert result.ids.shape == (30, min(6, len(among) - 2))
    assert np.isin(result.ids, among).all()
    assert_scored(result, search)


def assert_all_compared(result: Neighbors, search: Search, among: Array) -> None:
    """The result is that of the funnel whose first shortlist is all that a filter leaves."""
    left = np.isin(search.ids, among)
    all_listed = FunnelSchedule(SHORT.dims, (ROWS, 9), 6)
    smaller = Search(QUERIES, GALLERY[left], all_listed, search.ids[left], search.metric)
    assert_scored(result, smaller)
    expected_ids = [smaller.expected_ids(query, by_id=False) for query in QUERIES]
    for ids, expected in zip(result.ids, expected_ids, strict=True):
        assert expected is None or ids.tolist() == expected.tolist()
    assert sum(expected is not None for expected in expected_ids) > 25


@metrics
@kinds
def test_few_rows_that_a_filter_leaves_are_all_compared(kind: FirstStage, metric: str) -> None:
    index, search = prepared(metric, kind)
    among = allowed(search, 0.2)
    result = index.search(QUERIES, among=among)
    assert_all_compared(result, search, among)


@metrics
@pytest.mark.parametrize("kind", SELECTING, ids=str)
@pytest.mark.usefixtures("any_filter_asks_the_first_stage")
def test_a_filter_does_not_change_how_hard_a_first_stage_looks(
    kind: FirstStage, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shortlister, "alone", lambda *_: None)  # that would find more
    index, search = prepared(metric, kind)
    assert_same(index.search(QUERIES, among=search.ids), index.search(QUERIES))


@metrics
@pytest.mark.parametrize("kind", NOT_SELECTING, ids=str)
@pytest.mark.usefixtures("any_filter_asks_the_first_stage")
def test_where_a_first_stage_cannot_select_rows_it_is_asked_for_more(
    kind: FirstStage, metric: str
) -> None:
    index, first, search = watched(metric, kind)
    among = allowed(search, 0.9)
    assert first.can_choose is False
    result = index.search(QUERIES, among=among)
    assert result.ids.shape == (30, 6)
    assert np.isin(result.ids, among).all()
    whole = index.search(QUERIES, among=search.ids)
    pairs = zip(whole.ids, index.search(QUERIES).ids, strict=True)
    assert np.mean([np.isin(*pair).mean() for pair in pairs]) > 0.8
    first.searches.clear()
    assert index.search(QUERIES).ids.shape == (30, 6)
    # Without a filter codes of 4 bits are part of one call, and the others asked by themselves.
    assert first.searches == ([] if "x4fs" in kind.factory else [(30, 15, None)])


@metrics
@pytest.mark.parametrize("shortlists", [(), (300,), (300, 200)])
@pytest.mark.parametrize("is_filtered", [False, True])
@pytest.mark.usefixtures("any_filter_asks_the_first_stage")
def test_where_a_first_stage_finds_too_few_all_rows_are_compared(
    is_filtered: bool, shortlists: tuple[int, ...], metric: str
) -> None:
    dims = (8, 16, 40)[-1 - len(shortlists) :]
    schedule = FunnelSchedule(dims, shortlists, 200)
    index, first, search = watched(metric, FirstStage("IVF16,Flat", "nprobe=1"), schedule)
    among = allowed(search, 0.9) if is_filtered else None
    found = first.search(index.facts.prefix(QUERIES, dims[0]), 200)
    assert (found == -1).any(axis=1).all()
    assert_nearest(index.search(QUERIES, among=among), search, among)


@metrics
def test_a_memory_mapped_gallery_is_a_gallery(metric: str, tmp_path: Path) -> None:
    np.save(tmp_path / "gallery.npy", GALLERY.astype(np.float64))
    mapped = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    index = FaissIndex.build(mapped, SHORT, metric=metric, first_stage=FLAT)
    expected = FaissIndex.build(GALLERY, SHORT, metric=metric, first_stage=FLAT)
    assert_same(index.search(QUERIES), expected.search(QUERIES))


@metrics
@kinds
def test_threads_share_an_index(kind: FirstStage, metric: str) -> None:
    index, search = prepared(metric, kind)
    among = allowed(search, 0.5)
    calls = [(QUERIES[a : a + 1 + a % 3], among if a % 2 else None) for a in range(24)]
    expected = [index.search(queries, among=ids) for queries, ids in calls]
    fresh, _, _ = watched(metric, kind)  # its first filter sorts the ids
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda call: fresh.search(call[0], among=call[1]), calls * 4)
        for result, other in zip(results, expected * 4, strict=True):
            assert_same(result, other)


def test_settings_are_how_hard_it_looks() -> None:
    result = [
        prepared("cosine", FirstStage("IVF16,Flat", f"nprobe={n}"))[0].search(QUERIES).scores.mean()
        for n in (1, 2, 16)
    ]
    assert all(a < b for a, b in pairwise(result))
    flat = prepared("cosine", FLAT)[0].search(QUERIES).scores.mean()
    assert result[-1] == flat


def test_the_first_stage_is_a_graph_unless_it_is_given() -> None:
    index = FaissIndex.build(GALLERY, SHORT)
    assert index.first_stage == FirstStage("HNSW32", "efSearch=64")
    assert index.plan is None


def test_no_settings_are_the_ones_of_faiss() -> None:
    for factory in ("HNSW8", "BHNSW8", "IVF8,Flat"):
        index, search = prepared("cosine", FirstStage(factory, ""))
        assert_scored(index.search(QUERIES), search)


def test_without_faiss_it_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, refuses: Refuses
) -> None:
    index, _ = prepared("cosine", FLAT)
    monkeypatch.setitem(sys.modules, "faiss", None)
    text = (
        "FaissIndex needs FAISS. Received: import of faiss halted; None in sys.modules. "
        "Install it: pip install 'keras-mrl[faiss]'."
    )
    with refuses(ImportError, text):
        FaissIndex.build(GALLERY, SHORT)
    with refuses(ImportError, text):
        index.search(QUERIES)


@metrics
@pytest.mark.parametrize(
    ("below", "num_left", "is_searched"),
    [
        (0, 15, False),  # as many as are shortlisted
        (0, 16, True),
        (50, 50, False),
        (50, 51, True),
        (500, 400, False),
    ],
)
def test_a_filter_that_leaves_few_rows_skips_the_first_stage(
    below: int, num_left: int, is_searched: bool, metric: str
) -> None:
    index, first, search = watched(metric, FirstStage("IVF8,Flat", "nprobe=8"))
    index.exhaustive_below = below
    among = search.ids[-num_left:]
    result = index.search(QUERIES, among=among)
    assert np.isin(result.ids, among).all()
    if is_searched:
        ((_, size, only),) = first.searches
        assert only is not None
        assert (size, only.rows.tolist()) == (15, list(range(ROWS - num_left, ROWS)))
    else:
        assert first.searches == []
        assert_all_compared(result, search, among)


@metrics
def test_chunks_of_queries_do_not_show(metric: str) -> None:
    index, first, _ = watched(metric, FirstStage("IVF8,Flat", "nprobe=3"))
    filters = (None, np.arange(0, ROWS, 2))
    expected = [index.search(QUERIES, among=among) for among in filters]
    first.searches.clear()
    index.candidates_at_once = 100
    for among, answer in zip(filters, expected, strict=True):
        assert_same(index.search(QUERIES, among=among), answer)
    assert [queries for queries, _, _ in first.searches] == [6] * 5  # of 15 candidates each


def test_chunks_of_rows_do_not_show() -> None:
    """A gallery is scaled 65,536 rows at a time, and added 50,000 rows at a time."""
    rows, done = 140_000, []
    gallery = drawn(0, rows, 6)
    index = FaissIndex.build(
        gallery,
        FunnelSchedule((4, 6), (20,), 1),
        first_stage=FLAT,
        progress=lambda *progress: done.append(progress),
    )
    assert [count for count, all_ in done if all_ == rows] == [
        *(65_536, 131_072, rows),
        *(50_000, 100_000, rows),
    ]
    at_the_edges = [0, 49_999, 50_000, 65_535, 65_536, 131_071, 131_072, rows - 1]
    queries = gallery[at_the_edges]
    result = index.search(queries)
    np.testing.assert_allclose(result.scores[:, 0], (queries != 0).any(axis=1), rtol=0, atol=1e-6)
    is_scaled = np.abs(queries[:, :4]).sum(axis=1) > 1e-3
    assert result.ids[is_scaled, 0].tolist() == np.array(at_the_edges)[is_scaled].tolist()


class Broken:
    """As a FAISS index that runs out of memory while it searches."""

    def search_c(self, *_: Any) -> None:
        raise RuntimeError("std::bad_alloc")


@pytest.mark.parametrize("is_filtered", [False, True])
@pytest.mark.usefixtures("any_filter_asks_the_first_stage")
def test_an_error_of_faiss_comes_out(is_filtered: bool) -> None:
    index, first, _ = watched("cosine", FLAT)
    assert first.can_choose is True
    first.index = Broken()
    with pytest.raises(RuntimeError, match=r"^std::bad_alloc$"):
        index.search(QUERIES, among=np.arange(300) if is_filtered else None)
