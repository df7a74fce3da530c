"""`keras-mrl inspect`: a folder and a server say the same, and neither asks TensorFlow."""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from keras_mrl_cli.inspect import print_model
from keras_mrl_serving.contract import MANIFEST_FILE, Manifest
from keras_mrl_serving.errors import ManifestError
from keras_mrl_serving.saved_model import read_signatures
from tests.helpers.cli import CASCADE, FRAMEWORKS, KERAS_MRL, Call, Exported, run_without
from tests.helpers.manifests import DEPTHS, WRONG_VALUES, places, with_value


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


def printed(call: Call, *words: str) -> str:
    ended = call("inspect", *words)
    assert (ended.status, ended.err) == (0, "")
    return ended.out


def inspected(call: Call, *words: str) -> dict[str, Any]:
    model: dict[str, Any] = json.loads(printed(call, *words, "--json"))
    return model


def test_a_folder_in_json(exported: Exported, call: Call) -> None:
    model = inspected(call, str(exported.base_path))
    version = exported.base_path / "1"
    size = sum(file.stat().st_size for file in version.rglob("*") if file.is_file())
    assert model["path"] == str(version)
    assert model["versions"] == [{"version": 1, "bytes": size}]
    assert model["sizes"]["saved_model.pb"] == (version / "saved_model.pb").stat().st_size
    assert sum(model["sizes"].values()) == size
    assert model["manifest"] == json.loads((version / "assets.extra/keras_mrl.json").read_text())
    assert model["manifest"]["cascade"].items() >= CASCADE.items()
    dims = (2, 4, 16)
    names = {f"{kind}_{dim}" for kind in ("embed", "classify", "head") for dim in dims}
    names |= {"features", "classify_adaptive", "describe", "serving_default"}
    assert set(model["signatures"]) == names
    assert model["signatures"]["embed_4"] == {
        "inputs": {"x": {"dtype": "float32", "shape": [None, 6]}},
        "outputs": {
            "embedding": {"dtype": "float32", "shape": [None, 4]},
            "model_id": {"dtype": "int32", "shape": [None]},
        },
    }


def test_a_version_s_own_folder_says_the_same(exported: Exported, call: Call) -> None:
    above = inspected(call, str(exported.base_path))
    assert inspected(call, str(exported.base_path / "1")) == {**above, "versions": []}


def test_the_highest_version_is_shown(exported: Exported, tmp_path: Path, call: Call) -> None:
    for name in ("9", "10", "copying-11"):
        shutil.copytree(exported.base_path / "1", tmp_path / name)
    model = inspected(call, str(tmp_path))
    assert model["path"] == str(tmp_path / "10")
    assert [version["version"] for version in model["versions"]] == [9, 10]


@pytest.mark.parametrize("name", ["0", "7"])
def test_a_file_by_a_number_is_no_version(
    name: str, exported: Exported, tmp_path: Path, call: Call
) -> None:
    (tmp_path / "1").symlink_to(exported.base_path / "1")
    plain = inspected(call, str(tmp_path))
    assert plain["strays"] == []
    assert len(plain["versions"]) == 1
    (tmp_path / name).write_text("a stray file")
    assert inspected(call, str(tmp_path)) == {**plain, "strays": [name]}
    lines = printed(call, str(tmp_path)).splitlines()
    line = f"  no version   {name}, a file: a server takes it for a version and cannot load it"
    assert lines.count(line) == 1
    out = str(tmp_path / "out")
    assert call("deploy", out, "--base-path", str(tmp_path)).status == 0
    (tmp_path / "1").unlink()
    assert call.refused("inspect", str(tmp_path)).startswith("A model is a folder with ")


def test_a_folder_in_words(exported: Exported, call: Call) -> None:
    lines = printed(call, str(exported.base_path)).splitlines()
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
    assert lines[after] == "    -> embedding float32 (any, 16), model_id int32 (any)"
    manifest = inspected(call, str(exported.base_path))["manifest"]
    assert f"  model id     {manifest['model_id']}" in lines


