"""A gallery in the graph: it answers as the NumPy index, over gRPC, alone or with its encoder."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from keras_mrl_export import ExportError, export_index, export_saved_model
from keras_mrl_export.gallery import IndexGraph, forget
from keras_mrl_export.graph import trace
from keras_mrl_serving import __version__
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.client import Client
from keras_mrl_serving.contract import MANIFEST_FILE
from keras_mrl_serving.errors import EncoderMismatchError
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex, open_index
from keras_mrl_serving.results import Neighbors
from keras_mrl_serving.server import DevServer
from tests.helpers import export_models as models
from tests.helpers.export_galleries import (
    GALLERY,
    IDS,
    METRICS,
    QUERIES,
    RNG,
    SCHEDULES,
    index_of,
)
from tests.helpers.export_models import (
    DIMS,
    Arrays,
    outputs,
    read_manifest,
    warmup_sizes,
    written_signatures,
)
from tests.helpers.galleries import TiedSearch, assert_lowest_of_copies, drawn


def assert_same(answer: Any, expected: Any) -> None:
    np.testing.assert_array_equal(answer["ids"], expected.ids)
    largest = max(1.0, np.abs(expected.scores).max())  # squared distances of 0 round as lengths do
    np.testing.assert_allclose(answer["scores"], expected.scores, rtol=0, atol=1e-5 * largest)
    assert answer["ids"].dtype == np.int64
    assert answer["scores"].dtype == np.float32


def searches_of(graph: IndexGraph) -> dict[str, Any]:
    """The traced searches of a graph, by signature; each takes rows and answers in NumPy."""

    def in_numpy(search: Any) -> Any:
        def run(rows: Any) -> Arrays:
            answer = search(embedding=tf.constant(rows))
            return {name: tensor.numpy() for name, tensor in answer.items()}

        return run

    return {name: in_numpy(trace(*function)) for name, function in graph.functions().items()}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_search_is_that_of_the_numpy_index(schedule: str, metric: str) -> None:
    index = index_of(schedule, metric)
    dims = index.schedule.dims
    searches = searches_of(IndexGraph(index))
    queries = QUERIES[:, : index.width]
    assert_same(searches["search"](queries), index.search(queries))
    for row in (0, 5, 30):
        one = queries[row : row + 1]
        assert_same(searches["search"](one), index.search(one))
    for dim in dims:
        alone = ExactIndex.build(GALLERY, FunnelSchedule((dim,), (), index.schedule.k), IDS, metric)
        assert_same(searches[f"search_{dim}"](queries[:, :dim]), alone.search(queries))
    assert set(searches) == {"search", *(f"search_{dim}" for dim in dims)}


def test_a_schedule_that_names_a_dim_twice_is_refused_by_name(tmp_path: Path) -> None:
    """A gallery in the graph is exact at every stage: there is nothing to score again."""
    rows = drawn(0, 30, 8)
    index = ExactIndex.build(rows, FunnelSchedule((8, 8), (20,), 3))
    once = ExactIndex.build(rows, FunnelSchedule((8,), (), 3))
    np.testing.assert_array_equal(index.search(rows).ids, once.search(rows).ids)
    with pytest.raises(ValueError, match=r"so no dim stands twice\. Received: dims=\(8, 8\)\. "):
        export_index(index, tmp_path / "gallery", name="gallery")
    assert not (tmp_path / "gallery").exists() or not any((tmp_path / "gallery").iterdir())


@pytest.mark.parametrize("seed", range(9))
def test_every_cut_leaves_out_the_highest_of_equal_ids(seed: int) -> None:
    search = TiedSearch.drawn(seed, 3)
    index = ExactIndex.build(search.gallery, search.schedule, search.ids, search.metric)
    queries = search.queries.astype(np.float32)
    searches = searches_of(IndexGraph(index))
    np.testing.assert_array_equal(searches["search"](queries)["ids"], search.expected_ids())
    for dim in index.schedule.dims:
        alone = search._replace(schedule=FunnelSchedule((dim,), (), index.schedule.k))
        ids = searches[f"search_{dim}"](queries[:, :dim])["ids"]
        np.testing.assert_array_equal(ids, alone.expected_ids())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dims", [(24,), (6, 24)])
@pytest.mark.parametrize("num_queries", [1, 30])
def test_of_copies_of_a_row_the_lowest_ids_are_returned(
    num_queries: int, dims: tuple[int, ...], metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a matrix product tells copies apart, as BLAS does at the edge of its blocks."""
    noise = np.random.default_rng(0)
    matmul = tf.matmul

    def uneven(*arguments: Any, **options: Any) -> Any:
        product = matmul(*arguments, **options)
        bits = tf.random.uniform(tf.shape(product), -1, 2, tf.int32)
        return product * (1 + 2.0**-23 * tf.cast(bits, tf.float32))

    monkeypatch.setattr(tf, "matmul", uneven)
    gallery = drawn(0, 40, 24)[noise.integers(0, 40, 400)]
    schedule = FunnelSchedule(dims, (60,)[: len(dims) - 1], 30)
    index = ExactIndex.build(gallery, schedule, noise.permutation(400), metric)
    queries = drawn(1, num_queries, 24)
    answer = searches_of(IndexGraph(index))["search"](queries)
    neighbors = Neighbors(answer["ids"], answer["scores"])
    assert_lowest_of_copies(neighbors, gallery, index.ids)
    np.testing.assert_array_equal(neighbors.ids, index.search(queries).ids)


