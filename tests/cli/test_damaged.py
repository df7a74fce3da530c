"""Models whose files are damaged: `inspect`, `deploy` and `serve` refuse them in a sentence."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from keras_mrl_cli.inspecting import text
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.errors import ManifestError
from tests.cli.conftest import KERAS_MRL, Exported
from tests.cli.test_main import refusal, run
from tests.serving.test_manifest_damaged import VALUES, changed, places

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
    return [["inspect", base_path], ["deploy", out, "--model-base-path", base_path]]


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
    key: str, value: Any, rule: str, version: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = version / "assets.extra" / "keras_mrl.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    for command in commands(version):
        assert refusal(command, 1, capsys) == f"{rule} {AGAIN}"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "JSONDecodeError"),
        (b"\xff\xfe\xff", "UnicodeDecodeError"),
        (b"[]", "TypeError"),
        (b'{"name": "m"}', "KeyError"),
        (b"[" * 100_000, "RecursionError"),
    ],
)
def test_what_is_no_manifest(
    data: bytes, why: str, version: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (version / "assets.extra" / "keras_mrl.json").write_bytes(data)
    for command in commands(version):
        said = refusal(command, 1, capsys)
        assert said.startswith("A manifest is a JSON object with a schema. Received: b")
        assert f" ({why}: " in said
        assert said.endswith(AGAIN)


@pytest.mark.parametrize(
    ("data", "why"),
    [(b"", "it holds no graph"), (b"no model", "Error parsing message"), (b"\x08\x01", "no graph")],
)
def test_what_is_no_saved_model(
    data: bytes, why: str, version: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = version / "saved_model.pb"
    file.write_bytes(data)
    for command in commands(version):
        said = refusal(command, 1, capsys)
        rule = "saved_model.pb must be a SavedModel as TensorFlow writes it."
        assert said.startswith(f"{rule} Received: {file} (")
        assert why in said
        assert said.endswith("). Copy the version again, or export it again.")
    assert not (version.parents[1] / "out").exists()


def test_serve_refuses_it_too(version: Path) -> None:
    (version / "saved_model.pb").write_bytes(b"")
    status, out, err = run(
        version, [*KERAS_MRL, "serve", "--dev", f"--model_base_path={version.parent}"]
    )
    assert (status, out) == (1, "")
    assert "keras-mrl: The highest version must load. Received: version 1 of model default, " in err
    assert "Traceback" not in err


def test_what_is_read_is_shown(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    whole = json.loads((exported.base_path / "1/assets.extra/keras_mrl.json").read_text())
    shown = 0
    for place in places(whole):
        for value in VALUES:
            try:
                manifest = Manifest.from_json(json.dumps(changed(whole, place, value)))
            except ManifestError:
                continue
            written = json.loads(manifest.to_json())
            text.show({"path": "m", "versions": [], "manifest": written, "signatures": {}})
            assert capsys.readouterr().out.startswith("m: ")
            shown += 1
    assert shown > 100


@pytest.mark.parametrize("key", ["holdout_size", "accuracy", "expected_dim", "exit_fractions"])
def test_a_cascade_whose_report_is_cut_is_shown(
    key: str, exported: Exported, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = json.loads((exported.base_path / "1/assets.extra/keras_mrl.json").read_text())
    del whole["cascade"][key]
    text.show({"path": "m", "versions": [], "manifest": whole, "signatures": {}})
    lines = capsys.readouterr().out.splitlines()
    (first,) = [line for line in lines if line.startswith("    2   0.500000")]
    assert first.endswith("-") is (key == "exit_fractions")
    assert any(line.startswith("  on 40 rows") for line in lines) is (key == "exit_fractions")
