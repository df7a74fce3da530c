"""Galleries in a folder, with the real engine of Qdrant in this process."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qdrant_edge
from qdrant_client import QdrantClient, models

from keras_mrl_serving import ManifestError
from keras_mrl_serving.errors import InvalidInputError, ServerUnavailableError
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex, QdrantIndex
from keras_mrl_serving.index.facts import IndexFacts
from keras_mrl_serving.index.qdrant_folder import FolderCollection
from tests.helpers.galleries import Refuses
from tests.helpers.programs import last_error

SCHEDULE = FunnelSchedule((4, 8, 16), (60, 20), 5)
RNG = np.random.default_rng(0)
GALLERY = RNG.normal(size=(2000, 16)).astype(np.float32) * (0.8 ** np.arange(16))
QUERIES = RNG.normal(size=(30, 16)).astype(np.float32) * (0.8 ** np.arange(16))
GALLERY, QUERIES = GALLERY.astype(np.float32), QUERIES.astype(np.float32)
KINDS = [{"kind": "even" if row % 2 == 0 else "odd", "row": row} for row in range(len(GALLERY))]
EXACT = {4: qdrant_edge.SearchParams(exact=True)}
EVEN = qdrant_edge.Filter(
    must=[qdrant_edge.FieldCondition("kind", match=qdrant_edge.MatchValue("even"))]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("galleries")


@pytest.fixture(scope="module")
def index(folder: Path) -> Iterator[QdrantIndex]:
    made = QdrantIndex.build(folder, "pets", GALLERY, SCHEDULE, payloads=KINDS, params=EXACT)
    yield made
    made.close()


@pytest.mark.parametrize("metric", ["cosine", "dot", "l2"])
def test_with_an_exact_first_stage_the_nested_query_is_exact_nested_reranking(
    metric: str, tmp_path: Path
) -> None:
    for schedule in (SCHEDULE, FunnelSchedule((2, 16), (40,), 10), FunnelSchedule((16,), (), 3)):
        params = {schedule.dims[0]: qdrant_edge.SearchParams(exact=True)}
        name = "-".join(map(str, schedule.dims))
        real = QdrantIndex.build(tmp_path, name, GALLERY, schedule, None, metric, params=params)
        result = real.search(QUERIES)
        expected = ExactIndex.build(GALLERY, schedule, None, metric).search(QUERIES)
        np.testing.assert_array_equal(result.ids, expected.ids)
        np.testing.assert_allclose(result.scores, expected.scores, rtol=0, atol=2e-5)


def test_a_graph_finds_nearly_all(tmp_path: Path) -> None:
    graph = qdrant_edge.HnswIndexConfig(m=16, ef_construct=100, full_scan_threshold=10)
    index = QdrantIndex.build(
        tmp_path,
        "pets",
        GALLERY,
        SCHEDULE,
        vectors={4: {"hnsw_config": graph}},
        optimizers=qdrant_edge.EdgeOptimizersConfig(indexing_threshold=1),
    )
    expected = ExactIndex.build(GALLERY, SCHEDULE).search(QUERIES)
    result = index.search(QUERIES)
    pairs = zip(expected.ids, result.ids, strict=True)
    assert np.mean([np.isin(*pair).mean() for pair in pairs]) > 0.9
    index.close()
    (shard,) = (tmp_path / "pets").glob("shard-*")
    engine = qdrant_edge.EdgeShard.load(str(shard))
    assert engine.info().indexed_vectors_count >= len(GALLERY)
    engine.close()


def test_filters_by_payload_are_honoured(index: QdrantIndex) -> None:
    even = np.arange(0, len(GALLERY), 2)
    expected = ExactIndex.build(GALLERY[even], SCHEDULE, even).search(QUERIES)
    for only in (EVEN, index.prepare_filter(EVEN), [EVEN] * 30, index.prepare_filter(even)):
        np.testing.assert_array_equal(index.search(QUERIES, filter=only).ids, expected.ids)
    np.testing.assert_array_equal(index.search(QUERIES, among=even).ids, expected.ids)
    index.create_payload_index("kind", qdrant_edge.PayloadSchemaType.Keyword)
    np.testing.assert_array_equal(index.search(QUERIES, filter=EVEN).ids, expected.ids)
    one = qdrant_edge.Filter(
        must=[qdrant_edge.FieldCondition("row", match=qdrant_edge.MatchValue(7))]
    )
    assert index.search(QUERIES[:2], filter=one).ids.tolist() == [[7], [7]]


def test_each_query_may_have_its_own_filter(index: QdrantIndex) -> None:
    odd = index.prepare_filter(np.arange(1, len(GALLERY), 2))
    result = index.search(QUERIES[:3], filter=[EVEN, odd, index.prepare_filter([3])])
    assert (result.ids[0] % 2).tolist() == [0] * 5
    assert (result.ids[1] % 2).tolist() == [1] * 5
    assert result.ids[2].tolist() == [3, -1, -1, -1, -1]


def test_what_is_no_filter_is_refused(index: QdrantIndex, refuses: Refuses) -> None:
    with pytest.raises(InvalidInputError, match=r"^Qdrant must take the request\. .*qdrant_edge"):
        index.search(QUERIES, filter=models.Filter(must=[]))
    with refuses(
        ValueError,
        "A search is filtered in one way. Received: among and filter. Give one of them.",
    ):
        index.search(QUERIES, among=[1], filter=EVEN)
    with refuses(
        ValueError,
        "A list of filters has one per query. Received: 2 filters for 30 queries. "
        "Give one for all.",
    ):
        index.search(QUERIES, filter=[EVEN, EVEN])


def test_payloads_come_back(index: QdrantIndex) -> None:
    assert index.payloads([4, 99999, 3]) == [KINDS[4], None, KINDS[3]]


@pytest.fixture(params=["client", "folder"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return QdrantClient(":memory:") if request.param == "client" else tmp_path


def test_ids_that_are_strings(place: Any, refuses: Refuses) -> None:
    rows = GALLERY[:20]
    names = [f"row {number}" for number in range(20)]
    schedule = FunnelSchedule((4, 16), (20,), 5)
    index = QdrantIndex.build(place, "pets", rows, schedule, names, payloads=KINDS[:20])
    expected = ExactIndex.build(rows, schedule, names)
    result = index.search(QUERIES)
    assert result.ids.tolist() == expected.search(QUERIES).ids.tolist()
    some = ["row 7", "row 3", "nobody"]
    assert (
        index.search(QUERIES, among=some).ids.tolist()
        == expected.search(QUERIES, among=some).ids.tolist()
    )
    assert index.payloads(["row 3", "nobody"]) == [KINDS[3], None]
    np.testing.assert_allclose(
        index.reconstruct(["row 3", "row 1"]),
        rows[[3, 1]] / np.linalg.norm(rows[[3, 1]], axis=1, keepdims=True),
        rtol=1e-5,
    )
    again = QdrantIndex.open(place, "pets")
    again.remove(["row 3"])
    again.add(GALLERY[20:21], ["new"])
    assert (len(again), again.payloads(["row 3", "new"])) == (20, [None, {}])
    QdrantIndex.build(place, "pets", GALLERY[:21], schedule, [*names, "new"])
    assert len(again) == 21
    text = (
        "Ids must be of the kind that the index was built with. "
        "Received: int64 for an index whose ids are strings. Give strings."
    )
    with refuses(ValueError, text):
        index.remove([3])
    with refuses(ValueError, text):
        index.add(rows, range(20))
    with refuses(
        ValueError,
        "payloads must be one JSON object per row, without 'keras_mrl_id'. "
        "Received: {'keras_mrl_id': 'x'}. Give dicts, one per row, or none.",
    ):
        index.add(rows[:1], ["x"], payloads=[{"keras_mrl_id": "x"}])
    with pytest.raises(ValueError, match=r"^A build goes on where .* of strings"):
        QdrantIndex.build(place, "pets", rows, schedule)


def test_rows_are_reconstructed_from_qdrant(index: QdrantIndex, refuses: Refuses) -> None:
    scaled = GALLERY[[5, 2]] / np.linalg.norm(GALLERY[[5, 2]], axis=1, keepdims=True)
    np.testing.assert_allclose(index.reconstruct([5, 2]), scaled, rtol=1e-5, atol=1e-7)
    with refuses(
        ValueError,
        "ids must be those of gallery rows, in one dimension. "
        "Received: 1 that no row has. Give ids of rows.",
    ):
        index.reconstruct([5, 10**6])


# The folder.


def test_indexes_of_one_process_share_the_engine(index: QdrantIndex, folder: Path) -> None:
    other = QdrantIndex.open(folder, "pets", FunnelSchedule((4, 16), (60,), 3), EXACT)
    before = len(index)
    other.add(GALLERY[:1], [5000])
    assert len(index) == before + 1
    index.remove([5000])
    assert len(other) == before


def test_another_process_is_refused(index: QdrantIndex, folder: Path) -> None:
    assert len(index)
    program = (
        "import sys\nfrom keras_mrl_serving.index import QdrantIndex\n"
        "try:\n    print(len(QdrantIndex.open(sys.argv[1], 'pets')))\n"
        "except Exception as error:\n    print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(
        f"{ServerUnavailableError.__name__} One process at a time opens a gallery in a folder. "
    )
    assert done.stdout.endswith("Close it there, or run Qdrant as a server.\n")


def test_a_gallery_that_is_closed_opens_again(tmp_path: Path) -> None:
    schedule = FunnelSchedule((16,), (), 1)
    index = QdrantIndex.build(tmp_path, "pets", GALLERY[:5], schedule)
    index.close()
    assert len(index) == 5
    other = QdrantIndex.open(tmp_path, "pets")
    assert len(other) == 5
    index.close()
    with pytest.raises(ServerUnavailableError, match=r"^A gallery must be open\. "):
        len(other)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b"])
def test_a_name_is_that_of_a_folder(name: str, tmp_path: Path, refuses: Refuses) -> None:
    with refuses(
        ValueError,
        "A gallery's name is that of a folder, without a path. "
        f"Received: {name!r}. Name the path by the first argument.",
    ):
        QdrantIndex.open(tmp_path, name)


def test_what_was_written_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def recorded(name: str) -> Callable[..., Any]:
        original = getattr(FolderCollection, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return original(*arguments)

        return call

    index = QdrantIndex.build(tmp_path, "pets", GALLERY[:50], FunnelSchedule((16,), (), 1))
    for name in ("upsert", "delete", "flush"):
        monkeypatch.setattr(FolderCollection, name, recorded(name))
    index.add(GALLERY[50:60], range(50, 60))
    index.remove([3])
    assert calls == ["upsert", "flush", "delete", "flush"]


def test_a_gallery_is_never_made_over_another(tmp_path: Path) -> None:
    for _ in range(2):
        collection = FolderCollection(tmp_path, "pets")
        with pytest.raises(FileExistsError) if collection.exists() else nullcontext():
            collection.create(IndexFacts(SCHEDULE), {}, {})
    assert len(list((tmp_path / "pets").glob("gallery.json*"))) == 1


@pytest.mark.parametrize(("file", "folder"), [("a", "a"), ("a/pets", "a"), ("a", "a/b")])
def test_a_file_in_the_way_of_a_gallery_is_named(file: str, folder: str, tmp_path: Path) -> None:
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine")
    with pytest.raises(InvalidInputError, match=r"^A gallery needs a folder\. .*where a file"):
        QdrantIndex.build(tmp_path / folder, "pets", GALLERY[:5], FunnelSchedule((16,), (), 1))
    assert (tmp_path / file).read_text() == "mine"


@pytest.mark.parametrize("where", ["http://localhost:6333", ":memory:"])
def test_a_server_is_asked_by_a_client(where: str, refuses: Refuses) -> None:
    with refuses(
        ValueError,
        "A gallery is in a folder, or behind a client. "
        f"Received: {where!r}. Give QdrantClient({where!r}).",
    ):
        QdrantIndex.open(where, "pets")


@pytest.mark.parametrize(
    "card",
    [
        None,
        "no json",
        "[]",
        '{"format": 2, "shard": "shard-0123456789abcdef", "facts": {}}',
        '{"format": 1, "shard": "../../etc", "facts": {"a": 1}}',
    ],
)
def test_a_card_that_is_none_is_refused(card: str | None, tmp_path: Path) -> None:
    (tmp_path / "pets").mkdir()
    if card is not None:
        (tmp_path / "pets" / "gallery.json").write_text(card)
    with pytest.raises(ManifestError, match=r"^A gallery in a folder has a file gallery\.json"):
        QdrantIndex.open(tmp_path, "pets")


def test_options_that_the_engine_does_not_know_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"shards.*Give objects of qdrant_edge"):
        QdrantIndex.build(tmp_path, "pets", GALLERY[:5], FunnelSchedule((16,), (), 1), shards=3)
    assert not (tmp_path / "pets").exists()


def test_searches_go_on_while_rows_are_added(tmp_path: Path) -> None:
    schedule = FunnelSchedule((4, 16), (50,), 5)
    params = {4: qdrant_edge.SearchParams(exact=True)}
    index = QdrantIndex.build(tmp_path, "pets", GALLERY[:500], schedule, params=params)
    failed: list[BaseException] = []

    def add() -> None:
        try:
            for start in range(500, 2000, 100):
                index.add(GALLERY[start : start + 100], np.arange(start, start + 100))
        except BaseException as error:
            failed.append(error)

    writer = threading.Thread(target=add)
    writer.start()
    while writer.is_alive():
        assert index.search(QUERIES[:4]).ids.shape == (4, 5)
    writer.join()
    assert not failed
    expected = ExactIndex.build(GALLERY, schedule).search(QUERIES)
    np.testing.assert_array_equal(index.search(QUERIES).ids, expected.ids)


WRITER = """
import sys
import numpy as np
from keras_mrl_serving.index import QdrantIndex
index = QdrantIndex.open(sys.argv[1], "pets")
for batch in range(1, 10_000):
    rows = np.random.default_rng(batch).normal(size=(200, 16)).astype(np.float32)
    index.add(rows, np.arange(200) + 200 * batch, payloads=[{"batch": batch}] * 200)
    print(batch, flush=True)
