"""SavedModels read without TensorFlow (tests/cli/test_inspect.py reads a real one); versions."""

import os
import random
import re
from pathlib import Path

import pytest

from keras_mrl_serving import Manifest, ManifestError
from keras_mrl_serving import _wire_pb2 as wire
from keras_mrl_serving.contract import MANIFEST_FILE
from keras_mrl_serving.saved_model import (
    list_versions,
    read_manifest,
    read_signatures,
    sizes,
    version_number,
)
from tests.helpers.hostile_files import fuzzed, read_in_process

SOAK = bool(os.environ.get("KERAS_MRL_SOAK"))

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


def test_a_dtype_that_is_newer_is_a_number(tmp_path: Path) -> None:
    graph = wire.MetaGraphDef()
    graph.signature_def["serving_default"].inputs["x"].dtype = 101  # type: ignore[assignment]
    saved = wire.SavedModel(meta_graphs=[graph])
    (tmp_path / "saved_model.pb").write_bytes(saved.SerializeToString())
    assert read_signatures(tmp_path)["serving_default"].inputs["x"]["dtype"] == "101"


def test_a_graph_without_signatures_has_none(tmp_path: Path) -> None:
    saved = wire.SavedModel(meta_graphs=[wire.MetaGraphDef()])
    (tmp_path / "saved_model.pb").write_bytes(saved.SerializeToString())
    assert read_signatures(tmp_path) == {}


@pytest.mark.parametrize("name", ["saved_model.pb", MANIFEST_FILE])
def test_files_of_a_version_are_regular_ones_of_its_folder(name: str, tmp_path: Path) -> None:
    reads = read_manifest if name == MANIFEST_FILE else read_signatures
    (tmp_path / "passwords").write_text("secret")
    file = tmp_path / "1" / name
    file.parent.mkdir(parents=True)
    for target, why in (
        ("/dev/zero", "a link out of its folder"),
        (tmp_path / "passwords", "a link out of its folder"),
        ("pipe", "a FIFO, not a regular file"),
    ):
        file.unlink(missing_ok=True)
        file.symlink_to(target)
        if target == "pipe":
            os.mkfifo(file.parent / "pipe")
        with pytest.raises(ManifestError, match=re.escape(f"Received: {file}")) as caught:
            reads(tmp_path / "1")
        assert why in str(caught.value)
        assert "secret" not in str(caught.value)


def test_a_manifest_is_short(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).parent.mkdir()
    with open(tmp_path / MANIFEST_FILE, "wb") as file:
        file.truncate(2**40)  # a hole: no disk is used
    with pytest.raises(ManifestError) as caught:
        read_manifest(tmp_path)
    assert str(caught.value) == (
        "A manifest is a file of the version, no longer than 1,048,576 bytes. "
        f"Received: {tmp_path / MANIFEST_FILE}, 1,099,511,627,776 bytes, more than 1,048,576. "
        "Copy the version again, or export it again."
    )


READER = """
from pathlib import Path
from keras_mrl_serving.saved_model import ManifestError, read_manifest, read_signatures
refusals = (ManifestError,)
def read(path):
    read_manifest(path)
    read_signatures(path)
"""


@pytest.mark.soak
def test_hostile_versions_take_little_memory(tmp_path: Path) -> None:
    """100 damaged graphs, and 3,000 in `make soak`; and 3 MB of what is smallest and many."""
    graph = wire.MetaGraphDef()
    for dim in (8, 16):
        graph.signature_def[f"embed_{dim}"].inputs["x"].tensor_shape.dim.add(size=-1)
    whole = wire.SavedModel(meta_graphs=[graph]).SerializeToString()
    chance = random.Random(0)
    graphs = [fuzzed(whole, chance) for _ in range(3000 if SOAK else 100)]
    entry = b"\x2a\x04\x0a\x02%c%c"  # a signature of two letters
    many = b"".join(entry % (n % 251, n // 251) for n in range(251 * 250))
    graphs += [b"\x12\x00" * 1_500_000, b"\x12" + varint(8 * len(many)) + 8 * many]
    versions = []
    for number, data in enumerate(graphs):
        versions.append(tmp_path / str(number))
        versions[-1].mkdir()
        (versions[-1] / "saved_model.pb").write_bytes(data)
    results, peak = read_in_process(READER, versions)
    assert [result for result in results if result.startswith("RAISED")] == []
    assert peak <= 300


def varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_signatures(tmp_path)
    unknown = wire.SavedModel(saved_model_schema_version=1).SerializeToString()
    for data, why in (
        (b"\xff\xff\xff", r"Error parsing message .*"),
        (b"", "it holds no graph"),
        (unknown, "it holds no graph"),
    ):
        file = tmp_path / "saved_model.pb"
        file.write_bytes(data)
        rule = "saved_model.pb must be a SavedModel as TensorFlow writes it."
        remedy = "Copy the version again, or export it again."
        text = rf"{re.escape(rule)} Received: {re.escape(str(file))} \({why}\)\. {remedy}"
        with pytest.raises(ManifestError) as caught:
            read_signatures(tmp_path)
        assert re.fullmatch(text, str(caught.value))


def test_sizes_are_those_of_all_files_below(tmp_path: Path) -> None:
    (tmp_path / "saved_model.pb").write_bytes(b"123")
    (tmp_path / "variables" / "deep").mkdir(parents=True)
    (tmp_path / "variables" / "index").write_bytes(b"12")
    (tmp_path / "variables" / "deep" / "data").write_bytes(b"1234")
    (tmp_path / "assets").mkdir()
    assert sizes(tmp_path) == {"assets": 0, "saved_model.pb": 3, "variables": 6}


# Folders of versions: one rule, of the server, the export and inspect.


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("1", 1),
        ("00000123", 123),
        ("+7", 7),
        ("-7", -7),
        (" 7\t", 7),
        ("9223372036854775807", 2**63 - 1),
        ("9223372036854775808", None),
        ("-9223372036854775809", None),
        ("", None),
        ("1.0", None),
        ("1_000", None),
        ("0x10", None),
        ("1 2", None),
        ("- 1", None),
        ("v1", None),
        ("1.tmp", None),
        ("٣", None),
    ],
)
def test_which_names_are_versions(name: str, number: int | None) -> None:
    assert version_number(name) == number


def test_of_one_number_twice_the_later_name_counts_and_files_count_too(tmp_path: Path) -> None:
    for name in ("7", "007", "10", "copying-11"):
        (tmp_path / name).mkdir()
    (tmp_path / "9").touch()
    expected = {7: str(tmp_path / "7"), 9: str(tmp_path / "9"), 10: str(tmp_path / "10")}
    assert list_versions(str(tmp_path)) == expected
    assert list(list_versions(str(tmp_path))) == [7, 9, 10]
