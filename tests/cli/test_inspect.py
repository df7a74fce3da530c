"""`keras-mrl inspect`: a folder and a server say the same, and neither asks TensorFlow."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keras_mrl_cli.__main__ import main
from keras_mrl_serving.contract import MANIFEST_FILE
from keras_mrl_serving.saved_model import read_signatures
from tests.cli.conftest import CASCADE, KERAS_MRL, Exported
from tests.cli.test_main import refusal, run


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base path of a model that another tool exported."""
    import tensorflow as tf

    path = tmp_path_factory.mktemp("foreign")
    module = tf.Module()
    spec = tf.TensorSpec(None, tf.float64, "x")
    called = tf.function(lambda x: {"y": x + 1}, input_signature=[spec])
    tf.saved_model.save(module, str(path / "7"), signatures={"serving_default": called})
    return path


@pytest.fixture(scope="module")
def targets(exported: Exported, foreign: Path) -> Iterator[dict[str, str]]:
    from keras_mrl_serving.server import DevServer

    with DevServer(exported.base_path, model_name="tiny") as ours, DevServer(foreign) as theirs:
        yield {"tiny": ours, "default": theirs}


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["inspect", *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def inspected(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said(capsys, *arguments, "--json"))
    return found


def test_a_folder_in_json(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspected(capsys, str(exported.base_path))
    version = exported.base_path / "1"
    size = sum(file.stat().st_size for file in version.rglob("*") if file.is_file())
    assert found["path"] == str(version)
    assert found["versions"] == [{"version": 1, "bytes": size}]
    assert found["sizes"]["saved_model.pb"] == (version / "saved_model.pb").stat().st_size
    assert sum(found["sizes"].values()) == size
    assert found["manifest"] == json.loads((version / "assets.extra/keras_mrl.json").read_text())
    assert found["manifest"]["cascade"].items() >= CASCADE.items()
    dims = (2, 4, 16)
    names = {f"{kind}_{dim}" for kind in ("embed", "classify", "head") for dim in dims}
    names |= {"features", "classify_adaptive", "describe", "serving_default"}
    assert set(found["signatures"]) == names
    assert found["signatures"]["embed_4"] == {
        "inputs": {"x": {"dtype": "float32", "shape": [None, 6]}},
        "outputs": {"embedding": {"dtype": "float32", "shape": [None, 4]}},
    }


def test_a_version_s_own_folder_says_the_same(
    exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    above = inspected(capsys, str(exported.base_path))
    assert inspected(capsys, str(exported.base_path / "1")) == {**above, "versions": []}


def test_the_highest_version_is_shown(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("9", "10", "copying-11"):
        shutil.copytree(exported.base_path / "1", tmp_path / name)
    found = inspected(capsys, str(tmp_path))
    assert found["path"] == str(tmp_path / "10")
    assert [version["version"] for version in found["versions"]] == [9, 10]


@pytest.mark.parametrize("name", ["0", "7"])
def test_a_file_by_a_number_is_no_version(
    name: str, exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "1").symlink_to(exported.base_path / "1")
    plain = inspected(capsys, str(tmp_path))
    assert plain["strays"] == []
    assert len(plain["versions"]) == 1
    (tmp_path / name).write_text("a stray file")
    assert inspected(capsys, str(tmp_path)) == {**plain, "strays": [name]}
    lines = said(capsys, str(tmp_path)).splitlines()
    told = f"  no version   {name}, a file: a server takes it for a version and cannot load it"
    assert lines.count(told) == 1
    out = str(tmp_path / "out")
    assert main(["deploy", out, "--model-base-path", str(tmp_path)]) == 0
    capsys.readouterr()
    (tmp_path / "1").unlink()
    assert refusal(["inspect", str(tmp_path)], 1, capsys).startswith("A model is a folder with ")


def test_a_folder_in_words(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, str(exported.base_path)).splitlines()
    assert lines[0] == f"{exported.base_path / '1'}: tiny_One, classifier"
    assert lines[1:5] == [
        "  dims         2, 4, 16",
        "  inputs       x float32 (any, 6)",
        "  embeddings   of unit length, compared by cosine",
        "  classes      5 with names, top 3; a kernel for each dim",
    ]
    start = lines.index("cascade by max_probability")
    assert lines[start + 1 : start + 5] == [
        "  DIM      ABOVE  TEMPERATURE    ROWS",
        "    2   0.500000            2   50.0%",
        "   16          -            1   50.0%",
        "  on 40 rows: accuracy 0.7500, 0.8000 at the full dim; expected dim 9.0, cumulative 11.0",
    ]
    names = [line[2:].partition(":")[0] for line in lines if line.startswith("  embed_")]
    assert names == ["embed_2", "embed_4", "embed_16"]
    after = lines.index("  embed_16: x float32 (any, 6)") + 1
    assert lines[after] == "    -> embedding float32 (any, 16)"


def test_a_promise_is_shown(
    exported: Exported, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    copy = shutil.copytree(exported.base_path / "1", tmp_path / "1")
    manifest = json.loads((copy / MANIFEST_FILE).read_text())
    manifest["cascade"]["guarantee"] = {"risk": 0.01, "delta": 0.05, "size": 1500, "errors": 1}
    (copy / MANIFEST_FILE).write_text(json.dumps(manifest))
    promise = (
        "  promised with delta 0.05: right at the full dim and wrong here in at most 0.01 of rows; "
        "certified on 1500 rows, 1 of them so"
    )
    assert promise in said(capsys, str(tmp_path)).splitlines()


def test_a_server_says_what_the_folder_says(
    exported: Exported, targets: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = inspected(capsys, str(exported.base_path))
    server = inspected(capsys, targets["tiny"], "--model", "tiny")
    assert server == {
        "target": targets["tiny"],
        "model": "tiny",
        "versions": [{"version": 1, "state": "AVAILABLE", "error": ""}],
        "manifest": folder["manifest"],
        "signatures": folder["signatures"],
    }
    lines = said(capsys, targets["tiny"], "--model", "tiny").splitlines()
    assert lines[0] == f"tiny at {targets['tiny']}: tiny_One, classifier"
    assert "  version      1, AVAILABLE" in lines


def test_a_model_of_another_tool(
    foreign: Path, targets: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    for what in (str(foreign), targets["default"]):
        found = inspected(capsys, what)
        assert found["manifest"] is None
        assert found["signatures"]["serving_default"] == {
            "inputs": {"x": {"dtype": "float64", "shape": None}},
            "outputs": {"y": {"dtype": "float64", "shape": None}},
        }
        lines = said(capsys, what).splitlines()
        assert lines[1] == (
            "  manifest     none: another tool exported it, and only `predict` of a client can ask "
            "it"
        )
        assert lines[-2:] == [
            "  serving_default: x float64 of any shape",
            "    -> y float64 of any shape",
        ]


def test_tensorflow_says_the_same_of_the_signatures(exported: Exported) -> None:
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    file = exported.base_path / "1" / "saved_model.pb"
    theirs = SavedModel.FromString(file.read_bytes()).meta_graphs[0].signature_def
    ours = read_signatures(file.parent)
    assert set(ours) == set(theirs) - {"__saved_model_init_op"}
    for name, signature in ours.items():
        assert set(signature.inputs) == set(theirs[name].inputs)
        assert set(signature.outputs) == set(theirs[name].outputs)


def test_it_needs_the_client_alone(exported: Exported, tmp_path: Path) -> None:
    blocked = ("keras", "tensorflow", "tensorflow_serving", "jax", "torch", "keras_mrl")
    command = [*KERAS_MRL, "inspect", str(exported.base_path)]
    status, out, err = run(tmp_path, command, blocked)
    assert (status, err) == (0, "")
    assert out.startswith(f"{exported.base_path / '1'}: tiny_One, classifier\n")


def test_what_is_no_model(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rule = "A model is a folder with saved_model.pb, or the folder above such, each named by its "
    rule += "number. Received: {}. Correct the path, or export one with keras-mrl export."
    assert refusal(["inspect", "nothing/here"], 1, capsys) == rule.format("nothing/here")
    assert refusal(["inspect", str(tmp_path)], 1, capsys) == rule.format(tmp_path)
    assert refusal(["inspect", sys.executable], 1, capsys) == rule.format(sys.executable)
    (tmp_path / "1").mkdir()
    assert refusal(["inspect", str(tmp_path)], 1, capsys) == (
        f"A version is a folder with saved_model.pb. Received: {tmp_path / '1'} without one. "
        "Copy it again under a name that is no number, and rename it."
    )
    (tmp_path / "1" / "saved_model.pb").write_bytes(b"\xff\xff")
    said = refusal(["inspect", str(tmp_path)], 1, capsys)
    assert said.startswith(
        "saved_model.pb must be a SavedModel as TensorFlow writes it. "
        f"Received: {tmp_path / '1' / 'saved_model.pb'} ("
    )
    assert said.endswith("). Copy the version again, or export it again.")
    manifest = tmp_path / "2" / "assets.extra" / "keras_mrl.json"
    shutil.copytree(exported.base_path / "1", tmp_path / "2")
    manifest.write_text('{"schema": 2}')
    assert refusal(["inspect", str(tmp_path)], 1, capsys) == (
        "This client reads manifests of schema 1. Received: schema 2. "
        "Install the version of keras-mrl that exported the model, or a later one."
    )


def test_a_folder_has_no_server(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = refusal(["inspect", str(tmp_path), "--model", "m", "--timeout", "3"], 1, capsys)
    assert said == (
        "A folder is read without a server. "
        f"Received: --model, --timeout for {tmp_path}. Leave them out, or name HOST:PORT."
    )


def test_a_server_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(["inspect", "127.0.0.1:1", "--timeout", "0.3"], 1, capsys)
    assert "127.0.0.1:1" in said
    assert refusal(["inspect", "127.0.0.1:1", "--timeout", "0"], 2, capsys) == (
        "--timeout must be a positive number of seconds. Received: 0.0. Give for example 10."
    )
