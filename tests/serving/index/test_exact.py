"""`ExactIndex` beside a search that scores everything in float64."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex
from keras_mrl_serving.results import Neighbors
from tests.helpers.galleries import (
    METRICS,
    Search,
    assert_lowest_of_copies,
    assert_nearest,
    assert_same,
    assert_scored,
    assert_ties_by_id,
    drawn,
    funnel_ids,
    searches,
)


def built(search: Search, schedule: FunnelSchedule | None = None) -> ExactIndex:
    schedule = schedule or search.schedule
    return ExactIndex.build(search.gallery, schedule, search.ids, search.metric)


@given(searches())
def test_one_stage_is_exhaustive_search(search: Search) -> None:
    one = FunnelSchedule(search.schedule.dims[-1:], (), search.schedule.k)
    result = built(search, one).search(search.queries)
    assert_nearest(result, search)
    assert_ties_by_id(result)


@given(searches())
def test_every_stage_keeps_the_best_of_the_one_before(search: Search) -> None:
    result = built(search).search(search.queries)
    assert result.ids.shape == (len(search.queries), search.schedule.k)
    assert_scored(result, search)
    assert_ties_by_id(result)
    for row, query in enumerate(search.queries):
        expected = search.expected_ids(query)
        if expected is not None:
            assert result.ids[row].tolist() == expected.tolist()


@pytest.mark.parametrize("metric", METRICS)
def test_that_test_checks_most_funnels(metric: str) -> None:
    queries, gallery, ids = drawn(0, 50, 24), drawn(1, 40, 24), np.arange(40)
    schedule = FunnelSchedule((4, 12, 24), (20, 10), 3)
    checked = [funnel_ids(query, gallery, schedule, ids, metric) is not None for query in queries]
    assert np.mean(checked) > 0.5
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
    result: Neighbors, row: int, expected: Neighbors, other: int, search: Search
) -> None:
    """Two answers to one query that floats were added for in another order."""
    query = search.queries[other]
    if search.expected_ids(query) is not None:
        assert result.ids[row].tolist() == expected.ids[other].tolist()
        rows = search.rows_of(expected.ids[other])
        far = np.abs(result.scores[row] - expected.scores[other])
        assert (far <= search.slack()[other, rows]).all()


@given(searches())
def test_an_answer_does_not_depend_on_the_other_queries(search: Search) -> None:
    index = built(search)
    together = index.search(search.queries)
    for row, query in enumerate(search.queries):
        assert_near(index.search(query[None]), 0, together, row, search)


@given(searches(), st.integers(1, 200))
def test_chunks_do_not_show(search: Search, numbers_at_once: int) -> None:
    index = built(search)
    whole = index.search(search.queries)
    index.numbers_at_once = numbers_at_once
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
def test_a_search_holds_a_bounded_number_of_numbers(
    rows: int, dims: tuple[int, ...], shortlists: tuple[int, ...], queries_at_once: int
) -> None:
    """The rerank gathers shortlist x columns numbers a query: many queries of it fill a memory."""
    chunk_sizes: list[int] = []

    class Watched(np.ndarray[Any, Any]):
        """Columns of the first stage, which note how many queries they are multiplied with."""

        def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
            arrays = [np.asarray(array) for array in inputs]
            if ufunc is np.matmul:
                chunk_sizes.append(len(arrays[0]))
            return getattr(ufunc, method)(*arrays, **options)

    whole = ExactIndex.build(drawn(0, rows, 64), FunnelSchedule(dims, shortlists, 2))
    first, *others = whole.blocks
    index = ExactIndex(whole.facts, whole.ids, [first.view(Watched), *others], whole.squares)
    index.numbers_at_once = 4000
    queries = drawn(1, 40, 64)
    np.testing.assert_array_equal(index.search(queries).ids, whole.search(queries).ids)
    assert max(chunk_sizes) == queries_at_once
    assert sum(chunk_sizes) == 40


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dims", [(24,), (6, 24)])
def test_equal_rows_tie_though_a_matrix_product_tells_them_apart(
    dims: tuple[int, ...], metric: str
) -> None:
    """As BLAS does at the edge of its blocks, here everywhere: the last bit of a product varies."""
    noise = np.random.default_rng(0)

    class Uneven(np.ndarray[Any, Any]):
        def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
            result = getattr(ufunc, method)(*map(np.asarray, inputs), **options)
            if ufunc is np.matmul:
                result *= 1 + 2.0**-23 * noise.integers(-1, 2, result.shape)
            return result

    gallery = drawn(0, 40, 24)[noise.integers(0, 40, 400)]
    schedule = FunnelSchedule(dims, (60,)[: len(dims) - 1], 30)
    whole = ExactIndex.build(gallery, schedule, noise.permutation(400), metric)
    first, *others = whole.blocks
    index = ExactIndex(whole.facts, whole.ids, [first.view(Uneven), *others], whole.squares)
    queries = drawn(1, 100, 24)
    expected = whole.search(queries)
    assert_lowest_of_copies(expected, gallery, whole.ids)
    assert_same(index.search(queries), expected)
    index.numbers_at_once = 100  # rows that tie are compared in parts
    assert_same(index.search(queries), expected)


# Vectors whose products and lengths float32 holds exactly, so that equal scores are equal bits.
EAST, NORTH, WEST = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]


@given(st.permutations(range(12)), st.integers(1, 12), st.data())
def test_a_tie_across_the_edge_of_a_shortlist_goes_to_the_lower_ids(
    ids: list[int], shortlist: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, shortlist))
    # All alike at dim 2; the last column, which only the second stage sees, tells two kinds apart.
    kinds = np.array(data.draw(st.lists(st.sampled_from([0.0, 3.0]), min_size=12, max_size=12)))
    gallery = np.column_stack([np.full(12, 4.0), np.zeros(12), kinds])
    schedule = FunnelSchedule((2, 3), (shortlist,), k)
    result = ExactIndex.build(gallery, schedule, ids).search([[1.0, 0.0, 0.0]])
    listed = sorted(range(12), key=lambda row: ids[row])[:shortlist]
    listed.sort(key=lambda row: (kinds[row], ids[row]))  # the longer vector has the lower cosine
    assert result.ids.tolist() == [[ids[row] for row in listed[:k]]]


def test_ties_with_worse_and_better_rows_around_the_edge() -> None:
    gallery = np.array([NORTH, EAST, NORTH, WEST, NORTH, NORTH])
    result = ExactIndex.build(gallery, FunnelSchedule((2,), (), 3)).search([EAST])
    assert result.ids.tolist() == [[1, 0, 2]]
    assert result.scores.tolist() == [[1.0, 0.0, 0.0]]


def test_length_does_not_matter() -> None:
    gallery, queries = drawn(0, 30, 16), drawn(1, 9, 16)
    schedule = FunnelSchedule((4, 16), (10,), 5)
    expected = ExactIndex.build(gallery, schedule).search(queries)
    for scale in (2.0**-6, 2.0**6):  # powers of two: the digits stay the same
        result = ExactIndex.build(gallery * scale, schedule).search(queries / scale)
        np.testing.assert_array_equal(result.ids, expected.ids)
        np.testing.assert_allclose(result.scores, expected.scores, rtol=0, atol=1e-6)
