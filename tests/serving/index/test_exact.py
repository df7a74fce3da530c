"""`ExactIndex` beside a search that scores everything in float64."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex, exact
from keras_mrl_serving.results import Neighbors

Array = npt.NDArray[Any]
Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]

NEAR = 3e-6  # float32 scores of unit vectors differ by less from those of float64


def drawn(seed: int, rows: int, width: int) -> Array:
    """Vectors of every length, one in eight of them zero up to some prefix."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(rows, width)) * 10 ** rng.uniform(-2, 2, size=(rows, 1))
    zeros = rng.integers(0, width + 1, size=rows) * (rng.random(rows) < 0.125)
    vectors[np.arange(width) < zeros[:, None]] = 0
    return vectors.astype(np.float32)


def cosines(queries: Array, gallery: Array, dim: int) -> Array:
    q, g = (vectors[:, :dim].astype(np.float64) for vectors in (queries, gallery))
    lengths = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(g, axis=1)
    return np.divide(q @ g.T, lengths, out=np.zeros_like(lengths), where=lengths > 0)


def is_near_tie(higher: float, lower: float) -> bool:
    """Whether float32 may see the two in another order; it finds both zeros exactly."""
    return higher - lower < NEAR and not higher == lower == 0


def funnel(query: Array, gallery: Array, schedule: FunnelSchedule, ids: Array) -> Array | None:
    """The ids a funnel must find, best first; None where a near-tie decides."""
    rows = np.arange(len(gallery))
    for dim, keep in zip(schedule.dims, (*schedule.shortlists, schedule.k), strict=True):
        scores = cosines(query[None], gallery[rows], dim)[0]
        order = np.lexsort((ids[rows], -scores))
        if keep < len(rows) and is_near_tie(*scores[order[keep - 1 : keep + 1]]):
            return None
        rows, scores = rows[order[:keep]], scores[order[:keep]]
    return None if any(is_near_tie(a, b) for a, b in pairwise(scores)) else ids[rows]


@st.composite
def schedules(draw: st.DrawFn, width: int, rows: int) -> FunnelSchedule:
    dims = sorted(draw(st.sets(st.integers(1, width), min_size=1, max_size=4)))
    k = draw(st.integers(1, rows))
    sizes = [draw(st.integers(k, rows + 3)) for _ in dims[1:]]
    return FunnelSchedule(tuple(dims), tuple(sorted(sizes, reverse=True)), k)


@st.composite
def searches(draw: st.DrawFn) -> tuple[Array, Array, FunnelSchedule, Array]:
    rows, queries, width = (draw(st.integers(1, most)) for most in (40, 6, 24))
    seed = draw(st.integers(0, 2**32))
    ids = np.random.default_rng(seed).permutation(rows * 10)[:rows]
    schedule = draw(schedules(width, rows))
    return drawn(seed, queries, width), drawn(seed + 1, rows, width), schedule, ids


def assert_nearest(found: Neighbors, scores: Array, ids: Array) -> None:
    """What was found are the `k` best of `scores`, in order, up to near-ties."""
    k = found.ids.shape[1]
    rows = np.argsort(ids)[np.searchsorted(np.sort(ids), found.ids)]
    np.testing.assert_array_equal(ids[rows], found.ids)
    assert all(len(set(row)) == k for row in found.ids.tolist())
    expected = -np.sort(-scores, axis=1)[:, :k]
    np.testing.assert_allclose(np.take_along_axis(scores, rows, 1), expected, rtol=0, atol=NEAR)
    np.testing.assert_allclose(found.scores, expected, rtol=0, atol=NEAR)


@given(searches())
def test_one_stage_is_exhaustive_search(search: tuple[Array, Array, FunnelSchedule, Array]) -> None:
    queries, gallery, schedule, ids = search
    dim = schedule.dims[-1]
    found = ExactIndex(gallery, FunnelSchedule((dim,), (), schedule.k), ids).search(queries)
    assert [found.ids.dtype, found.scores.dtype] == [np.int64, np.float32]
    assert_nearest(found, cosines(queries, gallery, dim), ids)


@given(searches())
def test_every_stage_keeps_the_best_of_the_one_before(
    search: tuple[Array, Array, FunnelSchedule, Array],
) -> None:
    queries, gallery, schedule, ids = search
    found = ExactIndex(gallery, schedule, ids).search(queries)
    scores = cosines(queries, gallery, schedule.dims[-1])
    for row, query in enumerate(queries):
        expected = funnel(query, gallery, schedule, ids)
        if expected is not None:
            assert found.ids[row].tolist() == expected.tolist()
            positions = np.argsort(ids)[np.searchsorted(np.sort(ids), expected)]
            np.testing.assert_allclose(found.scores[row], scores[row, positions], rtol=0, atol=NEAR)


