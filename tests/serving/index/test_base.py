"""What holds of every `LocalIndex`, whichever engine searches it."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mrl_serving.errors import ManifestError
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex, FaissIndex, Index, open_index
from keras_mrl_serving.index.facts import IndexFacts
from tests.helpers.galleries import (
    ENGINES,
    METRICS,
    Array,
    Refuses,
    Search,
    TiedSearch,
    assert_lowest_of_copies,
    assert_nearest,
    assert_same,
    drawn,
    schedules,
    searches,
)

Build = Callable[..., ExactIndex | FaissIndex]

SCHEDULE = FunnelSchedule((2, 4), (4,), 3)
GALLERY = drawn(0, 9, 4)
QUERIES = drawn(1, 5, 4)

engines = st.sampled_from(sorted(ENGINES))


@pytest.fixture(params=sorted(ENGINES))
def build(request: pytest.FixtureRequest) -> Build:
    return ENGINES[request.param]


def exhaustive(search: Search) -> FunnelSchedule:
    everything = tuple(len(search.gallery) for _ in search.schedule.shortlists)
    return FunnelSchedule(search.schedule.dims, everything, search.schedule.k)


@given(searches(), engines, st.data())
def test_a_filter_lets_through_what_it_names(
    search: Search, name: str, data: st.DataObject
) -> None:
    here = data.draw(st.lists(st.sampled_from(search.ids.tolist())))
    elsewhere = data.draw(st.lists(st.integers(0, 2**63 - 1)))
    among = np.array(data.draw(st.permutations(here + elsewhere)), np.int64)
    index = ENGINES[name](search.gallery, exhaustive(search), search.ids, search.metric)
    assert_nearest(index.search(search.queries, among=among), search, among)


@given(searches(), engines)
def test_a_filter_that_names_all_filters_nothing(search: Search, name: str) -> None:
    index = ENGINES[name](search.gallery, exhaustive(search), search.ids, search.metric)
    assert_nearest(index.search(search.queries, among=search.ids), search)


@given(searches(), engines, st.data())
def test_fewer_neighbours_are_the_first_of_more(
    search: Search, name: str, data: st.DataObject
) -> None:
    index = ENGINES[name](search.gallery, search.schedule, search.ids, search.metric)
    k = data.draw(st.integers(1, search.schedule.k))
    more, fewer = index.search(search.queries), index.search(search.queries, k)
    assert fewer.ids.shape == (len(search.queries), k)
    np.testing.assert_allclose(fewer.scores, more.scores[:, :k], rtol=0, atol=search.slack().max())
    for row, query in enumerate(search.queries):
        if search.expected_ids(query, by_id=name == "exact") is not None:
            assert fewer.ids[row].tolist() == more.ids[row, :k].tolist()


@pytest.mark.parametrize("among", [[], np.array([], np.int64), [9, 2**63 - 1], np.array([], float)])
def test_nothing_is_found_among_nothing(among: Any, build: Build) -> None:
    empty = build(GALLERY, SCHEDULE).search(QUERIES, among=among)
    assert (empty.ids.shape, empty.scores.shape) == ((5, 0), (5, 0))
    assert [empty.ids.dtype, empty.scores.dtype] == [np.int64, np.float32]


@pytest.mark.parametrize("metric", METRICS)
def test_among_few_all_are_found(metric: str, build: Build) -> None:
    index = build(GALLERY, SCHEDULE, np.arange(9) * 10, metric)
    result = index.search(QUERIES, among=[40, 41, 80, 40])
    assert result.ids.shape == (5, 2)
    assert np.sort(result.ids, axis=1).tolist() == [[40, 80]] * 5
    assert index.search(QUERIES, 1, among=[40, 80]).ids.shape == (5, 1)


def test_k_may_be_of_numpy(build: Build) -> None:
    index = build(GALLERY, SCHEDULE)
    two: Any = np.int8(2)
    assert_same(index.search(QUERIES, two), index.search(QUERIES, 2))


def test_the_largest_ids_are_ids(build: Build) -> None:
    ids = np.arange(9, dtype=np.uint64) + np.uint64(2**63 - 9)
    index = build(GALLERY, SCHEDULE, ids)
    assert index.search(GALLERY[8:]).ids[0, 0] == 2**63 - 1
    assert index.search(QUERIES, among=ids[-1:]).ids.tolist() == [[2**63 - 1]] * 5


def test_a_zero_vector_is_equally_near_to_all(build: Build) -> None:
    gallery = np.array([[-1.0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]])
    whole = FunnelSchedule((2, 4), (4,), 4)
    result = build(gallery, whole, [3, 2, 1, 0]).search([[0.0] * 4, [2.0, 0, 0, 0]])
    assert result.ids.tolist() == [[0, 1, 2, 3], [1, 0, 2, 3]]
    assert result.scores.tolist() == [[0, 0, 0, 0], [1, 0, 0, -1]]


@given(st.integers(0, 2**32), engines, st.sampled_from(METRICS), st.sampled_from([2, 70]))
def test_equal_scores_come_in_order_of_id(
    seed: int, name: str, metric: str, num_queries: int
) -> None:
    """Of signs, whose scores float32 holds exactly at dims 4 and 16: almost all of them tie."""
    rng = np.random.default_rng(seed)
    kinds, rows = rng.choice([-1.0, 1.0], size=(12, 16)), 60
    gallery = kinds[rng.integers(0, 12, rows)]
    ids = rng.permutation(1000)[:rows]
    queries = rng.choice([-1.0, 1.0], size=(num_queries, 16))
    dims, shortlists = ((16,), ()) if seed % 2 else ((4, 16), (rows,))
    index = ENGINES[name](gallery, FunnelSchedule(dims, shortlists, rows), ids, metric)
    result = index.search(queries)
    dots = queries @ gallery.T
    scores = {"dot": dots, "cosine": dots / 16, "l2": 2 * dots - 32}[metric]
    order = np.lexsort((np.broadcast_to(ids, scores.shape), -scores))
    np.testing.assert_array_equal(result.ids, ids[order])
    np.testing.assert_array_equal(result.scores, np.take_along_axis(scores, order, 1))


@given(st.integers(0, 2**32), engines, st.sampled_from([1, 2, 30]))
def test_every_cut_leaves_out_the_highest_of_equal_ids(
    seed: int, name: str, num_queries: int
) -> None:
    search = TiedSearch.drawn(seed, num_queries)
    index = ENGINES[name](search.gallery, search.schedule, search.ids, search.metric)
    np.testing.assert_array_equal(index.search(search.queries).ids, search.expected_ids())


@given(
    st.integers(0, 2**32),
    engines,
    st.sampled_from(METRICS),
    st.sampled_from([1, 2, 30]),
    st.booleans(),
)
def test_of_copies_of_a_row_the_lowest_ids_are_returned(
    seed: int, name: str, metric: str, num_queries: int, is_filtered: bool
) -> None:
    """Of any floats: a matrix product gives copies scores that differ in the last bits."""
    rng = np.random.default_rng(seed)
    rows, width = int(rng.integers(10, 400)), int(rng.integers(2, 70))
    gallery = drawn(seed, int(rng.integers(1, rows)), width)
    gallery = gallery[rng.integers(0, len(gallery), rows)]
    ids = rng.permutation(5 * rows)[:rows]
    dims = tuple(sorted({int(rng.integers(1, width + 1)), width}))
    sizes = np.sort(rng.integers(1, rows + 1, size=len(dims)))[::-1].tolist()
    schedule = FunnelSchedule(dims, tuple(sizes[:-1]), sizes[-1])
    index = ENGINES[name](gallery, schedule, ids, metric)
    queries = drawn(seed + 1, num_queries, width)
    among = rng.permutation(ids)[: rows // 2] if is_filtered else None
    result = index.search(queries, among=among)
    listed = np.isin(ids, ids if among is None else among)
    assert_lowest_of_copies(result, gallery[listed], ids[listed])
    if num_queries > 1 and not is_filtered:  # and so it is for each query alone
        np.testing.assert_array_equal(index.search(queries[:1]).ids[0], result.ids[0])


@given(st.data(), engines)
def test_queries_and_galleries_may_be_lists_wider_or_of_other_dtypes(
    data: st.DataObject, name: str
) -> None:
    schedule = data.draw(schedules(6, 9))
    metric = data.draw(st.sampled_from(METRICS))
    gallery, queries = np.round(drawn(0, 9, 7)), np.round(drawn(1, 4, 9))
    expected = ENGINES[name](gallery, schedule, metric=metric).search(queries[:, :6])
    dtype = data.draw(st.sampled_from(["float64", "int32", "int16", "float16", "object"]))
    readonly = queries.astype(dtype)
    readonly.flags.writeable = False
    for other in (gallery.tolist(), np.asfortranarray(gallery.astype(dtype)), gallery[:, :6]):
        index = ENGINES[name](other, schedule, np.arange(9, dtype=np.uint8), metric)
        assert_same(index.search(readonly), expected)
        assert_same(index.search(queries.tolist()), expected)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dims", [(8,), (2, 8), (2, 5, 8)])
@pytest.mark.parametrize("rows", [1, 20])
def test_the_index_holds_its_own_copy(
    rows: int, dims: tuple[int, ...], metric: str, build: Build
) -> None:
    gallery, ids, queries = drawn(0, rows, 8), np.arange(rows), drawn(1, 5, 8)
    queries_before, among = queries.copy(), np.arange(10)
    schedule = FunnelSchedule(dims, (12, 9)[: len(dims) - 1], min(5, rows))
    index = build(gallery, schedule, ids, metric)
    before, filtered = index.search(queries), index.search(queries, among=among)
    gallery[:], ids[:] = 7, 7
    assert_same(index.search(queries), before)
    assert_same(index.search(queries, among=among), filtered)
    np.testing.assert_array_equal(queries, queries_before)
    np.testing.assert_array_equal(among, np.arange(10))


def test_columns_past_the_last_dim_do_not_matter(build: Build) -> None:
    gallery, queries = drawn(0, 30, 16), drawn(1, 9, 16)
    schedule = FunnelSchedule((4, 8), (10,), 5)
    expected = build(gallery[:, :8], schedule).search(queries[:, :8])
    assert_same(build(gallery, schedule).search(queries), expected)


@pytest.mark.parametrize("metric", METRICS)
def test_an_index_knows_what_it_is(metric: str, build: Build) -> None:
    index: Index = build(GALLERY, SCHEDULE, None, metric, "5e1f")
    assert build(GALLERY, SCHEDULE).ids.tolist() == list(range(9))
    assert (len(index), index.width, index.schedule) == (9, 4, SCHEDULE)
    assert (index.metric, index.encoder_fingerprint) == (metric, "5e1f")
    assert build(GALLERY, SCHEDULE).encoder_fingerprint is None
    prompted: Index = build(GALLERY, SCHEDULE, prompt="passage: ")
    assert (prompted.prompt, index.prompt) == ("passage: ", None)


def test_facts_without_a_prompt_are_those_of_before() -> None:
    """An index that was saved before there were prompts reads on, and has the same fingerprint."""
    facts = IndexFacts(SCHEDULE)
    assert "prompt" not in facts.to_json()
    assert IndexFacts.from_json(facts.to_json()) == facts
    prompted = IndexFacts(SCHEDULE, prompt="passage: ")
    assert IndexFacts.from_json(json.loads(json.dumps(prompted.to_json()))) == prompted


def test_a_prompt_is_a_text(refuses: Refuses) -> None:
    text = (
        "prompt must be the text that stood before each text of the gallery, or None. "
        "Received: prompt=['passage: ']. Give for example manifest.prompts['passage']."
    )
    with refuses(ValueError, text):
        IndexFacts(SCHEDULE, prompt=["passage: "])  # type: ignore[arg-type]
    with pytest.raises(ManifestError, match="prompt must be the text"):
        IndexFacts.from_json({**IndexFacts(SCHEDULE).to_json(), "prompt": 3})


def test_no_queries_have_no_neighbours(build: Build) -> None:
    empty = build(GALLERY, SCHEDULE).search(np.zeros((0, 4)))
    assert (len(empty), empty.ids.shape, empty.scores.shape) == (0, (0, 3), (0, 3))
    assert [empty.ids.dtype, empty.scores.dtype] == [np.int64, np.float32]


def test_a_gallery_of_as_many_rows_as_neighbours(build: Build) -> None:
    assert build(GALLERY[:3], SCHEDULE).search(QUERIES).ids.shape == (5, 3)


# What is refused, and in which words.

NO_FINITE = (
    "The {} must be finite, and so must the squares of their lengths in float32. "
    "Received: NaN, infinity, or rows longer than 1e19. "
    "Look for failed rows where the embeddings were made."
)
NO_REALS = (
    "The {} must be an array of real numbers. Received: {}. "
    "Give a NumPy array of floats, every row as long as the others."
)
NO_WIDTH = (
    "The {} must be (rows, width) with a width of at least 4. Received: shape {}. "
    "Embed them at the funnel's last dim, one row each."
)
NO_METRIC = 'metric must be "cosine", "dot" or "l2". Received: metric={!r}. Take cosine if unsure.'
NO_ROWS = (
    "A gallery needs at least as many rows as the funnel returns. "
    "Received: {} rows for k=3. Lower k, or add rows."
)
NO_IDS = (
    "ids must be one int64 >= 0, or one string that is not empty, per gallery row. "
    "Received: {} for 9 rows. "
    "Give one per row; an index built without any numbers its rows from 0."
)
REPEATED_IDS = (
    "ids must differ from row to row. Received: {} that repeat another. Give every row its own."
)
NO_AMONG = (
    "among must be int64 ids >= 0, or strings, in one dimension. Received: {}. "
    "Give the ids that may be returned, or leave it out for all."
)
NO_K = (
    "k must lie in 1..4, as many as the last shortlist holds. Received: k={!r}. "
    "Open the index with a schedule whose shortlists are longer."
)


def with_a_bad_value(value: float, row: int) -> Array:
    values = GALLERY.copy()
    values[row, 3] = value
    return values


NO_ARRAY = "{} must be an array. Received: {}. Give a NumPy array, every row as long as the others."
RAGGED = (
    "setting an array element with a sequence. The requested array has an inhomogeneous shape "
    "after 1 dimensions. The detected shape was (2,) + inhomogeneous part"
)
MASKED = (
    "{} must hold a value at every place. Received: a masked array. "
    "Fill what is masked, e.g. with .filled(0)."
)
TOO_LARGE = (
    "The {} must be numbers that float32 holds. Received: float64 of shape {}, in which 1e+300 "
    "would become inf. Scale or round them first."
)
UNREAL: list[tuple[Any, str]] = [
    ("abc", "<U3 of shape ()"),
    (GALLERY.astype("S3"), "|S3 of shape (9, 4)"),
    (GALLERY + 0j, "complex64 of shape (9, 4)"),
    (
        [[1.0] * 4, [1.0]],
        "list (setting an array element with a sequence. The requested array has an inhomogeneous "
        "shape after 1 dimensions. The detected shape was (2,) + inhomogeneous part)",
    ),
]
NARROW: list[Any] = [GALLERY[:, :3], GALLERY[0], GALLERY[None], 1.0, []]
BAD = [with_a_bad_value(value, row) for value in (np.nan, np.inf, -np.inf, 1e20) for row in (0, 8)]

BUILDS: list[tuple[dict[str, Any], str]] = [
    *(({"metric": name}, NO_METRIC.format(name)) for name in ("euclid", "L2", "", None, "ip")),
    *(({"embeddings": values}, NO_FINITE.format("gallery")) for values in BAD),
    *(({"embeddings": values}, NO_WIDTH.format("gallery", np.shape(values))) for values in NARROW),
    *(({"embeddings": values}, NO_REALS.format("gallery", name)) for values, name in UNREAL),
    *(({"embeddings": GALLERY[:rows]}, NO_ROWS.format(rows)) for rows in (0, 2)),
    ({"ids": [3] * 9}, REPEATED_IDS.format(8)),
    ({"ids": [0, 1, 2, 3, 4, 5, 6, 7, 0]}, REPEATED_IDS.format(1)),
    ({"ids": [-1, *range(8)]}, NO_IDS.format("int64 ids of shape (9,)")),
    ({"ids": np.arange(9, dtype=np.uint64) + 2**63}, NO_IDS.format("uint64 ids of shape (9,)")),
    ({"ids": range(8)}, NO_IDS.format("int64 ids of shape (8,)")),
    ({"ids": np.ones((9, 1), int)}, NO_IDS.format("int64 ids of shape (9, 1)")),
    ({"ids": []}, NO_IDS.format("float64 ids of shape (0,)")),
    ({"ids": np.arange(9.0)}, NO_IDS.format("float64 ids of shape (9,)")),
    ({"ids": [True] * 9}, NO_IDS.format("bool ids of shape (9,)")),
    ({"ids": [2**64, *range(8)]}, NO_IDS.format("object ids of shape (9,)")),
    ({"ids": set(range(9))}, NO_ARRAY.format("ids", "set")),
    ({"ids": np.ma.masked_equal(range(9), 2)}, MASKED.format("ids")),
    (
        {"embeddings": np.ma.masked_equal(GALLERY, GALLERY[0, 0])},
        MASKED.format("The gallery"),
    ),
    ({"embeddings": np.full((9, 4), 1e300)}, TOO_LARGE.format("gallery", "(9, 4)")),
    ({"ids": ["a", "b", "c", 3, 4, 5, 6, 7, 8]}, NO_IDS.format("int and str ids of shape (9,)")),
    ({"ids": ["", *"abcdefgh"]}, NO_IDS.format("str ids of shape (9,)")),
    ({"ids": ["\ud800", *"abcdefgh"]}, NO_IDS.format("str ids of shape (9,)")),
    ({"ids": [b"a"] * 9}, NO_IDS.format("|S1 ids of shape (9,)")),
    ({"ids": list("abcdefghh")}, REPEATED_IDS.format(1)),
]
SEARCHES: list[tuple[dict[str, Any], str]] = [
    *(({"queries": values}, NO_FINITE.format("queries")) for values in BAD),
    *(({"queries": values}, NO_WIDTH.format("queries", np.shape(values))) for values in NARROW),
    *(({"queries": values}, NO_REALS.format("queries", name)) for values, name in UNREAL),
    *(({"k": k}, NO_K.format(k)) for k in (0, -1, 5, 1.0, "1", np.float32(2), True, [1])),
    ({"among": [-1]}, NO_AMONG.format("int64 of shape (1,)")),
    ({"among": [1.0]}, NO_AMONG.format("float64 of shape (1,)")),
    ({"among": [[1]]}, NO_AMONG.format("int64 of shape (1, 1)")),
    ({"among": 1}, NO_AMONG.format("int64 of shape ()")),
    ({"among": {1}}, NO_ARRAY.format("among", "set")),
    ({"among": [[1], [1, 2]]}, NO_ARRAY.format("among", f"list ({RAGGED})")),
    ({"among": np.ma.masked_equal([1, 2], 2)}, MASKED.format("among")),
    ({"queries": np.ma.masked_equal(QUERIES, QUERIES[0, 0])}, MASKED.format("The queries")),
    ({"queries": [[1e300] * 4]}, TOO_LARGE.format("queries", "(1, 4)")),
    ({"queries": np.array([[None] * 4])}, NO_REALS.format("queries", "object of shape (1, 4)")),
    ({"among": [True]}, NO_AMONG.format("bool of shape (1,)")),
    (
        {"among": ["a"]},
        "Ids must be of the kind that the index was built with. "
        "Received: strings for an index whose ids are int64. Give int64.",
    ),
    ({"among": ["a", 1]}, NO_AMONG.format("int and str of shape (2,)")),
    ({"among": np.array([2**63], np.uint64)}, NO_AMONG.format("uint64 of shape (1,)")),
]


@pytest.mark.parametrize(("changed", "text"), BUILDS)
def test_a_gallery_that_is_refused(
    changed: dict[str, Any], text: str, build: Build, refuses: Refuses
) -> None:
    with refuses(ValueError, text):
        build(**{"embeddings": GALLERY, "schedule": SCHEDULE, **changed})


@pytest.mark.parametrize(("changed", "text"), SEARCHES)
def test_a_search_that_is_refused(
    changed: dict[str, Any], text: str, build: Build, refuses: Refuses
) -> None:
    index = build(GALLERY, SCHEDULE)
    with refuses(ValueError, text):
        index.search(**{"queries": QUERIES, **changed})


@pytest.mark.parametrize("schedule", [(2, 4), 4, None, {"dims": [2, 4]}])
def test_a_schedule_is_no_tuple_of_dims(
    schedule: Any, build: Build, tmp_path: Path, refuses: Refuses
) -> None:
    text = (
        f"A schedule must be a FunnelSchedule. Received: {schedule!r}. "
        "Write for example FunnelSchedule(dims=(16, 256), shortlists=(200,), k=10)."
    )
    with refuses(TypeError, text):
        build(GALLERY, schedule)
    index = build(GALLERY, SCHEDULE)
    index.save(tmp_path)
    with refuses(TypeError, text) if schedule is not None else nullcontext():
        open_index(tmp_path, schedule)
