"""`ExactIndex` beside a search that scores everything in float64."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex, exact
from keras_mrl_serving.results import Neighbors
from tests.helpers.galleries import (
    METRICS,
    Array,
    Refuses,
    Search,
    assert_nearest,
    assert_scored,
    assert_ties_by_id,
    drawn,
    funnel,
    searches,
)


def built(search: Search, schedule: FunnelSchedule | None = None) -> ExactIndex:
    schedule = schedule or search.schedule
    return ExactIndex.build(search.gallery, schedule, search.ids, search.metric)


@given(searches())
def test_one_stage_is_exhaustive_search(search: Search) -> None:
    one = FunnelSchedule(search.schedule.dims[-1:], (), search.schedule.k)
    found = built(search, one).search(search.queries)
    assert_nearest(found, search)
    assert_ties_by_id(found)


@given(searches())
def test_every_stage_keeps_the_best_of_the_one_before(search: Search) -> None:
    found = built(search).search(search.queries)
    assert found.ids.shape == (len(search.queries), search.schedule.k)
    assert_scored(found, search)
    assert_ties_by_id(found)
    for row, query in enumerate(search.queries):
        expected = search.told(query)
        if expected is not None:
            assert found.ids[row].tolist() == expected.tolist()


@pytest.mark.parametrize("metric", METRICS)
def test_most_funnels_are_told_by_that_test(metric: str) -> None:
    queries, gallery, ids = drawn(0, 50, 24), drawn(1, 40, 24), np.arange(40)
    schedule = FunnelSchedule((4, 12, 24), (20, 10), 3)
    told = [funnel(query, gallery, schedule, ids, metric) is not None for query in queries]
    assert np.mean(told) > 0.5
    exhaustive = FunnelSchedule((24,), (), 3)
    short, whole = (
        ExactIndex.build(gallery, stages, metric=metric).search(queries)
        for stages in (schedule, exhaustive)
    )
    assert (short.ids != whole.ids).any()


@given(searches(), st.integers(0, 5))
def test_a_funnel_that_shortlists_everything_is_exhaustive_search(
    search: Search, surplus: int
) -> None:
    everything = tuple(len(search.gallery) + surplus for _ in search.schedule.shortlists)
    whole = FunnelSchedule(search.schedule.dims, everything, search.schedule.k)
    assert_nearest(built(search, whole).search(search.queries), search)


def assert_near(
    found: Neighbors, row: int, expected: Neighbors, other: int, search: Search
) -> None:
    """Two answers to one query that floats were added for in another order."""
    query = search.queries[other]
    if search.told(query) is not None:
        assert found.ids[row].tolist() == expected.ids[other].tolist()
        rows = search.rows_of(expected.ids[other])
        far = np.abs(found.scores[row] - expected.scores[other])
        assert (far <= search.slack()[other, rows]).all()


@given(searches())
def test_an_answer_does_not_depend_on_the_other_queries(search: Search) -> None:
    index = built(search)
    together = index.search(search.queries)
    for row, query in enumerate(search.queries):
        assert_near(index.search(query[None]), 0, together, row, search)


@given(searches(), st.integers(1, 200))
def test_chunks_do_not_show(search: Search, most_scores: int) -> None:
    index = built(search)
    whole = index.search(search.queries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "_MAX_SCORES", most_scores)
        parts = index.search(search.queries)
    assert parts.ids.shape == whole.ids.shape
    assert [parts.ids.dtype, parts.scores.dtype] == [np.int64, np.float32]
    for row in range(len(search.queries)):
        assert_near(parts, row, whole, row, search)


@pytest.mark.parametrize(
    ("rows", "dims", "shortlists", "queries_at_once"),
    [
        (100, (64,), (), 31),  # 2 rows of 64 columns
        (100, (8, 64), (20,), 3),  # 20 rows of 56 columns
        (100, (8, 64), (5000,), 1),  # 100 rows of them, for there are no more
        (100, (4, 8, 64), (100, 2), 10),  # 100 rows of 4 columns
    ],
)
def test_what_is_held_at_once_is_bounded(
    rows: int,
    dims: tuple[int, ...],
    shortlists: tuple[int, ...],
    queries_at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rerank gathers shortlist x columns numbers a query: many queries of it fill a memory."""
    monkeypatch.setattr(exact, "_MAX_SCORES", 4000)
    index = ExactIndex.build(drawn(0, rows, 64), FunnelSchedule(dims, shortlists, 2))
    seen = []
    search = index._some

    def counted(some: Array, k: int, among: Array | None) -> Any:
        seen.append(len(some))
        return search(some, k, among)

    monkeypatch.setattr(index, "_some", counted)
    index.search(drawn(1, 40, 64))
    assert max(seen) == queries_at_once
    assert sum(seen) == 40


