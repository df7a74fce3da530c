"""`QdrantIndex` beside a search in float64 and beside `ExactIndex`.

By the imitation of qdrant-client, by Qdrant's own engine over a folder, and on the server at
KERAS_MRL_QDRANT_URL if that is set.
"""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qdrant_client import QdrantClient, models

from keras_mrl_serving import errors
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex, Index
from keras_mrl_serving.index.qdrant import QdrantIndex
from keras_mrl_serving.index.qdrant_collection import Collection
from tests.helpers.programs import last_error

Array = npt.NDArray[Any]
Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]

SERVER = os.environ.get("KERAS_MRL_QDRANT_URL")
METRICS = ("cosine", "dot", "l2")
SCHEDULE = FunnelSchedule((2, 4), (3,), 2)
GALLERY = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)

examples = settings(max_examples=40) if SERVER else settings()  # a server is slow to make each


@pytest.fixture(scope="module", params=["local", "server"] if SERVER else ["local"])
def client(request: pytest.FixtureRequest) -> Iterator[QdrantClient]:
    made = QdrantClient(url=SERVER) if request.param == "server" else QdrantClient(":memory:")
    yield made
    made.close()


@pytest.fixture(scope="module", params=["folder", "local", "server"][: 3 if SERVER else 2])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a gallery is built in: a client, or a folder with the real engine."""
    if request.param == "folder":
        return tmp_path_factory.mktemp("galleries")
    return QdrantClient(url=SERVER) if request.param == "server" else QdrantClient(":memory:")


def build(engine: Any, name: str) -> QdrantIndex:
    return QdrantIndex.build(engine, name, GALLERY, SCHEDULE)


@contextmanager
def place(engine: Any) -> Iterator[str]:
    """The name of a collection that is gone afterwards."""
    name = f"test-{uuid.uuid4()}"
    yield name
    if isinstance(engine, Path):
        shutil.rmtree(engine / name, ignore_errors=True)
    else:
        engine.delete_collection(name)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    of = "engine" if "engine" in request.fixturenames else "client"
    with place(request.getfixturevalue(of)) as name:
        yield name


class Search(NamedTuple):
    queries: Array
    gallery: Array
    schedule: FunnelSchedule
    ids: Array
    metric: str

    def build(self, client: Any, name: str) -> QdrantIndex:
        return QdrantIndex.build(
            client, name, self.gallery, self.schedule, self.ids, metric=self.metric
        )

    def exact(self) -> ExactIndex:
        return ExactIndex.build(self.gallery, self.schedule, self.ids, self.metric)

    @property
    def near(self) -> float:
        """How far float32 scores may be from those of float64: of lengths up to 15."""
        return 3e-6 if self.metric == "cosine" else 3e-4

    def scores(self, dim: int) -> Array:
        q, g = (part[:, :dim].astype(np.float64) for part in (self.queries, self.gallery))
        if self.metric == "l2":
            return -np.square(q[:, None] - g).sum(axis=2)
        lengths = np.linalg.norm(q, axis=1)[:, None] * np.linalg.norm(g, axis=1)
        if self.metric == "dot":
            lengths[:] = 1
        return np.divide(q @ g.T, lengths, out=np.zeros_like(lengths), where=lengths > 0)

    def expected_ids(self, query: int, allowed: Array | None = None) -> Array | None:
        """The ids a funnel must return, best first; None where a near-tie decides."""
        rows = np.arange(len(self.ids)) if allowed is None else allowed
        sizes = (*self.schedule.shortlists, self.schedule.k)
        for dim, size in zip(self.schedule.dims, sizes, strict=True):
            scores = self.scores(dim)[query, rows]
            order = np.argsort(-scores)
            if size < len(rows) and np.diff(-scores[order])[size - 1] < self.near:
                return None
            rows, scores = rows[order[:size]], scores[order[:size]]
        if any(a - b < self.near for a, b in pairwise(scores)):
            return None
        return np.asarray(self.ids[rows])

    def assert_searched_by(self, index: Index) -> None:
        """The index returns the expected ids of every query."""
        result = index.search(self.queries)
        for row in range(len(self.queries)):
            expected = self.expected_ids(row)
            assert expected is None or result.ids[row].tolist() == expected.tolist()


@st.composite
def searches(draw: st.DrawFn, metrics: tuple[str, ...] = METRICS) -> Search:
    rows, queries, width = (draw(st.integers(1, most)) for most in (30, 4, 16))
    metric = draw(st.sampled_from(metrics))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dims = sorted(draw(st.sets(st.integers(1, width), min_size=1, max_size=4)))
    k = draw(st.integers(1, rows))
    sizes = sorted((draw(st.integers(k, rows + 3)) for _ in dims[1:]), reverse=True)
    ids = rng.permutation(rows * 10)[:rows]
    schedule = FunnelSchedule(tuple(dims), tuple(sizes), k)
    return Search(
        drawn(rng, queries, width, metric), drawn(rng, rows, width, metric), schedule, ids, metric
    )


def drawn(rng: np.random.Generator, rows: int, width: int, metric: str = "cosine") -> Array:
    """Vectors, for cosine of every length, one in eight of them zero up to some prefix."""
    vectors = rng.normal(size=(rows, width))
    if metric == "cosine":
        vectors *= 10 ** rng.uniform(-2, 2, size=(rows, 1))
    zeros = rng.integers(0, width + 1, size=rows) * (rng.random(rows) < 0.125)
    vectors[np.arange(width) < zeros[:, None]] = 0
    return vectors.astype(np.float32)


def search(metric: str = "cosine") -> Search:
    rng = np.random.default_rng(3)
    queries, gallery = drawn(rng, 20, 16, metric), drawn(rng, 30, 16, metric)
    schedule = FunnelSchedule((4, 8, 16), (12, 8), 3)
    return Search(queries, gallery, schedule, rng.permutation(300)[:30], metric)


# The answers.


@examples
@given(case=searches(), surplus=st.integers(0, 5))
def test_a_funnel_that_shortlists_everything_is_exhaustive_search(
    client: QdrantClient, case: Search, surplus: int
) -> None:
    everything = tuple(len(case.gallery) + surplus for _ in case.schedule.shortlists)
    k = case.schedule.k
    case = case._replace(schedule=FunnelSchedule(case.schedule.dims, everything, k))
    with place(client) as name:
        result = case.build(client, name).search(case.queries)
    scores = case.scores(case.schedule.dims[-1])
    expected = -np.sort(-scores, axis=1)[:, :k]
    rows = np.argsort(case.ids)[np.searchsorted(np.sort(case.ids), result.ids)]
    near: dict[str, Any] = {"rtol": 0, "atol": case.near}
    assert [result.ids.dtype, result.scores.dtype] == [np.int64, np.float32]
    np.testing.assert_array_equal(case.ids[rows], result.ids)
    assert all(len(set(row)) == k for row in result.ids.tolist())
    np.testing.assert_allclose(np.take_along_axis(scores, rows, 1), expected, **near)
    np.testing.assert_allclose(result.scores, expected, **near)


@examples
@given(case=searches())
def test_every_stage_keeps_the_best_of_the_one_before_as_in_the_exact_index(
    client: QdrantClient, case: Search
) -> None:
    with place(client) as name:
        result = case.build(client, name).search(case.queries)
    exact = case.exact().search(case.queries)
    assert result.ids.shape == exact.ids.shape
    for row in range(len(case.queries)):
        expected = case.expected_ids(row)
        if expected is not None:
            assert result.ids[row].tolist() == exact.ids[row].tolist() == expected.tolist()
            np.testing.assert_allclose(
                result.scores[row], exact.scores[row], rtol=0, atol=case.near
            )


@pytest.mark.parametrize("metric", METRICS)
def test_that_test_checks_most_funnels(metric: str) -> None:
    case = search(metric)
    checked = [case.expected_ids(row) for row in range(len(case.queries))]
    assert np.mean([ids is not None for ids in checked]) > 0.5
    whole = case._replace(schedule=FunnelSchedule((16,), (), 3))
    best = [whole.expected_ids(row) for row in range(len(case.queries))]
    assert any(
        a is not None and b is not None and a.tolist() != b.tolist()
        for a, b in zip(checked, best, strict=True)
    )


@examples
@given(case=searches(), at_once=st.integers(1, 3))
def test_an_answer_does_not_depend_on_the_other_queries(
    client: QdrantClient, case: Search, at_once: int
) -> None:
    with place(client) as name:
        index = case.build(client, name)
        together = index.search(case.queries)
        index.queries_per_request = at_once
        parts = index.search(case.queries)
        for row, query in enumerate(case.queries):
            alone = index.search(query[None])
            assert alone[0] == together[row] == parts[row]


@examples
@given(case=searches(), data=st.data())
def test_a_filter_lets_its_ids_through_and_no_others(
    client: QdrantClient, case: Search, data: st.DataObject
) -> None:
    chosen = np.array(data.draw(st.lists(st.sampled_from(list(case.ids)))), np.int64)
    absent = data.draw(st.lists(st.integers(1000, 2**63 - 1)))
    with place(client) as name:
        result = case.build(client, name).search(case.queries, among=[*chosen.tolist(), *absent])
    allowed = np.flatnonzero(np.isin(case.ids, chosen))
    assert result.ids.shape == (len(case.queries), min(case.schedule.k, len(allowed)))
    assert set(result.ids.ravel().tolist()) <= set(chosen.tolist())
    for row in range(len(case.queries)):
        expected = case.expected_ids(row, allowed) if len(allowed) else None
        if expected is not None:
            assert result.ids[row].tolist() == expected.tolist()


@examples
@given(case=searches(), data=st.data())
def test_fewer_neighbours_are_the_first_of_more(
    client: QdrantClient, case: Search, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, case.schedule.k))
    with place(client) as name:
        index = case.build(client, name)
        result, more = index.search(case.queries, k), index.search(case.queries)
    assert result.ids.shape == (len(case.queries), k)
    for row in range(len(case.queries)):
        if case.expected_ids(row) is not None:
            assert result[row] == more[row][:k]


@pytest.mark.parametrize("metric", METRICS)
def test_equal_scores_come_in_order_of_id(engine: Any, name: str, metric: str) -> None:
    gallery = np.array([[-1, 0], [1, 0], [0, 1], [1, 0], [1, 0], [-1, 0], [1, 0]])
    ids = [60, 31, 2**63 - 1, 12, 44, 3, 25]
    schedule = FunnelSchedule((1, 2), (7,), 7)
    index = QdrantIndex.build(engine, name, gallery, schedule, ids, metric)
    result = index.search([[1, 0], [1, 0]])
    assert result.ids.tolist() == [[12, 25, 31, 44, 2**63 - 1, 3, 60]] * 2
    east, north, west = (0, -2, -4) if metric == "l2" else (1, 0, -1)
    expected = [[east] * 4 + [north] + [west] * 2] * 2
    np.testing.assert_allclose(result.scores, expected, rtol=0, atol=3e-7)
    assert index.search([[1, 0]], among=[60, 3, 44, 12, 7]).ids.tolist() == [[12, 44, 3, 60]]


def test_a_zero_vector_is_equally_near_to_all(engine: Any, name: str) -> None:
    gallery = np.array([[-1, 0], [0, 0], [1, 0], [0, 1]])
    index = QdrantIndex.build(engine, name, gallery, FunnelSchedule((1, 2), (4,), 4), [3, 2, 1, 0])
    result = index.search([[0, 0], [1, 0]])
    assert result.ids.tolist() == [[0, 1, 2, 3], [1, 0, 2, 3]]
    assert result.scores.tolist() == [[0, 0, 0, 0], [1, 0, 0, -1]]


@pytest.mark.parametrize("length", [1e-3, 1e-5, 1e-6, 1e-7, 1e-9, 1e-15])
def test_tiny_vectors_score_as_in_the_exact_index(engine: Any, name: str, length: float) -> None:
    case = search()._replace(schedule=FunnelSchedule((4, 16), (30,), 30))
    tiny = case.gallery / np.linalg.norm(case.gallery, axis=1, keepdims=True) * np.float32(length)
    case = case._replace(gallery=tiny)
    result = case.build(engine, name).search(case.queries)
    np.testing.assert_allclose(
        result.scores, case.exact().search(case.queries).scores, rtol=0, atol=3e-6
    )


def test_what_a_search_may_leave_out(engine: Any, name: str) -> None:
    case = search()
    index = case.build(engine, name)
    empty = index.search(np.zeros((0, 16)))
    assert (empty.ids.shape, empty.scores.shape) == ((0, 3), (0, 3))
    for among in ([], [999]):
        assert index.search(case.queries, among=among).ids.shape == (20, 0)
        assert index.search(np.zeros((0, 16)), among=among).ids.shape == (0, 0)
    # Where no rows are equal: the real engine lists any of them, not the same each time.
    plain = QdrantIndex.build(engine, f"{name}-plain", GALLERY, SCHEDULE)
    wider = np.column_stack([GALLERY, np.full((6, 2), 9.0)])
    assert list(plain.search(wider)) == list(plain.search(GALLERY))


def test_an_index_tells_what_it_is(engine: Any, name: str) -> None:
    index: Index = QdrantIndex.build(engine, name, GALLERY, SCHEDULE, None, "dot", "5e1f")
    assert (len(index), index.width, index.schedule) == (6, 4, SCHEDULE)
    assert (index.metric, index.encoder_fingerprint) == ("dot", "5e1f")


# The requests to a server. Local mode is exact and leaves parameters out.


class Remote:
    """A client that poses as one of a server, and records its requests."""

    def __init__(self) -> None:
        self.local = QdrantClient(":memory:")
        self.init_options = {"url": "http://qdrant:6333", "path": None, "location": None}
        self.requests: list[Any] = []
        self.options: dict[str, Any] = {}
        self.most_points: int | None = None
        self.counted_twice = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.local, name)

    def create_collection(self, name: str, **options: Any) -> bool:
        self.options = options
        return self.local.create_collection(name, **options)

    def count(self, name: str, **options: Any) -> Any:
        counted = self.local.count(name, **options)
        counted.count += 0 if options["exact"] else self.counted_twice
        return counted

    def query_batch_points(self, name: str, requests: list[Any]) -> list[Any]:
        self.requests.append(requests)
        bare = [request.model_copy(update={"params": None}) for request in requests]
        answers = self.local.query_batch_points(name, bare)
        for answer in answers[::2]:
            answer.points[:] = answer.points[: self.most_points]
        return answers


@pytest.fixture
def remote() -> Any:
    return Remote()


def stages(request: Any) -> list[Any]:
    """A nested query, first stage first."""
    return [] if request is None else [*stages(request.prefetch), request]


def params(remote: Remote) -> list[Any]:
    return [stage.params for stage in stages(remote.requests[-1][0])]


EXACT = models.SearchParams(exact=True)


def test_the_whole_funnel_is_one_nested_query(remote: Any) -> None:
    case = search("dot")
    index = case.build(remote, "pets")
    index.search(case.queries, k=2, among=[7, 5])
    (requests,) = remote.requests
    assert len(requests) == 20
    for request, query in zip(requests, case.queries, strict=True):
        nested = stages(request)
        assert [type(stage) for stage in nested] == [
            models.Prefetch,
            models.Prefetch,
            models.QueryRequest,
        ]
        assert [stage.using for stage in nested] == ["4", "8", "16"]
        assert [stage.limit for stage in nested] == [12, 8, 2]
        assert [stage.query for stage in nested] == [query[:dim].tolist() for dim in (4, 8, 16)]
        only_ids = models.Filter(must=[models.HasIdCondition(has_id=[5, 7])])
        assert [stage.filter for stage in nested] == [only_ids, None, None]


def test_later_stages_are_exact_and_a_first_stage_where_its_shortlist_is_whole(
    remote: Any,
) -> None:
    case = search()
    index = case.build(remote, "pets")
    index.search(case.queries)
    assert params(remote) == [None, EXACT, EXACT]
    index.search(case.queries, among=case.ids[:12])
    assert params(remote) == [EXACT, EXACT, EXACT]
    for shortlist in (30, 10_000):
        whole = QdrantIndex.open(remote, "pets", FunnelSchedule((4, 16), (shortlist,), 3))
        whole.search(case.queries)
        assert params(remote) == [EXACT, EXACT]
        remote.counted_twice = 30  # rows that are counted twice while the engine moves them
        whole.search(case.queries)
        assert params(remote) == [EXACT, EXACT]
        remote.counted_twice = 0


def test_parameters_are_given_by_stage(remote: Any) -> None:
    case = search()
    case.build(remote, "pets")
    binary = models.SearchParams(quantization=models.QuantizationSearchParams(rescore=False))
    wide = models.SearchParams(hnsw_ef=500)
    index = QdrantIndex.open(remote, "pets", params={4: wide, 8: binary})
    index.search(case.queries)
    assert params(remote) == [wide, binary, EXACT]
    QdrantIndex.open(remote, "pets", case.schedule, {16: binary}).search(case.queries, among=[1])
    assert params(remote) == [EXACT, EXACT, EXACT]


def test_large_requests_are_sent_in_parts(remote: Any) -> None:
    case = search()
    index = case.build(remote, "pets")
    expected = index.search(case.queries, among=case.ids)
    index.numbers_per_request = 3 * (4 + 8 + 16 + 30)
    assert list(index.search(case.queries, among=case.ids)) == list(expected)
    assert list(map(len, remote.requests[1:])) == [3, 3, 3, 3, 3, 3, 2]
    index.numbers_per_request = 1
    index.search(case.queries[:2])
    assert list(map(len, remote.requests[-2:])) == [1, 1]


def test_an_approximate_engine_that_finds_too_few_leaves_minus_one(remote: Any) -> None:
    case = search()
    index = case.build(remote, "pets")
    expected = index.search(case.queries[:2])
    remote.most_points = 1
    result = index.search(case.queries[:2])
    assert result[0] == [expected[0][0], (-1, -np.inf), (-1, -np.inf)]
    assert result[1] == expected[1]
    alone = index.search(case.queries[:1], among=[*case.ids[:2].tolist(), 999])
    assert (alone.ids.shape, alone.ids[0, 1]) == ((1, 2), -1)


def test_the_engines_options_pass_through(remote: Any) -> None:
    binary = models.BinaryQuantization(binary=models.BinaryQuantizationConfig(always_ram=True))
    int8 = models.ScalarQuantization(
        scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8)
    )
    graph = models.HnswConfigDiff(m=32)
    schedule = FunnelSchedule((1, 2, 4), (5, 3), 1)
    QdrantIndex.build(
        remote,
        "pets",
        GALLERY,
        schedule,
        vectors={
            1: {"quantization_config": binary, "on_disk": True},
            2: {"quantization_config": int8, "hnsw_config": graph},
        },
        shard_number=3,
        replication_factor=2,
        on_disk_payload=True,
        metadata={"owner": "me"},
    )
    options = remote.options
    assert (options["shard_number"], options["replication_factor"]) == (3, 2)
    assert (options["on_disk_payload"], options["metadata"]["owner"]) == (True, "me")
    dot = models.Distance.DOT
    assert options["vectors_config"] == {
        "1": models.VectorParams(size=1, distance=dot, quantization_config=binary, on_disk=True),
        "2": models.VectorParams(size=2, distance=dot, quantization_config=int8, hnsw_config=graph),
        "4": models.VectorParams(size=4, distance=dot, hnsw_config=models.HnswConfigDiff(m=0)),
    }
    assert len(QdrantIndex.open(remote, "pets")) == 6


# Galleries that are built, opened and changed.


@pytest.mark.parametrize("metric", METRICS)
def test_rows_are_added_replaced_and_removed(engine: Any, name: str, metric: str) -> None:
    case = search(metric)._replace(schedule=FunnelSchedule((4, 16), (99,), 5))
    index = case._replace(gallery=case.gallery[:20], ids=case.ids[:20]).build(engine, name)
    seen: list[tuple[int, int]] = []
    index.add(case.gallery[20:] + 1, case.ids[20:], lambda done, rows: seen.append((done, rows)))
    assert (len(index), seen) == (30, [(10, 10)])
    index.add(case.gallery[20:], case.ids[20:])
    index.add(np.zeros((0, 16)), np.zeros(0, int))
    assert len(index) == 30
    near: dict[str, Any] = {"rtol": 0, "atol": case.near}
    expected = case.exact().search(case.queries)
    np.testing.assert_allclose(index.search(case.queries).scores, expected.scores, **near)
    index.remove([*case.ids[:7].tolist(), 999, case.ids[0]])
    index.remove([])
    assert len(index) == 23
    rest = case._replace(gallery=case.gallery[7:], ids=case.ids[7:])
    expected = rest.exact().search(case.queries)
    np.testing.assert_allclose(index.search(case.queries).scores, expected.scores, **near)
    index.remove(case.ids[3:])
    assert len(index) == 0
    assert index.search(case.queries).ids.shape == (20, 0)


def test_a_build_that_was_interrupted_uploads_what_is_missing(
    client: QdrantClient, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = search()
    monkeypatch.setattr(QdrantIndex, "rows_per_upload", 8)
    uploaded: list[list[int]] = []
    seen: list[tuple[int, int]] = []
    upsert = client.upsert

    def counted(name: str, points: Any, **options: Any) -> Any:
        uploaded.append(points.ids)
        return upsert(name, points=points, **options)

    monkeypatch.setattr(client, "upsert", counted)

    def stops(done: int, rows: int) -> None:
        seen.append((done, rows))
        if done == 16:
            raise KeyboardInterrupt

    arguments: tuple[Any, ...] = (client, name, case.gallery, case.schedule, case.ids)
    with pytest.raises(KeyboardInterrupt):
        QdrantIndex.build(*arguments, progress=stops)
    assert seen == [(8, 30), (16, 30)]
    client.delete(name, points_selector=models.PointIdsList(points=[int(case.ids[2])]))
    index = QdrantIndex.build(*arguments, progress=lambda done, rows: seen.append((done, rows)))
    assert seen[2:] == [(23, 30), (30, 30)]
    assert sorted(uploaded[2] + uploaded[3]) == sorted([*case.ids[16:].tolist(), case.ids[2]])
    case.assert_searched_by(index)
    QdrantIndex.build(*arguments)
    assert len(uploaded) == 4


def test_rows_that_are_there_are_looked_up_in_parts(
    engine: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = search()
    index = case.build(engine, name)
    monkeypatch.setattr(Collection, "ids_per_lookup", 7)
    index.remove(case.ids[[5, 6, 7, 29]])
    seen: list[int] = []
    arguments: tuple[Any, ...] = (engine, name, case.gallery, case.schedule, case.ids)
    QdrantIndex.build(*arguments, progress=lambda done, _: seen.append(done))
    assert (seen, len(index)) == ([30], 30)


def test_a_build_that_goes_on_may_have_another_funnel(client: QdrantClient, name: str) -> None:
    QdrantIndex.build(client, name, GALLERY, SCHEDULE, metadata={"owner": "me"})
    other = FunnelSchedule((2, 4), (5,), 4)
    assert QdrantIndex.build(client, name, GALLERY, other).search(GALLERY).ids.shape == (6, 4)
    assert QdrantIndex.open(client, name).schedule == other
    metadata = client.get_collection(name).config.metadata
    assert (metadata or {})["owner"] == "me"


@pytest.mark.parametrize("metric", METRICS)
def test_a_fresh_client_opens_what_another_built(tmp_path: Path, metric: str) -> None:
    case = search(metric)
    first = QdrantClient(path=str(tmp_path))
    index = QdrantIndex.build(
        first, "pets", case.gallery, case.schedule, case.ids, metric, encoder_fingerprint="5e1f"
    )
    case.assert_searched_by(index)
    first.close()
    second = QdrantClient(path=str(tmp_path))
    again = QdrantIndex.open(second, "pets")
    assert (again.schedule, again.metric) == (case.schedule, metric)
    assert (again.encoder_fingerprint, len(again)) == ("5e1f", 30)
    case.assert_searched_by(again)
    second.close()


def test_an_index_is_opened_with_another_schedule(engine: Any, name: str) -> None:
    case = search()
    case.build(engine, name)
    for schedule in (FunnelSchedule((8,), (), 5), FunnelSchedule((4, 8), (9,), 2)):
        index = QdrantIndex.open(engine, name, schedule)
        other = case._replace(schedule=schedule)
        assert (index.width, index.schedule) == (8, schedule)
        other.assert_searched_by(index)
    index.add(case.gallery, case.ids)  # all stored dims, not those of the schedule alone
    case.assert_searched_by(QdrantIndex.open(engine, name))


# What is refused, and in which words.

ENDLESS: list[Any] = []
ENDLESS.append(ENDLESS)
REFUSED_BUILDS: list[tuple[dict[str, Any], str]] = [
    (
        {"embeddings": GALLERY[:1]},
        "A gallery needs at least as many rows as the funnel returns. Received: 1 rows for k=2. "
        "Lower k, or add rows.",
    ),
    (
        {"metric": "max"},
        'metric must be "cosine", "dot" or "l2". Received: metric=\'max\'. Take cosine if unsure.',
    ),
    (
        {"vectors": {5: {}, 2: {}, 3: {}}},
        "vectors must be given by dims that are stored: (2, 4). "
        "Received: vectors for [3, 5]. Name a stage by its dim.",
    ),
    (
        {"params": {8: EXACT}},
        "params must be given by dims that are stored: (2, 4). "
        "Received: params for [8]. Name a stage by its dim.",
    ),
    (
        {"ids": [0, 1, 2, 3, 4, 4]},
        "ids must differ from row to row. Received: 1 that repeat another. Give every row its own.",
    ),
    *(
        (
            {"payloads": [{"kind": ["bird", {"seen": value}]}] * 6},
            "payloads must be one JSON object per row, without 'keras_mrl_id'. Received: "
            f"{{'kind': ['bird', {{'seen': {value!r:.55}}}]}}"[:129]
            + ". JSON has strings, finite "
            "numbers (integers of 64 bits), true, false, null, lists, and objects whose keys are "
            "strings: write other values as one of these.",
        )
        for value in (2**70, 2**63, -(2**63) - 1, np.nan, np.inf, {1: 2}, {1}, b"a", ENDLESS)
    ),
    (
        {"embeddings": GALLERY[:, :3]},
        "The gallery must be (rows, width) with a width of at least 4. "
        "Received: shape (6, 3). Embed them at the funnel's last dim, one row each.",
    ),
]


@pytest.mark.parametrize(("changed", "text"), REFUSED_BUILDS)
def test_a_gallery_that_is_refused_makes_no_collection(
    changed: dict[str, Any], text: str, engine: Any, name: str, refuses: Refuses
) -> None:
    arguments = {"embeddings": GALLERY, "schedule": SCHEDULE, **changed}
    with refuses(ValueError, text):
        QdrantIndex.build(engine, name, **arguments)
    with pytest.raises(TypeError, match=r"^A schedule must be a FunnelSchedule\. "):
        QdrantIndex.build(engine, name, GALLERY, (2, 4))  # type: ignore[arg-type]
    with pytest.raises(errors.ManifestError):
        QdrantIndex.open(engine, name)


NO_IDS = (
    "ids must be one int64 >= 0, or one string that is not empty, per gallery row. "
    "Received: {} for 6 rows. "
    "Give one per row; an index built without any numbers its rows from 0."
)
NO_REMOVAL = (
    "ids to remove must be int64 >= 0, or strings, in one dimension. "
    "Received: {}. Give those of the rows."
)
HIGHER = GALLERY + 1
REFUSED_CALLS: list[tuple[Callable[[QdrantIndex], object], str]] = [
    (
        lambda index: index.add(np.vstack([HIGHER, np.full((1, 4), np.nan)]), np.arange(7)),
        "The gallery must be finite, and so must the squares of their lengths in float32. "
        "Received: NaN, infinity, or rows longer than 1e19. "
        "Look for failed rows where the embeddings were made.",
    ),
    (
        lambda index: index.add(HIGHER[:, :3], np.arange(6)),
        "The gallery must be (rows, width) with a width of at least 4. "
        "Received: shape (6, 3). Embed them at the funnel's last dim, one row each.",
    ),
    (
        lambda index: index.add(HIGHER, None),  # type: ignore[arg-type]
        NO_IDS.format("object ids of shape ()"),
    ),
    (
        lambda index: index.add(HIGHER, np.arange(6) - 1),
        NO_IDS.format("int64 ids of shape (6,)"),
    ),
    (lambda index: index.add(HIGHER, np.arange(5)), NO_IDS.format("int64 ids of shape (5,)")),
    (lambda index: index.add(HIGHER, np.arange(6.0)), NO_IDS.format("float64 ids of shape (6,)")),
    (
        lambda index: index.add(HIGHER, [0] * 6),
        "ids must differ from row to row. Received: 5 that repeat another. Give every row its own.",
    ),
    (
        lambda index: index.remove(None),  # type: ignore[arg-type]
        NO_REMOVAL.format("object of shape ()"),
    ),
    (lambda index: index.remove([-1]), NO_REMOVAL.format("int64 of shape (1,)")),
    (lambda index: index.remove([0.5]), NO_REMOVAL.format("float64 of shape (1,)")),
    (lambda index: index.remove([[1]]), NO_REMOVAL.format("int64 of shape (1, 1)")),
    (
        lambda index: index.remove(np.array([1, 2**63], np.uint64)),
        NO_REMOVAL.format("uint64 of shape (2,)"),
    ),
    (
        lambda index: index.search(GALLERY, 4),
        "k must lie in 1..3, as many as the last shortlist holds. "
        "Received: k=4. Open the index with a schedule whose shortlists are longer.",
    ),
    (
        lambda index: index.search(GALLERY[:, :3]),
        "The queries must be (rows, width) with a width of at least 4. "
        "Received: shape (6, 3). Embed them at the funnel's last dim, one row each.",
    ),
    (
        lambda index: index.prepare_filter([-1]),
        "only must be int64 ids >= 0, or strings, in one dimension. "
        "Received: int64 of shape (1,). Give the ids that may be returned.",
    ),
    (
        lambda index: index.search(GALLERY, among=[-1]),
        "among must be int64 ids >= 0, or strings, in one dimension. "
        "Received: int64 of shape (1,). "
        "Give the ids that may be returned, or leave it out for all.",
    ),
]


def test_calls_that_are_refused_change_nothing(engine: Any, name: str, refuses: Refuses) -> None:
    index = build(engine, name)
    before = list(index.search(GALLERY))
    for call, text in REFUSED_CALLS:
        with refuses(ValueError, text):
            call(index)
    for ids in (np.arange(2), range(2), {3}, 3, "ant", [0, 1, 2, 3, 4, 5]):
        kind = int if isinstance(ids, list) else type(ids)
        with refuses(
            TypeError,
            "filter must be a prepared one, or a list with one per query. "
            f"Received: {kind.__name__}. Give index.prepare_filter(ids).",
        ):
            index.search(GALLERY, filter=ids)
    assert (len(index), list(index.search(GALLERY))) == (6, before)


def test_a_schedule_must_be_of_stored_dims(engine: Any, name: str, refuses: Refuses) -> None:
    build(engine, name)
    with refuses(
        ValueError,
        "A schedule's dims must be among those stored: (2, 4). "
        "Received: dims=(3, 4). Leave the others out, or build another collection.",
    ):
        QdrantIndex.open(engine, name, FunnelSchedule((3, 4), (3,), 2))


@pytest.mark.parametrize(
    ("changed", "received"),
    [
        ({"schedule": FunnelSchedule((3, 4), (3,), 2)}, "dims=(3, 4), metric='cosine', {}None"),
        ({"metric": "dot"}, "dims=(2, 4), metric='dot', {}None"),
        ({"encoder_fingerprint": "5e1f"}, "dims=(2, 4), metric='cosine', {}'5e1f'"),
        ({"prompt": "passage: "}, "dims=(2, 4), metric='cosine', {}None, prompt='passage: '"),
    ],
)
def test_a_build_does_not_go_on_with_another_gallery(
    changed: dict[str, Any], received: str, engine: Any, name: str, refuses: Refuses
) -> None:
    QdrantIndex.build(engine, name, GALLERY, SCHEDULE)
    text = (
        "A build goes on where one with the same dims, metric and encoder stopped. "
        f"Received: {received} for collection '{name}' of dims=(2, 4), metric='cosine', {{}}None. "
        "Give another name, or delete the collection."
    )
    with refuses(ValueError, text.replace("{}", "encoder_fingerprint=")):
        QdrantIndex.build(engine, name, GALLERY, **{"schedule": SCHEDULE, **changed})
    assert QdrantIndex.open(engine, name).metric == "cosine"


def test_a_build_does_not_go_on_with_other_rows(engine: Any, name: str, refuses: Refuses) -> None:
    QdrantIndex.build(engine, name, GALLERY, SCHEDULE)
    with refuses(
        ValueError,
        f"A build goes on over its own rows alone. Received: collection '{name}' with 2 rows whose "
        "ids are not among those given. Give them all, or open the collection and add to it.",
    ):
        QdrantIndex.build(engine, name, GALLERY, SCHEDULE, np.arange(2, 8))
    assert len(QdrantIndex.open(engine, name)) == 6


def test_a_collection_must_be_one_of_ours(
    client: QdrantClient, name: str, refuses: Refuses
) -> None:
    text = (
        "A QdrantIndex needs a collection that QdrantIndex.build made, on a server that keeps "
        "metadata. Received: {}. Build one under a new name, on Qdrant 1.16 or later."
    )
    with refuses(errors.ManifestError, text.format(f"no collection '{name}'")):
        QdrantIndex.open(client, name)
    client.create_collection(name, models.VectorParams(size=2, distance=models.Distance.DOT))
    for act in (QdrantIndex.open, build):
        with refuses(errors.ManifestError, text.format(f"collection '{name}' with metadata None")):
            act(client, name)
    client.update_collection(name, metadata={"keras_mrl": {"metric": "cosine"}})
    with pytest.raises(errors.ManifestError, match=r"^An index names its schedule, "):
        QdrantIndex.open(client, name)


def test_a_server_that_keeps_no_metadata_is_found_out_at_once(
    remote: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = remote.local.create_collection

    def forgetful(name: str, **options: Any) -> bool:
        return bool(create(name, vectors_config=options["vectors_config"]))

    monkeypatch.setattr(remote.local, "create_collection", forgetful)
    with pytest.raises(errors.ManifestError, match=r"Qdrant 1\.16 or later\.$"):
        QdrantIndex.build(remote, "pets", GALLERY, SCHEDULE)


def test_what_a_callers_progress_raises_stays_as_it_is(engine: Any, name: str) -> None:
    def stops(*_: int) -> None:
        raise ValueError("enough")

    with pytest.raises(ValueError, match=r"^enough$"):
        QdrantIndex.build(engine, name, GALLERY, SCHEDULE, progress=stops)


def test_qdrant_is_imported_when_it_is_used() -> None:
    program = (
        "import sys; sys.modules['qdrant_client'] = None\n"
        "from keras_mrl_serving.funnel import FunnelSchedule\n"
        "from keras_mrl_serving.index.qdrant import QdrantIndex\n"
        "QdrantIndex.build(None, 'pets', [[1.0]], FunnelSchedule((1,), (), 1))"
    )
    assert last_error(program) == (
        "ImportError: QdrantIndex needs qdrant-client. Received: import of qdrant_client halted; "
        "None in sys.modules. Install it: pip install 'keras-mrl[qdrant]'."
    )