def test_a_promise_is_shown(exported: Exported, call: Call, tmp_path: Path) -> None:
    copy = shutil.copytree(exported.base_path / "1", tmp_path / "1")
    manifest = json.loads((copy / MANIFEST_FILE).read_text())
    manifest["cascade"]["guarantee"] = {"risk": 0.01, "delta": 0.05, "size": 1500, "errors": 1}
    (copy / MANIFEST_FILE).write_text(json.dumps(manifest))
    promise = (
        "  promised with delta 0.05: right at the full dim and wrong here in at most 0.01 of rows; "
        "certified on 1500 rows, 1 of them so"
    )
    assert promise in printed(call, str(tmp_path)).splitlines()


def test_a_server_says_what_the_folder_says(
    exported: Exported, targets: dict[str, str], call: Call
) -> None:
    folder = inspected(call, str(exported.base_path))
    server = inspected(call, "--target", targets["tiny"], "--model", "tiny")
    assert inspected(call, targets["tiny"], "--model", "tiny") == server  # as it was named before
    assert server == {
        "target": targets["tiny"],
        "model": "tiny",
        "versions": [{"version": 1, "state": "AVAILABLE", "error": ""}],
        "manifest": folder["manifest"],
        "signatures": folder["signatures"],
    }
    lines = printed(call, "--target", targets["tiny"], "--model", "tiny").splitlines()
    assert lines[0] == f"tiny at {targets['tiny']}: tiny_One, classifier"
    assert "  version      1, AVAILABLE" in lines


def test_a_model_of_another_tool(foreign: Path, targets: dict[str, str], call: Call) -> None:
    for words in ([str(foreign)], ["--target", targets["default"]]):
        model = inspected(call, *words)
        assert model["manifest"] is None
        assert model["signatures"]["serving_default"] == {
            "inputs": {"x": {"dtype": "float64", "shape": None}},
            "outputs": {"y": {"dtype": "float64", "shape": None}},
        }
        lines = printed(call, *words).splitlines()
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
    words = [*KERAS_MRL, "inspect", str(exported.base_path)]
    status, out, err = run_without(FRAMEWORKS, tmp_path, *words)
    assert (status, err) == (0, "")
    assert out.startswith(f"{exported.base_path / '1'}: tiny_One, classifier\n")


def test_what_is_no_model(exported: Exported, tmp_path: Path, call: Call) -> None:
    rule = "A model is a folder with saved_model.pb, or the folder above such, each named by its "
    rule += "number. Received: {}. Correct the path, or export one with keras-mrl export."
    assert call.refused("inspect", "nothing/here") == rule.format("nothing/here")
    assert call.refused("inspect", str(tmp_path)) == rule.format(tmp_path)
    assert call.refused("inspect", sys.executable) == rule.format(sys.executable)
    (tmp_path / "1").mkdir()
    assert call.refused("inspect", str(tmp_path)) == (
        f"A version is a folder with saved_model.pb. Received: {tmp_path / '1'} without one. "
        "Copy it again under a name that is no number, and rename it."
    )
    (tmp_path / "1" / "saved_model.pb").write_bytes(b"\xff\xff")
    sentence = call.refused("inspect", str(tmp_path))
    assert sentence.startswith(
        "saved_model.pb must be a SavedModel as TensorFlow writes it. "
        f"Received: {tmp_path / '1' / 'saved_model.pb'} ("
    )
    assert sentence.endswith("). Copy the version again, or export it again.")
    manifest = tmp_path / "2" / "assets.extra" / "keras_mrl.json"
    shutil.copytree(exported.base_path / "1", tmp_path / "2")
    manifest.write_text('{"schema": 2}')
    assert call.refused("inspect", str(tmp_path)) == (
        "This client reads manifests of schema 1. Received: schema 2. "
        "Install the version of keras-mrl that exported the model, or a later one."
    )


