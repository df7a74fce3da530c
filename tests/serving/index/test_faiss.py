"""`FaissIndex` beside a search in float64 and beside `ExactIndex`."""

import copy
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
from keras_mrl_serving.index import ExactIndex, FaissIndex, FirstStage, first_stage
from keras_mrl_serving.index import faiss as module
from keras_mrl_serving.index.first_stage import Shortlister
from keras_mrl_serving.results import Neighbors
from tests.helpers.galleries import (
    FLAT,
    METRICS,
    Array,
    Refuses,
    Search,
    assert_nearest,
    assert_same,
    assert_scored,
    assert_ties_by_id,
    clusters,
    drawn,
    searches,
)

# Over prefixes of 16: those that can be told which rows they may return, and those that cannot.
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
    found = index.search(search.queries)
    assert_nearest(found, search)
    assert_ties_by_id(found)


@metrics
def test_a_shortlist_of_the_whole_gallery_passes_the_first_stage_over(
    metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = FunnelSchedule(SHORT.dims, (ROWS, ROWS), 6)
    index, search = prepared(metric, FirstStage("HNSW8", "efSearch=1"), whole)
    monkeypatch.delattr(index, "_first")
    found = index.search(QUERIES)
    assert_nearest(found, search)
    exact = ExactIndex.build(GALLERY, whole, search.ids, metric).search(QUERIES)
    np.testing.assert_array_equal(found.ids, exact.ids)
    slack = np.take_along_axis(search.slack(), search.rows_of(found.ids), 1)
    assert (np.abs(found.scores - exact.scores) <= slack).all()


@given(searches(most_queries=30))
def test_over_flat_search_it_is_the_exact_funnel(search: Search) -> None:
    index, exact = (
        build(search.gallery, search.schedule, search.ids, search.metric)
        for build in (module_build, ExactIndex.build)
    )
    found, expected = index.search(search.queries), exact.search(search.queries)
    assert found.ids.shape == expected.ids.shape
    assert_scored(found, search)
    for row, query in enumerate(search.queries):
        told = search.told(query, by_id=False)
        if told is not None:
            assert found.ids[row].tolist() == told.tolist() == expected.ids[row].tolist()


def module_build(*args: Any) -> FaissIndex:
    return FaissIndex.build(*args, first_stage=FLAT)


@metrics
def test_a_short_shortlist_of_any_of_them_misses_some(metric: str) -> None:
    """Or the two tests above would tell nothing apart."""
    index, search = prepared(metric, FLAT)
    found = index.search(QUERIES)
    whole, _ = prepared(metric, FLAT, FunnelSchedule((40,), (), 6))
    assert (found.ids != whole.search(QUERIES).ids).any()
    assert np.mean([search.told(query) is not None for query in QUERIES]) > 0.9


@metrics
@kinds
def test_what_an_approximate_first_stage_shortlists_is_scored_exactly(
    kind: FirstStage, metric: str
) -> None:
    index, search = prepared(metric, kind)
    found = index.search(QUERIES)
    assert found.ids.shape == (30, 6)
    assert_scored(found, search)
    assert_ties_by_id(found)
    truth = np.argsort(-search.true_scores(), axis=1)[:, :6]
    recall = np.mean(
        [len(set(a) & set(b)) / 6 for a, b in zip(truth, search.rows_of(found.ids), strict=True)]
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
def test_a_gallery_that_is_all_compared_may_differ_in_the_last_bits(metric: str) -> None:
    """BLAS, for more than 20 queries, adds the products up in another order than for fewer."""
    index, search = prepared(metric, FLAT, FunnelSchedule((40,), (), ROWS))
    together = index.search(QUERIES)
    slack = np.take_along_axis(search.slack(), search.rows_of(together.ids), 1)
    for row in range(30):
        alone = index.search(QUERIES[row : row + 1])
        assert (np.abs(alone.scores[0] - together.scores[row]) <= slack[row]).all()
        if search.told(QUERIES[row]) is not None:
            np.testing.assert_array_equal(alone.ids[0], together.ids[row])


@given(st.integers(0, 2**32), st.sampled_from(METRICS), st.sampled_from([1, 30]))
def test_copies_of_a_row_come_in_order_of_id(seed: int, metric: str, num_queries: int) -> None:
    rng = np.random.default_rng(seed)
    width, rows = int(rng.integers(2, 40)), int(rng.integers(2, 80))
    originals = drawn(seed, int(rng.integers(1, 20)), width)
    which = rng.integers(0, len(originals), rows)
    ids = rng.permutation(5 * rows)[:rows]
    schedule = FunnelSchedule((max(1, width // 2), width), (max(1, rows - 1),), max(1, rows - 1))
    index = FaissIndex.build(originals[which], schedule, ids, metric, first_stage=FLAT)
    found = index.search(drawn(seed + 1, num_queries, width))
    kind_of = dict(zip(ids.tolist(), which.tolist(), strict=True))
    for row in found.ids.tolist():
        for kind in set(which.tolist()):
            copies = [id_ for id_ in row if kind_of[id_] == kind]
            assert copies == sorted(copies)


@pytest.fixture
def any_filter_asks_the_first_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FEW", 0)


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
    found = index.search(QUERIES, among=among)
    assert found.ids.shape == (30, min(6, len(among) - 2))
    assert np.isin(found.ids, among).all()
    assert_scored(found, search)


def assert_all_compared(found: Neighbors, search: Search, among: Array) -> None:
    """What was found is what the funnel finds whose first shortlist is all that a filter leaves."""
    left = np.isin(search.ids, among)
    all_listed = FunnelSchedule(SHORT.dims, (ROWS, 9), 6)
    smaller = Search(QUERIES, GALLERY[left], all_listed, search.ids[left], search.metric)
    assert_scored(found, smaller)
    told = [smaller.told(query, by_id=False) for query in QUERIES]
    for row, expected in zip(found.ids, told, strict=True):
        assert expected is None or row.tolist() == expected.tolist()
    assert sum(expected is not None for expected in told) > 25


@metrics
@kinds
def test_few_rows_that_a_filter_leaves_are_all_compared(kind: FirstStage, metric: str) -> None:
    index, search = prepared(metric, kind)
    among = allowed(search, 0.2)
    found = index.search(QUERIES, among=among)
    assert_all_compared(found, search, among)


@metrics
@pytest.mark.parametrize("kind", SELECTING, ids=str)
@pytest.mark.usefixtures("any_filter_asks_the_first_stage")
def test_a_filter_does_not_change_how_hard_a_first_stage_looks(
    kind: FirstStage, metric: str
) -> None:
    index, search = prepared(metric, kind)
    assert_same(index.search(QUERIES, among=search.ids), index.search(QUERIES))


@metrics
@pytest.mark.parametrize("kind", NOT_SELECTING, ids=str)
@pytest.mark.usefixtures("any_filter_asks_the_first_stage")
def test_where_a_first_stage_cannot_select_the_rows_left_are_all_compared(
    kind: FirstStage, metric: str
) -> None:
    index, search = prepared(metric, kind)
    among = allowed(search, 0.9)
    assert index._first.can_choose is False
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(Shortlister, "search")
        assert_all_compared(index.search(QUERIES, among=among), search, among)
    assert index.search(QUERIES).ids.shape == (30, 6)  # by the first stage, as before


@metrics
@pytest.mark.parametrize("kind", SELECTING, ids=str)
def test_a_first_stage_is_asked_once_whether_it_can_select(
    kind: FirstStage, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FEW", 0)
    asked = []
    choosing = first_stage._parameters

    def counted(faiss: Any, index: Any, selector: Any) -> Any:
        asked.append(index.d)
        return choosing(faiss, index, selector)

    monkeypatch.setattr(first_stage, "_parameters", counted)
    prepared_, search = prepared(metric, kind)
    index = copy.copy(prepared_)
    index._first = Shortlister(prepared_._first.index, kind)
    index.search(QUERIES)
    assert asked == []
    for _ in range(3):
        index.search(QUERIES, among=allowed(search, 0.9))
    asked_here = [dim for dim in asked if dim == 16]  # and not the index after a rotation
    assert index._first.can_choose is True
    assert len(asked_here) == 4


class Broken:
    """As a FAISS index that runs out of memory while it searches."""

    def search_c(self, *_: Any) -> None:
        raise RuntimeError("std::bad_alloc")


@pytest.mark.parametrize("is_filtered", [False, True])
@pytest.mark.usefixtures("any_filter_asks_the_first_stage")
def test_what_goes_wrong_in_faiss_comes_out(is_filtered: bool) -> None:
    index = FaissIndex.build(GALLERY, SHORT, first_stage=FLAT)
    assert index._first.can_choose is True
    index._first.index = Broken()
    with pytest.raises(RuntimeError, match=r"^std::bad_alloc$"):
        index.search(QUERIES, among=np.arange(300) if is_filtered else None)


@metrics
@pytest.mark.parametrize(
    ("few", "left", "is_asked"),
    [
        (0, 15, False),  # as many as are shortlisted
        (0, 16, True),
        (50, 50, False),
        (50, 51, True),
        (500, 400, False),
    ],
)
def test_where_few_rows_are_left_the_first_stage_is_passed_over(
    few: int, left: int, is_asked: bool, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FEW", few)
    index, search = prepared(metric, FirstStage("HNSW8", "efSearch=20"))
    among = search.ids[-left:]
    asked = []
    looks = Shortlister.search

    def counted(self: Shortlister, prefixes: Array, n: int, rows: Array | None = None) -> Array:
        asked.append((n, None if rows is None else np.sort(search.ids[rows]).tolist()))
        return looks(self, prefixes, n, rows)

    monkeypatch.setattr(Shortlister, "search", counted)
    found = index.search(QUERIES, among=among)
    assert asked == ([(15, sorted(among.tolist()))] if is_asked else [])
    assert np.isin(found.ids, among).all()
    if not is_asked:
        assert_all_compared(found, search, among)


@metrics
@pytest.mark.parametrize("shortlists", [(), (300,), (300, 200)])
@pytest.mark.parametrize("is_filtered", [False, True])
@pytest.mark.usefixtures("any_filter_asks_the_first_stage")
def test_where_a_first_stage_finds_too_few_all_rows_are_compared(
    is_filtered: bool, shortlists: tuple[int, ...], metric: str
) -> None:
    dims = (8, 16, 40)[-1 - len(shortlists) :]
    schedule = FunnelSchedule(dims, shortlists, 200)
    index, search = prepared(metric, FirstStage("IVF16,Flat", "nprobe=1"), schedule)
    among = allowed(search, 0.9) if is_filtered else None
    prefixes = index.facts.prefix(QUERIES, dims[0])
    listed = index._first.search(prefixes, 200, None)
    assert (listed == -1).any(axis=1).all()
    assert_nearest(index.search(QUERIES, among=among), search, among)


@metrics
@pytest.mark.parametrize("among", [None, np.arange(0, ROWS, 2)])
def test_chunks_do_not_show(
    metric: str, among: Array | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = FirstStage("IVF8,Flat", "nprobe=3")
    at_once = FaissIndex.build(GALLERY, SHORT, metric=metric, first_stage=kind)
    expected = at_once.search(QUERIES, among=among)
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 37)
    monkeypatch.setattr(module, "_MAX_CANDIDATES", 100)
    in_parts = FaissIndex.build(GALLERY, SHORT, metric=metric, first_stage=kind)
    seen = []
    rerank = in_parts._rerank

    def counted(some: Array, *rest: Any) -> Any:
        seen.append(len(some))
        return rerank(some, *rest)

    monkeypatch.setattr(in_parts, "_rerank", counted)
    found = in_parts.search(QUERIES, among=among)
    assert seen == ([6] * 5 if among is None else [1] * 30)
    assert_same(found, expected)


def test_progress_is_told_of_every_row_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 150)
    monkeypatch.setattr(first_stage, "_ADDED_AT_ONCE", 300)
    told: list[tuple[int, int]] = []
    FaissIndex.build(
        GALLERY, SHORT, first_stage=FLAT, progress=lambda done, rows: told.append((done, rows))
    )
    assert told == [(150, 400), (300, 400), (400, 400), (300, 400), (400, 400)]


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
    asked = [(QUERIES[a : a + 1 + a % 3], among if a % 2 else None) for a in range(24)]
    expected = [index.search(some, among=only) for some, only in asked]
    index = copy.copy(index)
    index._by_id = None  # is made by the first filter
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda one: index.search(one[0], among=one[1]), asked * 4)
        for one, other in zip(found, expected * 4, strict=True):
            assert_same(one, other)


def test_settings_are_how_hard_it_looks() -> None:
    found = [
        prepared("cosine", FirstStage("IVF16,Flat", f"nprobe={n}"))[0].search(QUERIES).scores.mean()
        for n in (1, 2, 16)
    ]
    assert all(a < b for a, b in pairwise(found))
    flat = prepared("cosine", FLAT)[0].search(QUERIES).scores.mean()
    assert found[-1] == flat


@pytest.mark.parametrize("factory", ["IVF8,Flat", "PCA16,IVF8,Flat"])
@pytest.mark.parametrize(("rows_each", "are_rows"), [(1, True), (64, False)])
def test_lists_are_learned_from_some_of_the_rows(
    rows_each: int, are_rows: bool, factory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one row each, the centroids are those rows themselves."""
    monkeypatch.setattr(first_stage, "_PER_CENTROID", rows_each)
    index = FaissIndex.build(GALLERY, SHORT, metric="l2", first_stage=FirstStage(factory, ""))
    faiss = first_stage.import_faiss()
    first = faiss.downcast_index(index._first.index)
    rows = np.ascontiguousarray(GALLERY[:, :16])
    if factory.startswith("PCA"):
        rows = first.chain.at(0).apply(rows)
    lists = faiss.extract_index_ivf(first)
    centroids = faiss.downcast_index(lists.quantizer).reconstruct_n(0, 8)
    nearest = np.square(centroids[:, None] - rows).sum(axis=2).min(axis=1)
    assert (nearest.max() < 1e-6) == are_rows


def test_the_first_stage_is_a_graph_unless_it_is_given() -> None:
    index = FaissIndex.build(GALLERY, SHORT)
    assert index.first_stage == FirstStage("HNSW32", "efSearch=64")
    assert index.plan is None


MADE = "Take for example FirstStage('HNSW32')."


@pytest.mark.parametrize(
    ("factory", "settings", "reason"),
    [
        ("Nope", "", "could not parse index string Nope"),
        ("", "", "could not parse index string"),
        ("B", "", "Error: 'index' failed: description B did not generate an index"),
        (
            "IVF500,Flat",
            "nprobe=1",
            "Error: 'nx >= static_cast<idx_t>(k)' failed: Number of training points (400) should "
            "be at least as large as number of clusters (500)",
        ),
        ("IDMap,Flat", "", "add does not make sense with IndexIDMap, use add_with_ids"),
    ],
)
def test_a_first_stage_is_one_that_faiss_makes(factory: str, settings: str, reason: str) -> None:
    with pytest.raises(ValueError, match="The first stage") as caught:
        FaissIndex.build(GALLERY, SHORT, first_stage=FirstStage(factory, settings))
    assert type(caught.value) is ValueError
    start, end = str(caught.value).split(
        f"{factory!r} for 400 rows of dim 16 and metric 'cosine' ("
    )
    assert start == (
        "The first stage must be an index FAISS can make of the gallery's prefixes. Received: "
    )
    assert end.endswith(f"{reason}). {MADE}")


def test_signs_are_looked_at_by_the_byte() -> None:
    schedule = FunnelSchedule((12, 40), (30,), 6)
    with pytest.raises(ValueError, match=r"'BFlat' for 400 rows of dim 12 .* 'd_ % 8 == 0' failed"):
        FaissIndex.build(GALLERY, schedule, first_stage=FirstStage("BFlat", ""))


@pytest.mark.parametrize(
    ("factory", "settings", "reason"),
    [
        ("Flat", "efSearch=64", "could not set parameter efSearch"),
        ("HNSW8", "nprobe=4", "could not set parameter nprobe"),
        ("HNSW8", "bogus=4", "could not set parameter bogus"),
        ("HNSW8", "efSearch=4,bogus=1", "could not set parameter bogus"),
        ("BFlat", "nprobe=4", "no nprobe"),
        ("BHNSW8", "ntotal=4", "no ntotal"),
        ("BFlat", "efSearch=4", "attribute 'hnsw'"),
    ],
)
def test_settings_are_those_the_first_stage_has(factory: str, settings: str, reason: str) -> None:
    with pytest.raises(ValueError, match="settings must be") as caught:
        FaissIndex.build(GALLERY, SHORT, first_stage=FirstStage(factory, settings))
    assert type(caught.value) is ValueError
    start, end = str(caught.value).split(f"{settings!r} for {factory!r} (")
    assert start == (
        "settings must be those the first stage has: 'efSearch=64' of a graph, 'nprobe=8' of "
        "inverted lists, none of flat ones. Received: "
    )
    assert end.endswith(f"{reason}). Leave them out: settings=''.")


@pytest.mark.parametrize(
    "settings",
    [
        "efSearch",
        "efSearch=",
        "efSearch=x",
        "nprobe=0",
        "nprobe=-1",
        "efSearch=0.5",
        "3",
        "=3",
        "efSearch=9,",
    ],
)
def test_settings_are_names_with_numbers(settings: str, refuses: Refuses) -> None:
    text = (
        "settings must be names with numbers, and look at 1 place at least. "
        f"Received: {settings!r}. Write for example 'efSearch=64'."
    )
    with refuses(ValueError, text):
        FirstStage("HNSW8", settings)


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