def test_most_funnels_are_told_by_that_test() -> None:
    queries, gallery, ids = drawn(0, 50, 24), drawn(1, 40, 24), np.arange(40)
    schedule = FunnelSchedule((4, 12, 24), (20, 10), 3)
    told = [funnel(query, gallery, schedule, ids) is not None for query in queries]
    assert np.mean(told) > 0.5
    exhaustive = FunnelSchedule((24,), (), 3)
    differs = ExactIndex(gallery, schedule).search(queries).ids != (
        ExactIndex(gallery, exhaustive).search(queries).ids
    )
    assert differs.any()


@given(searches(), st.integers(0, 5))
def test_a_funnel_that_shortlists_everything_is_exhaustive_search(
    search: tuple[Array, Array, FunnelSchedule, Array], surplus: int
) -> None:
    queries, gallery, schedule, ids = search
    everything = tuple(len(gallery) + surplus for _ in schedule.shortlists)
    whole = FunnelSchedule(schedule.dims, everything, schedule.k)
    found = ExactIndex(gallery, whole, ids).search(queries)
    assert_nearest(found, cosines(queries, gallery, schedule.dims[-1]), ids)


@given(searches())
def test_an_answer_does_not_depend_on_the_other_queries(
    search: tuple[Array, Array, FunnelSchedule, Array],
) -> None:
    queries, gallery, schedule, ids = search
    index = ExactIndex(gallery, schedule, ids)
    together = index.search(queries)
    for row, query in enumerate(queries):
        alone = index.search(query[None])
        if funnel(query, gallery, schedule, ids) is not None:
            assert alone.ids[0].tolist() == together.ids[row].tolist()
            np.testing.assert_allclose(alone.scores[0], together.scores[row], rtol=0, atol=1e-6)


@given(searches(), st.integers(1, 200))
def test_chunks_do_not_show(
    search: tuple[Array, Array, FunnelSchedule, Array], most_scores: int
) -> None:
    queries, gallery, schedule, ids = search
    index = ExactIndex(gallery, schedule, ids)
    whole = index.search(queries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "_MAX_SCORES", most_scores)
        parts = index.search(queries)
    assert parts.ids.shape == whole.ids.shape
    assert [parts.ids.dtype, parts.scores.dtype] == [np.int64, np.float32]
    for row, query in enumerate(queries):
        if funnel(query, gallery, schedule, ids) is not None:
            assert parts.ids[row].tolist() == whole.ids[row].tolist()
            np.testing.assert_allclose(parts.scores[row], whole.scores[row], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "dims", "shortlists", "queries_at_once"),
    [
        (100, (64,), (), 40),  # 100 scores each
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
    index = ExactIndex(drawn(0, rows, 64), FunnelSchedule(dims, shortlists, 2))
    seen = []
    search = index._search

    def counted(some: Array) -> Any:
        seen.append(len(some))
        return search(some)

    monkeypatch.setattr(index, "_search", counted)
    index.search(drawn(1, 40, 64))
    assert max(seen) == queries_at_once
    assert sum(seen) == 40


# Vectors whose products and lengths float32 holds exactly, so that equal scores are equal bits.
EAST, NORTH, WEST = [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]


def test_equal_scores_come_in_order_of_id() -> None:
    gallery = np.array([WEST, EAST, NORTH, EAST, EAST, WEST, EAST])
    ids = np.array([60, 31, 50, 12, 44, 3, 25])
    for k, expected in ((7, [12, 25, 31, 44, 50, 3, 60]), (3, [12, 25, 31]), (1, [12])):
        found = ExactIndex(gallery, FunnelSchedule((2,), (), k), ids).search([EAST, EAST])
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
    found = ExactIndex(gallery, schedule, ids).search([[1.0, 0.0, 0.0]])
    listed = sorted(range(12), key=lambda row: ids[row])[:shortlist]
    listed.sort(key=lambda row: (kinds[row], ids[row]))  # the longer vector has the lower cosine
    assert found.ids.tolist() == [[ids[row] for row in listed[:k]]]


def test_ties_with_worse_and_better_rows_around_the_edge() -> None:
    gallery = np.array([NORTH, EAST, NORTH, WEST, NORTH, NORTH])
    found = ExactIndex(gallery, FunnelSchedule((2,), (), 3)).search([EAST])
    assert found.ids.tolist() == [[1, 0, 2]]
    assert found.scores.tolist() == [[1.0, 0.0, 0.0]]


def test_a_zero_vector_is_equally_near_to_all() -> None:
    gallery = np.array([WEST, [0.0, 0.0], EAST, NORTH])
    index = ExactIndex(gallery, FunnelSchedule((1, 2), (4,), 4), [3, 2, 1, 0])
    found = index.search([[0.0, 0.0], EAST])
    assert found.ids.tolist() == [[0, 1, 2, 3], [1, 0, 2, 3]]
    assert found.scores.tolist() == [[0, 0, 0, 0], [1, 0, 0, -1]]


def test_length_does_not_matter() -> None:
    gallery, queries = drawn(0, 30, 16), drawn(1, 9, 16)
    schedule = FunnelSchedule((4, 16), (10,), 5)
    expected = ExactIndex(gallery, schedule).search(queries)
    for scale in (2.0**-6, 2.0**6):  # powers of two: the digits stay the same
        found = ExactIndex(gallery * scale, schedule).search(queries / scale)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=0, atol=1e-6)


