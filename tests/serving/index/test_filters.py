"""Filters that are prepared once, beside `among` and a gallery of the rows that are left."""

from collections.abc import Callable
from typing import Any

import faiss
import numpy as np
import pytest

from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex, FaissIndex, FirstStage
from keras_mrl_serving.projection import Projection
from tests.helpers.galleries import Refuses

Build = Callable[..., ExactIndex | FaissIndex]

RNG = np.random.default_rng(0)
GALLERY = (RNG.normal(size=(6000, 16)) * 0.8 ** np.arange(16)).astype(np.float32)
QUERIES = (RNG.normal(size=(40, 16)) * 0.8 ** np.arange(16)).astype(np.float32)
SCHEDULE = FunnelSchedule((8, 16), (100,), 5)
STAGES = ["Flat", "HNSW32", "HNSW32_SQ8", "IVF32,Flat", "PQ4x4fs", "PCA6,HNSW32", "BFlat"]


def build_faiss(factory: str) -> Build:
    return lambda *args: FaissIndex.build(*args, first_stage=FirstStage.usual(factory))


@pytest.fixture(scope="module", params=["exact", *STAGES])
def index(request: pytest.FixtureRequest) -> ExactIndex | FaissIndex:
    build = ExactIndex.build if request.param == "exact" else build_faiss(request.param)
    made = build(GALLERY, SCHEDULE)
    if isinstance(made, FaissIndex):
        made.exhaustive_below = 10  # so that the first stage is searched
    return made


@pytest.mark.parametrize("share", [0.98, 0.5, 0.1, 0.01])
def test_a_filter_finds_as_much_as_a_search_without_one(
    share: float, index: ExactIndex | FaissIndex
) -> None:
    rows = np.sort(RNG.permutation(len(GALLERY))[: int(share * len(GALLERY))])
    exact = ExactIndex.build(GALLERY, FunnelSchedule((16,), (), 5))
    result = index.search(QUERIES, filter=index.prepare_filter(rows))
    assert result.ids.shape == (40, 5)
    assert np.isin(result.ids, rows).all()

    def recall(expected: Any, result: Any) -> float:
        pairs = zip(expected.ids, result.ids, strict=True)
        return float(np.mean([np.isin(*pair).mean() for pair in pairs]))

    without = recall(exact.search(QUERIES), index.search(QUERIES))
    assert recall(exact.search(QUERIES, among=rows), result) >= without - 0.05
    only = index.prepare_filter(rows)
    alone = [index.search(query[None], filter=only) for query in QUERIES]
    assert np.mean([one.ids[0] == row for one, row in zip(alone, result.ids, strict=True)]) > 0.97


def test_ids_a_mask_and_among_are_one_filter(index: ExactIndex | FaissIndex) -> None:
    assert index.prepare_filter([7, 10**9, 5, 7]).rows.tolist() == [5, 7]
    mask = RNG.random(len(GALLERY)) < 0.4
    ids = RNG.permutation(np.flatnonzero(mask))
    expected = index.search(QUERIES, among=ids)
    for only in (mask, mask.tolist(), ids, [*ids.tolist(), *ids[:3].tolist(), 10**9]):
        np.testing.assert_array_equal(
            index.search(QUERIES, filter=index.prepare_filter(only)).ids, expected.ids
        )


def test_each_query_may_have_its_own(index: ExactIndex | FaissIndex) -> None:
    odd = index.prepare_filter(np.arange(len(GALLERY)) % 2 == 1)
    three, none = index.prepare_filter([3]), index.prepare_filter([])
    result = index.search(QUERIES[:4], 3, filter=[odd, three, odd, none])
    assert (result.ids[[0, 2]] % 2 == 1).all()
    alone = index.search(QUERIES[[0, 2]], 3, filter=odd)
    np.testing.assert_array_equal(result.ids[[0, 2]], alone.ids)
    np.testing.assert_allclose(result.scores[[0, 2]], alone.scores, rtol=1e-6)
    assert result.ids[[1, 3]].tolist() == [[3, -1, -1], [-1, -1, -1]]
    assert result.scores[1, 1] == -np.inf
    assert index.search(QUERIES[:1], filter=[three]).ids.tolist() == [[3]]
    assert index.search(QUERIES[:0], filter=[]).ids.shape == (0, 5)
    assert index.search(QUERIES[:2], filter=none).ids.shape == (2, 0)