"""


def test_a_writer_that_is_killed_leaves_whole_rows(tmp_path: Path) -> None:
    schedule = FunnelSchedule((4, 16), (50,), 5)
    QdrantIndex.build(tmp_path, "pets", GALLERY[:200], schedule, metric="dot").close()
    for _ in range(3 if os.environ.get("KERAS_MRL_SOAK") is None else 30):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        confirmed = [int(writer.stdout.readline()) for _ in range(3)][-1]
        writer.send_signal(signal.SIGKILL)  # it is at work on a later batch
        confirmed = max([confirmed, *map(int, writer.stdout.read().split())])
        writer.communicate()
        index = QdrantIndex.open(tmp_path, "pets")
        rows = len(index)
        assert rows >= 200 * (confirmed + 1)
        assert rows % 200 == 0  # an upsert is there whole, or not at all
        for batch in range(1, rows // 200):
            ids = np.arange(200) + 200 * batch
            expected = np.random.default_rng(batch).normal(size=(200, 16)).astype(np.float32)
            np.testing.assert_array_equal(index.reconstruct(ids), expected)
            assert index.payloads(ids) == [{"batch": batch}] * 200
        prefixes = QdrantIndex.open(tmp_path, "pets", FunnelSchedule((4,), (), 1))
        first = np.random.default_rng(1).normal(size=(200, 16)).astype(np.float32)
        np.testing.assert_array_equal(prefixes.reconstruct(np.arange(200) + 200), first[:, :4])
        index.close()
        json.loads((tmp_path / "pets" / "gallery.json").read_text())


def test_the_engine_is_imported_when_it_is_used() -> None:
    program = (
        "import sys; sys.modules['qdrant_edge'] = None\n"
        "from keras_mrl_serving.funnel import FunnelSchedule\n"
        "from keras_mrl_serving.index.qdrant import QdrantIndex\n"
        "QdrantIndex.build('nowhere', 'pets', [[1.0]], FunnelSchedule((1,), (), 1))"
    )
    assert last_error(program) == (
        "ImportError: A QdrantIndex in a folder needs qdrant-edge-py. Received: import of "
        "qdrant_edge halted; None in sys.modules. Install it: pip install 'keras-mrl[qdrant-edge]'."
    )