# Vectors whose products and lengths float32 holds exactly, so that equal scores are equal bits.
EAST, NORTH, WEST = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]


def test_equal_scores_come_in_order_of_id() -> None:
    gallery = np.array([WEST, EAST, NORTH, EAST, EAST, WEST, EAST])
    ids = np.array([60, 31, 50, 12, 44, 3, 25])
    for k, expected in ((7, [12, 25, 31, 44, 50, 3, 60]), (3, [12, 25, 31]), (1, [12])):
        found = ExactIndex.build(gallery, FunnelSchedule((2,), (), k), ids).search([EAST, EAST])
        assert found.ids.tolist() == [expected, expected]
    assert found.scores.tolist() == [[1.0], [1.0]]


@given(st.permutations(range(12)), st.integers(1, 12), st.data())
def test_a_tie_across_the_edge_of_a_shortlist_goes_to_the_lower_ids(
    ids: list[int], shortlist: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, shortlist))
    # All alike at dim 2; the last column, which only the second stage sees, tells two kinds apart.
    kinds = np.array(data.draw(st.lists(st.sampled_from([0.0, 3.0]), min_size=12, max_size=12)))
    gallery = np.column_stack([np.full(12, 4.0), np.zeros(12), kinds])
    schedule = FunnelSchedule((2, 3), (shortlist,), k)
    found = ExactIndex.build(gallery, schedule, ids).search([[1.0, 0.0, 0.0]])
    listed = sorted(range(12), key=lambda row: ids[row])[:shortlist]
    listed.sort(key=lambda row: (kinds[row], ids[row]))  # the longer vector has the lower cosine
    assert found.ids.tolist() == [[ids[row] for row in listed[:k]]]


def test_ties_with_worse_and_better_rows_around_the_edge() -> None:
    gallery = np.array([NORTH, EAST, NORTH, WEST, NORTH, NORTH])
    found = ExactIndex.build(gallery, FunnelSchedule((2,), (), 3)).search([EAST])
    assert found.ids.tolist() == [[1, 0, 2]]
    assert found.scores.tolist() == [[1.0, 0.0, 0.0]]


def test_a_zero_vector_is_equally_near_to_all() -> None:
    gallery = np.array([WEST, [0.0, 0.0], EAST, NORTH])
    index = ExactIndex.build(gallery, FunnelSchedule((1, 2), (4,), 4), [3, 2, 1, 0])
    found = index.search([[0.0, 0.0], EAST])
    assert found.ids.tolist() == [[0, 1, 2, 3], [1, 0, 2, 3]]
    assert found.scores.tolist() == [[0, 0, 0, 0], [1, 0, 0, -1]]


def test_length_does_not_matter() -> None:
    gallery, queries = drawn(0, 30, 16), drawn(1, 9, 16)
    schedule = FunnelSchedule((4, 16), (10,), 5)
    expected = ExactIndex.build(gallery, schedule).search(queries)
    for scale in (2.0**-6, 2.0**6):  # powers of two: the digits stay the same
        found = ExactIndex.build(gallery * scale, schedule).search(queries / scale)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-6)


def test_columns_past_the_last_dim_do_not_matter() -> None:
    gallery, queries = drawn(0, 30, 16), drawn(1, 9, 16)
    schedule = FunnelSchedule((4, 8), (10,), 5)
    expected = ExactIndex.build(gallery[:, :8], schedule).search(queries[:, :8])
    found = ExactIndex.build(gallery, schedule).search(queries)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.scores, expected.scores)


@pytest.mark.parametrize("dims", [(8,), (2, 8)])
@pytest.mark.parametrize("rows", [1, 20])
def test_the_index_keeps_its_own_copy(dims: tuple[int, ...], rows: int) -> None:
    gallery, ids = drawn(0, rows, 8), np.arange(rows)
    queries = drawn(1, 5, 8)
    given = queries.copy()
    index = ExactIndex.build(gallery, FunnelSchedule(dims, (20,) * (len(dims) - 1), 1), ids)
    before = index.search(queries)
    gallery[:], ids[:] = 7, 7
    after = index.search(queries)
    np.testing.assert_array_equal(after.ids, before.ids)
    np.testing.assert_array_equal(after.scores, before.scores)
    np.testing.assert_array_equal(queries, given)


def test_no_queries_have_no_neighbours() -> None:
    index = ExactIndex.build(drawn(0, 5, 8), FunnelSchedule((2, 8), (4,), 3))
    found = index.search(np.zeros((0, 8)))
    assert (found.ids.shape, found.scores.shape) == ((0, 3), (0, 3))
    assert [found.ids.dtype, found.scores.dtype] == [np.int64, np.float32]
    assert len(found) == 0