def test_a_search_does_not_make_a_filter_again(
    index: ExactIndex | FaissIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = index.prepare_filter(np.arange(3000))
    index.search(QUERIES[:1], filter=only)
    monkeypatch.setattr(faiss, "IDSelectorBitmap", None)
    index.search(QUERIES[:1], filter=only)


@pytest.mark.parametrize("factory", ["HNSW32_SQ8", "PQ4x4fs"])
@pytest.mark.parametrize(("left", "are_compared"), [(1024, True), (1025, False)])
def test_few_rows_are_all_compared(left: int, are_compared: bool, factory: str) -> None:
    index = build_faiss(factory)(GALLERY, SCHEDULE)
    only = index.prepare_filter(np.arange(left))
    index.search(QUERIES[:1], filter=only)
    assert (only.prepared["refined"] is None) == are_compared


def test_what_a_filter_leaves_decides_whether_a_graph_is_walked() -> None:
    stage = FirstStage("HNSW32", "efSearch=16")
    index = FaissIndex.build(GALLERY, FunnelSchedule((8, 16), (20,), 5), first_stage=stage)
    for left, has_codes in ((1500, True), (5900, False)):
        only = index.prepare_filter(np.arange(left))
        index.search(QUERIES[:1], filter=only)
        assert (only.prepared.get("alone") is not None) == has_codes
        found = [index.search(QUERIES, filter=only).ids]
        found += [index.search(query[None], filter=only).ids for query in QUERIES]
        assert (np.concatenate(found).astype(np.int64) < left).all()


def test_filters_of_strings() -> None:
    names = [f"row {number}" for number in range(50)]
    index = ExactIndex.build(GALLERY[:50], FunnelSchedule((16,), (), 2), names)
    mask = index.prepare_filter(np.arange(50) < 2)
    ids = index.prepare_filter(["row 1", "row 0", "nobody"])
    assert index.search(QUERIES, filter=mask).ids.tolist() == (
        index.search(QUERIES, filter=ids).ids.tolist()
    )
    one = index.prepare_filter(["row 7"])
    assert index.search(QUERIES[:2], filter=[one, mask]).ids[0].tolist() == ["row 7", ""]


def test_a_projected_index_hands_filters_on() -> None:
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0]
    projection = Projection(turn.T, (8,))
    index = ExactIndex.build(
        projection.transform(GALLERY), SCHEDULE, encoder_fingerprint=projection.fingerprint
    )
    bound = projection.bind(index)
    only = bound.prepare_filter([5, 7, 9])
    np.testing.assert_array_equal(
        bound.search(QUERIES, filter=only).ids, bound.search(QUERIES, among=[5, 7, 9]).ids
    )


def test_what_is_no_filter_is_refused(index: ExactIndex | FaissIndex, refuses: Refuses) -> None:
    other = ExactIndex.build(GALLERY, SCHEDULE).prepare_filter([1])
    only = index.prepare_filter([1, 2])
    with refuses(
        ValueError,
        "A filter is for the index that prepared it. Received: Filter(1 of 6000 rows) of another "
        "index. Prepare it anew: index.prepare_filter(...).",
    ):
        index.search(QUERIES, filter=other)
    with refuses(
        TypeError,
        "filter must be a prepared one, or a list with one per query. Received: int. "
        "Give index.prepare_filter(ids).",
    ):
        index.search(QUERIES[:2], filter=[1, 2])  # type: ignore[list-item]
    with refuses(
        ValueError,
        "A list of filters has one per query. Received: 1 filters for 40 queries. "
        "Give one for all.",
    ):
        index.search(QUERIES, filter=[only])
    with refuses(
        ValueError, "A search is filtered in one way. Received: among and filter. Give one of them."
    ):
        index.search(QUERIES, among=[1], filter=only)
    with refuses(
        ValueError,
        "Numbers are ids, and a mask of the rows is of bools. "
        "Received: a 0 or a 1 for every row. Give index.prepare_filter(mask.astype(bool)).",
    ):
        index.prepare_filter(np.arange(len(GALLERY)) % 2)
    with refuses(
        ValueError,
        "A mask has one bool per gallery row. Received: shape (5,) for 6000 rows. "
        "Give ids instead.",
    ):
        index.prepare_filter(np.ones(5, bool))
    with refuses(
        ValueError,
        "only must be int64 ids >= 0, or strings, in one dimension. "
        "Received: float64 of shape (2,). Give the ids that may be returned.",
    ):
        index.prepare_filter([0.5, 1])
    with refuses(
        ValueError,
        "only must be an array. Received: set. "
        "Give a NumPy array, every row as long as the others.",
    ):
        index.prepare_filter({3})  # type: ignore[arg-type]
