"""A gallery in the graph: what the NumPy index answers, over gRPC, alone or with its encoder."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_mrl_export import ExportError, export_index, export_saved_model
from keras_mrl_export.gallery import IndexGraph
from keras_mrl_serving import __version__
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.client import Client
from keras_mrl_serving.contract import MANIFEST_FILE
from keras_mrl_serving.errors import EncoderMismatchError
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex, FaissIndex, open_index
from keras_mrl_serving.server import DevServer
from tests.helpers import export_models as models
from tests.helpers.export_models import DIMS, only_tensorflow

RNG = np.random.default_rng(0)
WIDTH = 16
GALLERY = RNG.normal(size=(300, WIDTH)).astype(np.float32)
GALLERY[100:120] = GALLERY[5]  # twenty-one rows that are as near as each other
IDS = RNG.permutation(10_000)[:300].astype(np.int64)
QUERIES = np.concatenate([GALLERY[:7], RNG.normal(size=(40, WIDTH)).astype(np.float32)])
SCHEDULES = {
    "three stages": FunnelSchedule((4, 8, WIDTH), (60, 25), 10),
    "two, of which one looks at the whole gallery": FunnelSchedule((4, WIDTH), (300,), 5),
    "a shortlist longer than the gallery": FunnelSchedule((4, WIDTH), (1000,), 5),
    "one": FunnelSchedule((WIDTH,), (), 3),
    "all rows": FunnelSchedule((WIDTH,), (), 300),
    "narrower than the gallery": FunnelSchedule((2, 6), (30,), 1),
}
METRICS = ("cosine", "dot", "l2")


def index_of(schedule: str = "three stages", metric: str = "cosine", **more: Any) -> ExactIndex:
    return ExactIndex.build(GALLERY, SCHEDULES[schedule], IDS, metric, **more)


def same(found: Any, expected: Any) -> None:
    np.testing.assert_array_equal(found["ids"], expected.ids)
    largest = max(1.0, np.abs(expected.scores).max())  # squared distances of 0 round as lengths do
    np.testing.assert_allclose(found["scores"], expected.scores, rtol=0, atol=1e-5 * largest)
    assert found["ids"].dtype == np.int64
    assert found["scores"].dtype == np.float32


@only_tensorflow
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_search_is_that_of_the_numpy_index(
    schedule: str, metric: str, tmp_path: Path
) -> None:
    index = index_of(schedule, metric)
    dims = index.schedule.dims
    with SavedModelSession(export_index(index, tmp_path)) as session:
        queries = QUERIES[:, : index.width]
        same(session.run("search", {"embedding": queries}), index.search(queries))
        for row in (0, 5, 30):
            one = session.run("search", {"embedding": queries[row : row + 1]})
            same(one, index.search(queries[row : row + 1]))
        for dim in dims:
            alone = ExactIndex.build(
                GALLERY, FunnelSchedule((dim,), (), index.schedule.k), IDS, metric
            )
            found = session.run(f"search_{dim}", {"embedding": queries[:, :dim]})
            same(found, alone.search(queries))
        assert {name for name in session.signatures if not name.startswith("__")} == {
            *("search", "serving_default", "describe"),
            *(f"search_{dim}" for dim in dims),
        }
        default = session.run("serving_default", {"embedding": queries})
        same(default, index.search(queries))


@only_tensorflow
def test_the_manifest_of_an_index(tmp_path: Path) -> None:
    version = export_index(index_of(encoder_fingerprint="5e1f"), tmp_path, name="birds", version=7)
    assert version == tmp_path / "7"
    text = (version / MANIFEST_FILE).read_text()
    manifest = json.loads(text)
    made_with, fingerprint = manifest.pop("made_with"), manifest.pop("fingerprint")
    assert made_with["keras_mrl"] == __version__
    assert len(bytes.fromhex(fingerprint)) == 32
    assert {name: value for name, value in manifest.items() if value not in (None, False)} == {
        **{"schema": 1, "name": "birds", "kind": "index", "metric": "cosine"},
        **{"activation": "none", "encoder_fingerprint": "5e1f", "size": 300},
        **{"dims": [4, 8, 16], "width": 16},
        "inputs": {"embedding": {"dtype": "float32", "shape": [None, 16]}},
        "funnel": {"dims": [4, 8, 16], "shortlists": [60, 25], "k": 10},
    }
    with SavedModelSession(version) as session:
        key = np.array([b""], dtype=object)
        assert session.run("describe", {"key": key})["manifest"].tolist() == [
            text.rstrip("\n").encode()
        ]


@only_tensorflow
def test_a_fingerprint_is_of_all_that_answers(tmp_path: Path) -> None:
    turned = GALLERY.copy()
    turned[299, 15] *= -1
    indexes = [
        index_of(),
        index_of("one"),
        index_of(metric="dot"),
        index_of(encoder_fingerprint="5e1f"),
        ExactIndex.build(turned, SCHEDULES["three stages"], IDS),
        ExactIndex.build(GALLERY, SCHEDULES["three stages"]),
    ]
    versions = [export_index(index, tmp_path) for index in (*indexes, index_of())]
    *prints, again = (json.loads((v / MANIFEST_FILE).read_text())["fingerprint"] for v in versions)
    assert len(set(prints)) == len(indexes)
    assert again == prints[0]


@only_tensorflow
def test_an_index_that_was_opened_is_the_same(tmp_path: Path) -> None:
    index = index_of()
    index.save(tmp_path / "saved")
    opened = open_index(tmp_path / "saved")
    assert isinstance(opened, ExactIndex)
    with SavedModelSession(export_index(opened, tmp_path / "served")) as session:
        same(session.run("search", {"embedding": QUERIES}), index.search(QUERIES))


@only_tensorflow
def test_rows_are_copied_in_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from keras_mrl_export import gallery

    monkeypatch.setattr(gallery, "_ROWS_AT_ONCE", 7)
    index = index_of()
    with SavedModelSession(export_index(index, tmp_path)) as session:
        same(session.run("search", {"embedding": QUERIES}), index.search(QUERIES))


def broken(search: Any, wrong: str) -> Any:
    def other(self: IndexGraph, *args: Any, **kwargs: Any) -> Any:
        answer = search(self, *args, **kwargs)
        return {**answer, wrong: answer[wrong] + 1}

    return other


@only_tensorflow
@pytest.mark.parametrize(
    ("search", "named", "wrong"),
    [("search", "search", "ids"), ("search", "search", "scores"), ("search_at", "search_4", "ids")],
)
def test_a_graph_that_answers_otherwise_is_not_published(
    search: str, named: str, wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(IndexGraph, search, broken(getattr(IndexGraph, search), wrong))
    with pytest.raises(ExportError, match=f"Received: {named} differs: "):
        export_index(index_of(), tmp_path / "alone")
    model, rows = models.encoder(), models.sides()["left"]
    features = model.predict(rows, verbose=0)
    index = ExactIndex.build(features, FunnelSchedule((4, DIMS[-1]), (20,), 5))
    with pytest.raises(ExportError, match=f"Received: {named} differs: "):
        export_saved_model(
            model, tmp_path / "both", rows[:3], dims=(4, 16), index=index, signatures=["search"]
        )
    assert os.listdir(tmp_path) == []


@only_tensorflow
@pytest.mark.parametrize("metric", METRICS)
def test_what_searches_at_one_dim_are_compared_with(
    metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from keras_mrl_export import parity

    monkeypatch.setattr(parity, "_ROWS_AT_ONCE", 7)
    index = index_of("three stages", metric)
    found = parity.exact_neighbors(index, QUERIES, [3, 8, 12, WIDTH])
    assert list(found) == [3, 8, 12, WIDTH]
    for dim, near in found.items():
        alone = ExactIndex.build(GALLERY, FunnelSchedule((dim,), (), 10), IDS, metric)
        expected = alone.search(QUERIES[:, :dim])
        np.testing.assert_allclose(near.scores, expected.scores, rtol=1e-4, atol=1e-5)
        apart = np.abs(np.diff(near.scores, axis=1, prepend=np.inf, append=-np.inf)) > 1e-4
        clear = (apart[:, :-1] & apart[:, 1:])[:, :-1]
        np.testing.assert_array_equal(near.ids[:, :-1][clear], expected.ids[:, :-1][clear])
        assert clear.mean() > 0.5
    assert parity.exact_neighbors(index, QUERIES, []) == {}


@only_tensorflow
def test_no_block_is_gathered_from_and_every_search_is_warmed_up(tmp_path: Path) -> None:
    """TensorFlow copies a variable at each read, once it was gathered from."""
    import tensorflow as tf
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel
    from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

    version = export_index(index_of(), tmp_path)
    saved = SavedModel.FromString((version / "saved_model.pb").read_bytes())
    used = {op.name for op in saved.meta_graphs[0].meta_info_def.stripped_op_list.op}
    assert "ReadVariableOp" in used
    assert "ResourceGather" not in used
    warmed = [
        PredictionLog.FromString(data.numpy()).predict_log.request.model_spec.signature_name
        for data in tf.data.TFRecordDataset(
            str(version / "assets.extra/tf_serving_warmup_requests")
        )
    ]
    searches = {"search", "serving_default", "search_4", "search_8", "search_16"}
    assert set(warmed) == searches


@only_tensorflow
def test_what_is_refused(tmp_path: Path) -> None:
    index = FaissIndex.build(GALLERY, SCHEDULES["one"])
    with pytest.raises(TypeError) as caught:
        export_index(index, tmp_path)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "A gallery in the graph has an exact first stage, as ExactIndex has. Received: FaissIndex. "
        "Build one of the same embeddings: ExactIndex.build(gallery, schedule, ids)."
    )
    export_index(index_of(), tmp_path, version=3)
    with pytest.raises(FileExistsError, match="A published version is never overwritten"):
        export_index(index_of(), tmp_path, version=3)
    assert os.listdir(tmp_path) == ["3"]


# Encoder and index, from every backend


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """An encoder alone, the index of its gallery alone, and the two in one model; served."""
    model, rows = models.encoder(), models.sides()["left"]
    features = model.predict(rows, verbose=0)
    root = tmp_path_factory.mktemp("both")
    encoder = export_saved_model(model, root / "encoder", rows[:8], dims=DIMS)
    fingerprint = json.loads((encoder / MANIFEST_FILE).read_text())["fingerprint"]
    schedule = FunnelSchedule(DIMS, (20, 10), 5)
    ids = np.arange(len(rows)) * 3
    index = ExactIndex.build(features, schedule, ids, encoder_fingerprint=fingerprint)
    export_index(index, root / "index")
    export_saved_model(model, root / "one", rows[:8], dims=DIMS, index=index)
    with (
        DevServer(root / "encoder") as a,
        DevServer(root / "index") as b,
        DevServer(root / "one") as c,
    ):
        yield {
            **{"model": model, "rows": rows, "index": index, "fingerprint": fingerprint},
            **{"encoder": Client(a), "served": Client(b), "one": Client(c)},
        }


@pytest.mark.backend
def test_neighbours_in_one_call_in_two_and_in_this_process(both: dict[str, Any]) -> None:
    here = both["encoder"].retrieve(both["rows"], both["index"])
    for found in (
        both["encoder"].retrieve(both["rows"], both["served"]),
        both["one"].retrieve(both["rows"]),
        both["one"].search(both["one"].embed(both["rows"], DIMS[-1])),
    ):
        np.testing.assert_array_equal(found.ids, here.ids)
        np.testing.assert_allclose(found.scores, here.scores, rtol=0, atol=1e-5)
    assert here.ids[:, 0].tolist() == both["index"].ids.tolist()


@pytest.mark.backend
def test_a_model_with_its_gallery_still_embeds(both: dict[str, Any]) -> None:
    manifest = both["one"].describe()
    assert (manifest.kind, manifest.size) == ("index", len(both["rows"]))
    assert manifest.fingerprint == manifest.encoder_fingerprint == both["fingerprint"]
    assert manifest.funnel == both["index"].schedule.to_json()
    for dim in DIMS:
        np.testing.assert_allclose(
            both["one"].embed(both["rows"], dim),
            both["encoder"].embed(both["rows"], dim),
            atol=1e-6,
        )
        exact = ExactIndex.build(
            both["model"].predict(both["rows"], verbose=0),
            FunnelSchedule((dim,), (), 5),
            both["index"].ids,
        )
        queries = both["one"].embed(both["rows"], dim)
        found = both["one"].search(queries, dim, encoder=both["fingerprint"])
        np.testing.assert_array_equal(found.ids, exact.search(queries).ids)


@pytest.mark.backend
def test_another_encoder_is_refused(both: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(EncoderMismatchError, match="embeddings of the encoder it was built with"):
        both["served"].search(GALLERY[:2], encoder="dead")
    features = both["model"].predict(both["rows"], verbose=0)
    schedule = both["index"].schedule
    other = ExactIndex.build(features, schedule, encoder_fingerprint="dead")
    with pytest.raises(EncoderMismatchError, match="'dead'"):
        export_saved_model(both["model"], tmp_path, both["rows"][:8], dims=DIMS, index=other)
    assert not tmp_path.exists() or os.listdir(tmp_path) == []


@pytest.mark.backend
@pytest.mark.parametrize(
    ("given", "changes", "error", "text"),
    [
        (
            lambda features: FaissIndex.build(features, FunnelSchedule((DIMS[-1],), (), 1)),
            {},
            TypeError,
            "A gallery in the graph has an exact first stage, as ExactIndex has. "
            "Received: FaissIndex. "
            "Build one of the same embeddings: ExactIndex.build(gallery, schedule, ids).",
        ),
        (
            lambda features: ExactIndex.build(features, FunnelSchedule((4,), (), 1)),
            {},
            ValueError,
            "An index that is exported with a model is as wide as the model's last dim. "
            f"Received: an index of width 4 for dims={DIMS}. "
            "Give dims= up to its width, or build it at the last dim.",
        ),
        *(
            (
                lambda features, metric=metric: ExactIndex.build(
                    features, FunnelSchedule((DIMS[-1],), (), 1), metric=metric
                ),
                {},
                ValueError,
                "Embeddings of unit length are compared by cosine: their prefixes have other "
                f"lengths. Received: an index with metric={metric!r} and normalize=True. "
                "Give normalize=False, or build the index with cosine.",
            )
            for metric in ("dot", "l2")
        ),
    ],
)
def test_indexes_that_do_not_fit_a_model(
    given: Any, changes: Any, error: Any, text: str, both: dict[str, Any], tmp_path: Path
) -> None:
    index = given(both["model"].predict(both["rows"], verbose=0))
    with pytest.raises(error) as caught:
        export_saved_model(
            both["model"], tmp_path, both["rows"][:8], dims=DIMS, index=index, **changes
        )
    assert (type(caught.value), str(caught.value)) == (error, text)


@pytest.mark.backend
@pytest.mark.parametrize("metric", ["dot", "l2"])
def test_raw_embeddings_are_retrieved_by_product_and_by_distance(
    metric: str, both: dict[str, Any], tmp_path: Path
) -> None:
    model, rows = both["model"], both["rows"]
    features = model.predict(rows, verbose=0)
    index = ExactIndex.build(features, FunnelSchedule(DIMS, (20, 10), 5), metric=metric)
    version = export_saved_model(model, tmp_path, rows[:8], dims=DIMS, normalize=False, index=index)
    assert json.loads((version / MANIFEST_FILE).read_text())["metric"] == metric
    with SavedModelSession(version) as session:
        (name,) = json.loads((version / MANIFEST_FILE).read_text())["inputs"]
        same(session.run("retrieve", {name: rows}), index.search(features))


LARGE = """
import sys
from pathlib import Path
from keras_mrl_export import export_index
from keras_mrl_export.gallery import IndexGraph
from keras_mrl_serving import open_index

def resident(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

# The kernel's own mark starts anew: what getrusage gives is inherited from the process before.
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
export_index(open_index(sys.argv[1], verify=False), sys.argv[2])
print(resident("VmHWM") - before)
"""


@only_tensorflow
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
        found = client.search(queries)
        np.testing.assert_array_equal(found.ids, expected.ids)