def test_a_folder_has_no_server(call: Call, tmp_path: Path) -> None:
    sentence = call.refused("inspect", str(tmp_path), "--model", "m", "--timeout", "3")
    assert sentence == (
        "A folder is read without a server. "
        f"Received: --model, --timeout for {tmp_path}. Leave them out, or name HOST:PORT."
    )


def test_a_server_that_is_not_there(call: Call) -> None:
    sentence = call.refused("inspect", "--target", "127.0.0.1:1", "--timeout", "0.3")
    assert "127.0.0.1:1" in sentence
    assert call.refused("inspect", "--target", "127.0.0.1:1", "--timeout", "0", status=2) == (
        "--timeout must be a positive number of seconds. Received: 0.0. Give for example 10."
    )


def test_a_folder_or_a_server(call: Call) -> None:
    rule = "A model is shown from its folder, or from its server. Received: {}. "
    rule += "Give a folder, for example models/digits, or --target localhost:8500."
    assert call.refused("inspect", status=2) == rule.format("neither")
    assert call.refused("inspect", "m", "--target", "t:1", status=2) == rule.format("both")


# Damaged models: `inspect` and `deploy` refuse them in a sentence, and `serve` does.

AGAIN = "Export the model again with keras_mrl_export.export_saved_model."


@pytest.fixture
def version(exported: Exported, tmp_path: Path) -> Path:
    """A version that a test may damage, alone under its base path."""
    folder = tmp_path / "models" / "1"
    shutil.copytree(exported.base_path / "1", folder)
    return folder


def commands(version: Path) -> list[list[str]]:
    base_path = str(version.parent)
    out = str(version.parents[1] / "out")
    return [["inspect", base_path], ["deploy", out, "--base-path", base_path]]


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("dims", "8", "dims of a manifest must be an array. Received: '8'."),
        ("quality", ["8"], "quality of a manifest must be an object or null. Received: ['8']."),
        ("num_classes", "five", "num_classes of a manifest must be an integer of 64 bits or null. "
         "Received: 'five'."),
        ("made_with", None, "made_with of a manifest must be an object. Received: None."),
        ("name", 3, "name of a manifest must be a string. Received: 3."),
        ("cascade", {"stages": [8], "confidence": "margin"},
         "cascade.stages[0] of a manifest must be an object. Received: 8."),
    ],
)  # fmt: skip
def test_a_value_of_another_type(
    key: str, value: Any, rule: str, version: Path, call: Call
) -> None:
    file = version / "assets.extra" / "keras_mrl.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    for command in commands(version):
        assert call.refused(*command) == f"{rule} {AGAIN}"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "JSONDecodeError"),
        (b"\xff\xfe\xff", "UnicodeDecodeError"),
        (b"[]", "TypeError"),
        (b'{"name": "m"}', "KeyError"),
        (b"[" * 100_000, "ValueError"),
    ],
)
def test_what_is_no_manifest(data: bytes, why: str, version: Path, call: Call) -> None:
    (version / "assets.extra" / "keras_mrl.json").write_bytes(data)
    for command in commands(version):
        sentence = call.refused(*command)
        assert sentence.startswith("A manifest is a JSON object with a schema. Received: b")
        assert f" ({why}: " in sentence
        assert sentence.endswith(AGAIN)


@pytest.mark.parametrize(
    ("data", "why"),
    [(b"", "it holds no graph"), (b"no model", "Error parsing message"), (b"\x08\x01", "no graph")],
)
def test_what_is_no_saved_model(data: bytes, why: str, version: Path, call: Call) -> None:
    file = version / "saved_model.pb"
    file.write_bytes(data)
    for command in commands(version):
        sentence = call.refused(*command)
        rule = "saved_model.pb must be a SavedModel as TensorFlow writes it."
        assert sentence.startswith(f"{rule} Received: {file} (")
        assert why in sentence
        assert sentence.endswith("). Copy the version again, or export it again.")
    assert not (version.parents[1] / "out").exists()