def test_rows_are_copied_in_parts() -> None:
    index = index_of()
    searches = searches_of(IndexGraph(index, rows_at_once=7))
    assert_same(searches["search"](QUERIES), index.search(QUERIES))


# A gallery alone


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The version of an index that was opened from its folder."""
    folder = tmp_path_factory.mktemp("index")
    index_of(encoder_fingerprint="5e1f", prompt="passage: ").save(folder / "saved")
    opened = open_index(folder / "saved")
    assert isinstance(opened, ExactIndex)
    return export_index(opened, folder / "served", name="birds", version=7)


def test_a_version_answers_as_the_index(version: Path) -> None:
    index = index_of()
    with SavedModelSession(version) as session:
        for signature in ("search", "serving_default"):
            assert_same(session.run(signature, {"embedding": QUERIES}), index.search(QUERIES))
        searches = {"search", "search_4", "search_8", "search_16"}
        assert written_signatures(session) == {*searches, "serving_default", "describe"}


def test_the_manifest_of_an_index(version: Path) -> None:
    assert version.name == "7"
    text = (version / MANIFEST_FILE).read_text()
    manifest = json.loads(text)
    made_with, fingerprint = manifest.pop("made_with"), manifest.pop("fingerprint")
    assert made_with["keras_mrl"] == __version__
    assert len(bytes.fromhex(fingerprint)) == 32
    assert 0 < manifest.pop("model_id") < 2**31
    assert {name: value for name, value in manifest.items() if value not in (None, False)} == {
        **{"schema": 1, "name": "birds", "kind": "index", "metric": "cosine"},
        **{"activation": "none", "encoder_fingerprint": "5e1f", "size": 300},
        "prompt": "passage: ",
        **{"dims": [4, 8, 16], "width": 16},
        "inputs": {"embedding": {"dtype": "float32", "shape": [None, 16]}},
        "funnel": {"dims": [4, 8, 16], "shortlists": [60, 25], "k": 10},
    }
    with SavedModelSession(version) as session:
        key = np.array([b""], dtype=object)
        assert session.run("describe", {"key": key})["manifest"].tolist() == [
            text.rstrip("\n").encode()
        ]


def test_no_block_is_gathered_from_and_every_search_is_warmed_up(version: Path) -> None:
    """TensorFlow copies a variable at each read, once it was gathered from."""
    saved = SavedModel.FromString((version / "saved_model.pb").read_bytes())
    used = {op.name for op in saved.meta_graphs[0].meta_info_def.stripped_op_list.op}
    assert "ReadVariableOp" in used
    assert "ResourceGather" not in used
    searches = {"search", "serving_default", "search_4", "search_8", "search_16"}
    assert warmup_sizes(version) == {name: [1] for name in searches}


def test_every_search_but_the_default_names_the_model(version: Path, tmp_path: Path) -> None:
    index = index_of()
    again = export_index(index, tmp_path / "again")
    bare = export_index(index, tmp_path / "bare", identity=False)
    one, other, none = (read_manifest(path) for path in (version, again, bare))
    assert one.model_id != other.model_id
    assert none.model_id is None
    for path, manifest in ((version, one), (again, other), (bare, none)):
        with SavedModelSession(path) as session:
            for name in ("search", "search_8", "serving_default"):
                queries = QUERIES[:3, : 8 if name == "search_8" else None]
                answer = session.run(name, {"embedding": queries})
                served = answer.pop("model_id", np.empty(0, np.int32))
                assert set(answer) == {"ids", "scores"}
                assert served.dtype == np.int32
                has_id = manifest.model_id is not None and name != "serving_default"
                assert served.tolist() == [manifest.model_id] * 3 * has_id


def test_a_version_is_never_overwritten(version: Path) -> None:
    with pytest.raises(FileExistsError, match="A published version is never overwritten"):
        export_index(index_of(), version.parent, version=7)
    assert os.listdir(version.parent) == ["7"]


def test_a_graph_that_answers_otherwise_is_not_published(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    search = IndexGraph.search

    def with_other_ids(self: IndexGraph, embedding: Any) -> Any:
        answer = search(self, embedding)
        return {**answer, "ids": answer["ids"] + 1}

    monkeypatch.setattr(IndexGraph, "search", with_other_ids)
    with pytest.raises(ExportError, match="Received: search differs: "):
        export_index(index_of(), tmp_path / "alone")
    model, rows = models.encoder(), models.sides()["left"]
    index = ExactIndex.build(outputs(model, rows), FunnelSchedule((4, DIMS[-1]), (20,), 5))
    with pytest.raises(ExportError, match="Received: search differs: "):
        export_saved_model(
            model, tmp_path / "both", rows[:3], dims=(4, 16), index=index, signatures=["search"]
        )
    assert os.listdir(tmp_path) == []


# Encoder and gallery


@dataclass(frozen=True)
class Served:
    """An encoder alone, the index of its gallery alone, and the two in one model."""

    model: keras.Model
    rows: Any
    features: Any
    index: ExactIndex
    fingerprint: str
    encoder: Client
    gallery: Client
    both: Client


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model, rows = models.encoder(), models.sides()["left"]
    features = outputs(model, rows)
    root = tmp_path_factory.mktemp("served")
    encoder = export_saved_model(model, root / "encoder", rows[:8], dims=DIMS)
    fingerprint = read_manifest(encoder).fingerprint
    schedule, ids = FunnelSchedule(DIMS, (20, 10), 5), np.arange(len(rows)) * 3
    index = ExactIndex.build(features, schedule, ids, encoder_fingerprint=fingerprint)
    export_index(index, root / "gallery")
    export_saved_model(model, root / "both", rows[:8], dims=DIMS, index=index)
    with (
        DevServer(root / "encoder") as a,
        DevServer(root / "gallery") as b,
        DevServer(root / "both") as c,
    ):
        yield Served(model, rows, features, index, fingerprint, Client(a), Client(b), Client(c))


def test_neighbours_in_one_call_in_two_and_in_this_process(served: Served) -> None:
    expected = served.encoder.retrieve(served.rows, served.index)
    for neighbors in (
        served.encoder.retrieve(served.rows, served.gallery),
        served.both.retrieve(served.rows),
        served.both.search(served.both.embed(served.rows, DIMS[-1])),
    ):
        np.testing.assert_array_equal(neighbors.ids, expected.ids)
        np.testing.assert_allclose(neighbors.scores, expected.scores, rtol=0, atol=1e-5)
    assert expected.ids[:, 0].tolist() == served.index.ids.tolist()


def test_a_model_with_its_gallery_still_embeds(served: Served) -> None:
    manifest = served.both.describe()
    assert (manifest.kind, manifest.size) == ("index", len(served.rows))
    assert manifest.fingerprint == manifest.encoder_fingerprint == served.fingerprint
    assert manifest.funnel == served.index.schedule.to_json()
    for dim in DIMS:
        queries = served.both.embed(served.rows, dim)
        alone = served.encoder.embed(served.rows, dim)
        np.testing.assert_allclose(queries, alone, atol=1e-6)
        schedule = FunnelSchedule((dim,), (), 5)
        exact = ExactIndex.build(served.features, schedule, served.index.ids)
        neighbors = served.both.search(queries, dim, encoder=served.fingerprint)
        np.testing.assert_array_equal(neighbors.ids, exact.search(queries).ids)


def test_another_encoder_is_refused(served: Served, tmp_path: Path) -> None:
    with pytest.raises(EncoderMismatchError, match="embeddings of the encoder it was built with"):
        served.gallery.search(GALLERY[:2], encoder="dead")
    schedule = served.index.schedule
    other = ExactIndex.build(served.features, schedule, encoder_fingerprint="dead")
    with pytest.raises(EncoderMismatchError, match="'dead'"):
        export_saved_model(served.model, tmp_path, served.rows[:8], dims=DIMS, index=other)
    assert os.listdir(tmp_path) == []


def test_raw_embeddings_are_retrieved_by_distance(served: Served, tmp_path: Path) -> None:
    """By their product too: that gallery is the one of the fixture `tied`."""
    index = ExactIndex.build(served.features, FunnelSchedule(DIMS, (20, 10), 5), metric="l2")
    version = export_saved_model(
        served.model, tmp_path, served.rows[:8], dims=DIMS, normalize=False, index=index
    )
    manifest = read_manifest(version)
    assert manifest.metric == "l2"
    with SavedModelSession(version) as session:
        (name,) = manifest.inputs
        assert_same(session.run("retrieve", {name: served.rows}), index.search(served.features))


# Rows of files that are mapped into memory, and are read once.

ROWS = np.arange(4_000_000, dtype=np.float32).reshape(-1, 4)


def mapped_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssFile"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    np.save(tmp_path / "rows.npy", ROWS)
    return tmp_path / "rows.npy"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is in memory")
def test_rows_that_were_read_leave_the_memory_and_comes_back(file: Path) -> None:
    rows = np.load(file, mmap_mode="r")
    before = mapped_kib()
    assert rows.sum() == ROWS.sum()
    read = mapped_kib()
    forget(rows[:, 1:])  # a view is of the same file
    assert read - before > 15_000
    assert mapped_kib() - before < 1_000
    np.testing.assert_array_equal(rows, ROWS)


@pytest.mark.parametrize("mode", ["c", "r+"])
def test_rows_that_were_written_are_never_lost(file: Path, mode: str) -> None:
    rows = np.load(file, mmap_mode=mode)  # type: ignore[arg-type]
    rows[3] = -1
    forget(rows)
    assert rows[3].tolist() == [-1, -1, -1, -1]


def test_an_array_in_memory_is_left_as_it_is() -> None:
    rows = ROWS.copy()
    forget(rows)
    np.testing.assert_array_equal(rows, ROWS)


LARGE = """
import sys
from pathlib import Path
from keras_mrl_export import export_index
from keras_mrl_serving import open_index

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