def test_an_index_knows_its_size_and_its_width() -> None:
    schedule = FunnelSchedule((2, 8), (4,), 3)
    index = ExactIndex.build(drawn(0, 5, 10), schedule)
    assert (len(index), index.width, index.schedule) == (5, 8, schedule)
    assert index.ids.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", ["float16", "float64", "int16", "object"])
def test_numbers_of_any_dtype_and_layout(dtype: str) -> None:
    gallery, queries = (np.round(drawn(seed, 9, 6)).astype(dtype) for seed in (0, 1))
    schedule = FunnelSchedule((3, 6), (9,), 4)
    expected = ExactIndex.build(gallery.astype(np.float32), schedule).search(
        queries.astype(np.float32)
    )
    readonly = queries.view()
    readonly.flags.writeable = False
    for same in (np.asfortranarray(gallery), gallery.tolist(), gallery[::-1][::-1]):
        found = ExactIndex.build(same, schedule, np.arange(9, dtype=np.uint8)).search(readonly)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.scores, expected.scores)


SCHEDULE = FunnelSchedule((2, 4), (3,), 2)
GALLERY = drawn(0, 6, 4)


@pytest.mark.parametrize("values", [GALLERY[:, :3], GALLERY[0], GALLERY[None], 1.0, []])
def test_shapes_must_fit(values: Any, refuses: Refuses) -> None:
    text = (
        "The {} must be (rows, width) with a width of at least 4. "
        f"Received: shape {np.shape(values)}. Embed them at the funnel's last dim, one row each."
    )
    with refuses(ValueError, text.format("gallery")):
        ExactIndex.build(values, SCHEDULE)
    with refuses(ValueError, text.format("queries")):
        ExactIndex.build(GALLERY, SCHEDULE).search(values)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e20])
def test_values_must_be_finite(bad: float, refuses: Refuses) -> None:
    values = GALLERY.copy()
    values[5, 3] = bad
    text = (
        "The {} must be finite, and so must the squares of their lengths in float32. "
        "Received: NaN, infinity, or rows longer than 1e19. "
        "Look for failed rows where the embeddings were made."
    )
    with refuses(ValueError, text.format("gallery")):
        ExactIndex.build(values, SCHEDULE)
    with refuses(ValueError, text.format("queries")):
        ExactIndex.build(GALLERY, SCHEDULE).search(values)


@pytest.mark.parametrize(
    ("values", "received"),
    [
        ("abc", "<U3 of shape ()"),
        (GALLERY.astype(str).astype("S3"), "|S3 of shape (6, 4)"),
        (GALLERY + 0j, "complex64 of shape (6, 4)"),
    ],
)
def test_values_must_be_real_numbers(values: Any, received: str, refuses: Refuses) -> None:
    text = (
        f"The {{}} must be an array of real numbers. Received: {received}. "
        "Give a NumPy array of floats, every row as long as the others."
    )
    with refuses(ValueError, text.format("gallery")):
        ExactIndex.build(values, SCHEDULE)
    with refuses(ValueError, text.format("queries")):
        ExactIndex.build(GALLERY, SCHEDULE).search(values)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_gallery_needs_as_many_rows_as_neighbours(rows: int, refuses: Refuses) -> None:
    text = (
        "A gallery needs at least as many rows as the funnel returns. "
        f"Received: {rows} rows for k=2. Lower k, or add rows."
    )
    with refuses(ValueError, text):
        ExactIndex.build(GALLERY[:rows], SCHEDULE)
    assert len(ExactIndex.build(GALLERY[:2], SCHEDULE)) == 2


@pytest.mark.parametrize(
    ("ids", "received"),
    [
        ([-1, 2, 3, 4, 5, 6], "int64 ids of shape (6,)"),
        (np.arange(6, dtype=np.uint64) + 2**63, "uint64 ids of shape (6,)"),
        ([1, 2], "int64 ids of shape (2,)"),
        (np.arange(6)[:, None], "int64 ids of shape (6, 1)"),
        ([], "float64 ids of shape (0,)"),
        (np.arange(6.0), "float64 ids of shape (6,)"),
        ([True] * 6, "bool ids of shape (6,)"),
        (list("abcdef"), "<U1 ids of shape (6,)"),
    ],
)
def test_ids_are_one_int64_per_row(ids: Any, received: str, refuses: Refuses) -> None:
    text = (
        f"ids must be one int64 >= 0 per gallery row. Received: {received} for 6 rows. "
        "Give one per row; an index built without any numbers its rows from 0."
    )
    with refuses(ValueError, text):
        ExactIndex.build(GALLERY, SCHEDULE, ids)


def test_the_largest_id_is_an_id() -> None:
    ids = np.arange(6, dtype=np.uint64) + np.uint64(2**63 - 6)
    found = ExactIndex.build(GALLERY, SCHEDULE, ids).search(GALLERY[5:])
    assert found.ids[0, 0] == 2**63 - 1
