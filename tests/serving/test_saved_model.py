"""What is read of a SavedModel without TensorFlow; tests/cli/test_inspect.py reads a real one."""

import re
from pathlib import Path

import pytest

from keras_mrl_serving import Manifest, ManifestError
from keras_mrl_serving import _wire_pb2 as wire
from keras_mrl_serving.contract import MANIFEST_FILE
from keras_mrl_serving.saved_model import read_manifest, read_signatures, sizes

MANIFEST = Manifest(
    name="m", kind="encoder", fingerprint="5e1f", dims=(8,), width=8, inputs={}, made_with={}
)


def test_the_manifest_is_the_one_written(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    (tmp_path / MANIFEST_FILE).parent.mkdir()
    (tmp_path / MANIFEST_FILE).write_text(MANIFEST.to_json())
    assert read_manifest(tmp_path) == MANIFEST


def test_signatures_that_can_be_called(tmp_path: Path) -> None:
    graph = wire.MetaGraphDef()
    info = graph.signature_def["embed_8"].inputs["x"]
    info.dtype = wire.DT_BFLOAT16
    for size in (-1, 6):
        info.tensor_shape.dim.add(size=size)
    graph.signature_def["embed_8"].outputs["embedding"].tensor_shape.unknown_rank = True
    graph.signature_def["__saved_model_init_op"].outputs["op"].dtype = wire.DT_INVALID
    saved = wire.SavedModel(meta_graphs=[graph])
    (tmp_path / "saved_model.pb").write_bytes(saved.SerializeToString())
    ((name, signature),) = read_signatures(tmp_path).items()
    assert name == "embed_8"
    assert signature.inputs == {"x": {"dtype": "bfloat16", "shape": [None, 6]}}
    assert signature.outputs["embedding"]["shape"] is None


def test_a_graph_without_signatures_has_none(tmp_path: Path) -> None:
    saved = wire.SavedModel(meta_graphs=[wire.MetaGraphDef()])
    (tmp_path / "saved_model.pb").write_bytes(saved.SerializeToString())
    assert read_signatures(tmp_path) == {}


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_signatures(tmp_path)
    graph = wire.MetaGraphDef()
    graph.signature_def["serving_default"].inputs["x"].dtype = 101  # type: ignore[assignment]
    odd = wire.SavedModel(meta_graphs=[graph]).SerializeToString()
    unknown = wire.SavedModel(saved_model_schema_version=1).SerializeToString()
    for data, why in (
        (b"\xff\xff\xff", r"Error parsing message .*"),
        (b"", "it holds no graph"),
        (unknown, "it holds no graph"),
        (odd, r".* 101"),
    ):
        file = tmp_path / "saved_model.pb"
        file.write_bytes(data)
        rule = "saved_model.pb must be a SavedModel as TensorFlow writes it."
        remedy = "Copy the version again, or export it again."
        told = rf"{re.escape(rule)} Received: {re.escape(str(file))} \({why}\)\. {remedy}"
        with pytest.raises(ManifestError) as caught:
            read_signatures(tmp_path)
        assert re.fullmatch(told, str(caught.value))


def test_sizes_are_those_of_all_files_below(tmp_path: Path) -> None:
    (tmp_path / "saved_model.pb").write_bytes(b"123")
    (tmp_path / "variables" / "deep").mkdir(parents=True)
    (tmp_path / "variables" / "index").write_bytes(b"12")
    (tmp_path / "variables" / "deep" / "data").write_bytes(b"1234")
    (tmp_path / "assets").mkdir()
    assert sizes(tmp_path) == {"assets": 0, "saved_model.pb": 3, "variables": 6}