# The kernel's mark starts anew: that of getrusage is inherited from the process before.
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
export_index(open_index(sys.argv[1], verify=False), sys.argv[2])
print(resident("VmHWM") - before)
"""


@pytest.mark.soak
@pytest.mark.skipif(
    not os.environ.get("KERAS_MRL_SOAK"), reason="7 GB of disk; `make soak` runs it"
)
def test_a_gallery_of_more_than_two_gigabytes(tmp_path: Path) -> None:
    rows, width = 560_000, 1024
    schedule = FunnelSchedule((64, width), (50,), 5)
    parts = [RNG.normal(size=(1000, width)).astype(np.float32) for _ in range(8)]
    gallery = np.lib.format.open_memmap(
        tmp_path / "E.npy", "w+", dtype=np.float32, shape=(rows, width)
    )
    for start, part in zip(range(0, rows, 1000), itertools.cycle(parts), strict=False):
        gallery[start : start + 1000] = part * (1 + start / rows)
    index = ExactIndex.build(gallery, schedule, metric="l2")
    index.save(tmp_path / "saved")
    queries = np.array(gallery[::70_000]) * np.float32(1.001)  # as far from no two rows
    expected = index.search(queries)
    del index, gallery
    command = [sys.executable, "-c", LARGE, str(tmp_path / "saved"), str(tmp_path / "served")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak, size = 1024 * int(done.stdout), 4 * rows * width
    print(f"a gallery of {size / 2**30:.2f} GiB: peak {peak / size:.2f} of it")
    assert size > 2**31
    assert peak <= 2 * size
    with DevServer(tmp_path / "served") as target, Client(target) as client:
        np.testing.assert_array_equal(client.search(queries).ids, expected.ids)