def test_serve_refuses_it_too(
    version: Path, call: Call, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    (version / "saved_model.pb").write_bytes(b"")
    ended = call("serve", "--dev", "--port=0", f"--model_base_path={version.parent}")
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.splitlines()[-1].startswith(
        "keras-mrl: The highest version must load. Received: version 1 of model default, "
    )
    assert "Traceback" not in ended.err
    assert not [record for record in caplog.records if record.exc_info]


def test_what_is_read_is_shown(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads((exported.base_path / "1/assets.extra/keras_mrl.json").read_text())
    shown = 0
    for place in places(whole):
        for value in WRONG_VALUES:
            try:
                manifest = Manifest.from_json(json.dumps(with_value(whole, place, value)))
            except ManifestError:
                continue
            written = json.loads(manifest.to_json())
            print_model({"path": "m", "versions": [], "manifest": written, "signatures": {}})
            assert capsys.readouterr().out.startswith("m: ")
            shown += 1
    assert shown > 100


@pytest.mark.parametrize("key", ["holdout_size", "accuracy", "expected_dim", "exit_fractions"])
def test_a_cascade_whose_report_is_cut_is_shown(
    key: str, exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = json.loads((exported.base_path / "1/assets.extra/keras_mrl.json").read_text())
    del whole["cascade"][key]
    print_model({"path": "m", "versions": [], "manifest": whole, "signatures": {}})
    lines = capsys.readouterr().out.splitlines()
    (first,) = [line for line in lines if line.startswith("    2   0.500000")]
    assert first.endswith("-") is (key == "exit_fractions")
    assert any(line.startswith("  on 40 rows") for line in lines) is (key == "exit_fractions")


def test_exits_and_their_stages_are_tables(capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads(DEPTHS.to_json())
    costs = iter((0.0625, 0.25, 0.3125, 1.0))
    for stage in manifest["exit_cascade"]["exit_stages"]:
        stage["relative_cost"] = next(costs)
    manifest["exits"][0] |= {"parameters": 120, "multiply_adds": 200.0}
    manifest["exits"][0]["milliseconds"] = {"1": 0.25, "8": 0.5}
    manifest["exits"][-1] |= {"parameters": 6400, "multiply_adds": None}
    manifest["exits"][-1]["milliseconds"] = {"8": 24.0}
    del manifest["exits"][1]["parameters"]
    print_model({"path": "m", "versions": [], "manifest": manifest, "signatures": {}})
    out = capsys.readouterr().out
    table = out[out.index("exits,") : out.index("cascade by")].splitlines()
    assert [line.split() for line in table if line] == [
        ["exits,", "shallow", "to", "deep"],
        ["NAME", "PARAMETERS", "MULTIPLY-ADDS", "MS", "OF", "1", "MS", "OF", "8"],
        ["thumbnail", "120", "200", "0.25", "0.5"],
        ["conv3_out", "-", *table[3].split()[2:]],
        ["last", "6400", "-", "-", "24"],
    ]
    stages = out[out.index("cascade by margin") :].splitlines()[1:6]
    assert [line.split()[:4] + line.split()[-1:] for line in stages] == [
        ["EXIT", "DIM", "ABOVE", "TEMPERATURE", "COST"],
        ["thumbnail", "8", "0.500000", "1.5", "0.062"],
        ["conv3_out", "8", "0.250000", "1", "0.250"],
        ["conv3_out", "64", "0.125000", "1", "0.312"],
        ["last", "64", "-", "1", "1.000"],
    ]
    assert (
        "promised with delta 0.05: accuracy at most 0.01 below the last stage's; certified on "
        "2000 rows, 9 lost and 4 gained" in out
    )