def test_columns_past_the_last_dim_do_not_matter() -> None:
    gallery, queries = drawn(0, 30, 16), drawn(1, 9, 16)
    schedule = FunnelSchedule((4, 8), (10,), 5)
    expected = ExactIndex(gallery[:, :8], schedule).search(queries[:, :8])
    found = ExactIndex(gallery, schedule).search(queries)
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.scores, expected.scores)


@pytest.mark.parametrize("dims", [(8,), (2, 8)])
@pytest.mark.parametrize("rows", [1, 20])
def test_the_index_keeps_its_own_copy(dims: tuple[int, ...], rows: int) -> None:
    gallery, ids = drawn(0, rows, 8), np.arange(rows)
    queries = drawn(1, 5, 8)
    given = queries.copy()
    index = ExactIndex(gallery, FunnelSchedule(dims, (20,) * (len(dims) - 1), 1), ids)
    before = index.search(queries)
    gallery[:], ids[:] = 7, 7
    after = index.search(queries)
    np.testing.assert_array_equal(after.ids, before.ids)
    np.testing.assert_array_equal(after.scores, before.scores)
    np.testing.assert_array_equal(queries, given)


def test_no_queries_have_no_neighbours() -> None:
    index = ExactIndex(drawn(0, 5, 8), FunnelSchedule((2, 8), (4,), 3))
    found = index.search(np.zeros((0, 8)))
    assert (found.ids.shape, found.scores.shape) == ((0, 3), (0, 3))
    assert [found.ids.dtype, found.scores.dtype] == [np.int64, np.float32]
    assert len(found) == 0


def test_an_index_knows_its_size_and_its_width() -> None:
    schedule = FunnelSchedule((2, 8), (4,), 3)
    index = ExactIndex(drawn(0, 5, 10), schedule)
    assert (len(index), index.width, index.schedule) == (5, 8, schedule)
    assert index.ids.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("dtype", ["float16", "float64", "int16", "object"])
def test_numbers_of_any_dtype_and_layout(dtype: str) -> None:
    gallery, queries = (np.round(drawn(seed, 9, 6)).astype(dtype) for seed in (0, 1))
    schedule = FunnelSchedule((3, 6), (9,), 4)
    expected = ExactIndex(gallery.astype(np.float32), schedule).search(queries.astype(np.float32))
    readonly = queries.view()
    readonly.flags.writeable = False
    for same in (np.asfortranarray(gallery), gallery.tolist(), gallery[::-1][::-1]):
        found = ExactIndex(same, schedule, np.arange(9, dtype=np.uint8)).search(readonly)
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
        ExactIndex(values, SCHEDULE)
    with refuses(ValueError, text.format("queries")):
        ExactIndex(GALLERY, SCHEDULE).search(values)


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
        ExactIndex(values, SCHEDULE)
    with refuses(ValueError, text.format("queries")):
        ExactIndex(GALLERY, SCHEDULE).search(values)


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
        ExactIndex(values, SCHEDULE)
    with refuses(ValueError, text.format("queries")):
        ExactIndex(GALLERY, SCHEDULE).search(values)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_gallery_needs_as_many_rows_as_neighbours(rows: int, refuses: Refuses) -> None:
    text = (
        "A gallery needs at least as many rows as the funnel returns. "
        f"Received: {rows} rows for k=2. Lower k, or add rows."
    )
    with refuses(ValueError, text):
        ExactIndex(GALLERY[:rows], SCHEDULE)
    assert len(ExactIndex(GALLERY[:2], SCHEDULE)) == 2


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
        "Leave ids out to number the rows from 0."
    )
    with refuses(ValueError, text):
        ExactIndex(GALLERY, SCHEDULE, ids)


def test_the_largest_id_is_an_id() -> None:
    ids = np.arange(6, dtype=np.uint64) + np.uint64(2**63 - 6)
    found = ExactIndex(GALLERY, SCHEDULE, ids).search(GALLERY[5:])
    assert found.ids[0, 0] == 2**63 - 1
