"""The golden messages of the contract: made by TensorFlow Serving's protos, read by both."""

import json
import re
import runpy
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf
from google.protobuf.message import Message
from tensorflow_serving.apis import get_model_status_pb2, predict_pb2

import keras_mrl_serving
from keras_mrl_serving import _wire_pb2 as wire
from keras_mrl_serving import classification, flows
from keras_mrl_serving._wire import from_proto, to_proto
from keras_mrl_serving.cascade.policy import CascadePolicy
from keras_mrl_serving.contract import Manifest

NEW = Path(__file__).with_name("golden")
OLD = NEW / "0.1.0"  # of models without model_id
FOLDERS = (NEW, OLD)
MANIFESTS = {folder: (folder / "manifest.json").read_text().strip() for folder in FOLDERS}
LATER = {
    path.stem.removesuffix("_manifest"): path.read_text() for path in NEW.glob("*_manifest.json")
}
MAKE = runpy.run_path(str(NEW / "make.py"))
MADE: dict[tuple[Path, str], Message] = {
    (folder, file): message
    for folder in FOLDERS
    for file, message in MAKE["messages"](folder).items()
}
KINDS: dict[str, tuple[Any, Any]] = {
    "PredictRequest": (wire.PredictRequest, predict_pb2.PredictRequest),
    "PredictResponse": (wire.PredictResponse, predict_pb2.PredictResponse),
    "GetModelStatusRequest": (
        wire.GetModelStatusRequest,
        get_model_status_pb2.GetModelStatusRequest,
    ),
    "GetModelStatusResponse": (
        wire.GetModelStatusResponse,
        get_model_status_pb2.GetModelStatusResponse,
    ),
}


def tables() -> tuple[list[list[str]], list[list[str]]]:
    """The rows of README's two tables, as cells without their backquotes."""
    rows = [
        [re.sub(r"^`(.*)`$", r"\1", cell.strip()) for cell in line.strip("|").split(" | ")]
        for line in (NEW / "README.md").read_text().splitlines()
        if line.startswith("| `")
    ]
    return [row for row in rows if len(row) == 3], [row for row in rows if len(row) == 6]


FILES, TENSORS = tables()
KIND_OF = {file: kind for file, kind, _ in FILES}
# Of models that 0.1.0 did not know: these are in the new folder alone.
ONLY_NEW = {
    "classify_adaptive_exits_request.bin",
    "classify_adaptive_exits_response.bin",
    "classify_conv3_out_8_request.bin",
    "classify_conv3_out_8_response.bin",
    "describe_depths_response.bin",
    "describe_sentences_response.bin",
    "embed_8_text_request.bin",
    "embed_8_text_response.bin",
    "retrieve_request.bin",
    "retrieve_response.bin",
    "embed_conv3_out_8_request.bin",
    "embed_conv3_out_8_response.bin",
    "classify_8_request.bin",
    "classify_8_response.bin",
    "describe_prices_response.bin",
    "describe_tags_response.bin",
    "regress_8_request.bin",
    "regress_8_response.bin",
}


def files_in(folder: Path) -> set[str]:
    return set(KIND_OF) if folder == NEW else set(KIND_OF) - ONLY_NEW


GOLDEN = [(folder, file) for folder in FOLDERS for file in sorted(files_in(folder))]


def named(value: Any) -> str | None:
    """The name of a folder or file in the name of a test."""
    return value.name if isinstance(value, Path) else None


@pytest.fixture(params=FOLDERS, ids=["new", "0.1.0"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def described_tensors(folder: Path) -> list[list[str]]:
    """The rows of the second table that hold in a folder."""
    there = files_in(folder)
    return [row for row in TENSORS if row[0] in there and (folder == NEW or row[1] != "model_id")]


def read(file: str, folder: Path = NEW) -> tuple[Any, Any]:
    """The message in `file`, as ours and as TensorFlow Serving's."""
    ours, theirs = KINDS[KIND_OF[file]]
    golden = (folder / file).read_bytes()
    return ours.FromString(golden), theirs.FromString(golden)


def tensors(message: Any) -> Any:
    return message.inputs if "inputs" in message.DESCRIPTOR.fields_by_name else message.outputs


def read_by_tensorflow(tensor: Any) -> npt.NDArray[Any]:
    """The array as TensorFlow's own kernels read it; they read both encodings of strings."""
    array = tf.io.parse_tensor(tensor.SerializeToString(), tf.as_dtype(tensor.dtype)).numpy()
    return np.asarray(array)


def array_in(cell: str, dtype: str, folder: Path) -> npt.NDArray[Any]:
    if match := re.search(r"`(\w*manifest.json)`", cell):
        return np.array([(folder / match[1]).read_bytes().strip()], object)
    if dtype == "DT_STRING":
        return np.vectorize(str.encode, otypes=[object])(np.array(json.loads(cell), object))
    return np.array(json.loads(cell), tf.as_dtype(wire.DataType.Value(dtype)).as_numpy_dtype)


def test_every_file_is_made_described_and_there(folder: Path) -> None:
    files = {path.name for path in folder.glob("*.bin")}
    assert files == {file for of, file in MADE if of == folder} == files_in(folder)
    assert len(FILES) == len(KIND_OF)
    described = {(file, name) for file, name, *_ in described_tensors(folder)}
    assert len(described) == len(described_tensors(folder))
    predicted = [file for file in files_in(folder) if KIND_OF[file].startswith("Predict")]
    assert described == {
        (file, name) for file in predicted for name in tensors(read(file, folder)[1])
    }


@pytest.mark.parametrize(("folder", "file"), GOLDEN, ids=named)
def test_made_anew_every_file_has_the_same_bytes(folder: Path, file: str) -> None:
    golden = (folder / file).read_bytes()
    made = MADE[folder, file]
    assert made.DESCRIPTOR.full_name == f"tensorflow.serving.{KIND_OF[file]}"
    assert MAKE["serialized"](made) == golden
    for message in read(file, folder):
        assert message.SerializeToString(deterministic=True) == golden


@pytest.mark.parametrize(
    ("folder", "file", "name", "dtype", "field", "shape", "cell"),
    [(folder, *row) for folder in FOLDERS for row in described_tensors(folder)],
    ids=lambda value: value.name if isinstance(value, Path) else value[:40],
)
def test_both_read_the_array_that_stands_in_the_table(
    folder: Path, file: str, name: str, dtype: str, field: str, shape: str, cell: str
) -> None:
    ours, theirs = (tensors(message)[name] for message in read(file, folder))
    expected = array_in(cell, dtype, folder)
    assert json.loads(shape) == list(expected.shape)
    for tensor in (ours, theirs):
        assert wire.DataType.Name(tensor.dtype) == dtype
        fields = {each.name for each, _ in tensor.ListFields()} - {"dtype", "tensor_shape"}
        assert fields == {field}
    for array in (from_proto(ours), read_by_tensorflow(theirs)):
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected, strict=True)


SPECS = [
    ("embed_8_request.bin", "digits", "embed_8", None, []),
    ("classify_adaptive_request.bin", "digits", "classify_adaptive", None, []),
    ("features_request.bin", "digits", "features", None, []),
    ("head_8_request.bin", "digits", "head_8", 3, ["class_ids", "logits", "model_id"]),
    ("search_request.bin", "digits-index", "search", None, []),
    ("describe_request.bin", "digits", "describe", None, []),
    ("embed_8_response.bin", "digits", "embed_8", 3, None),
    ("classify_adaptive_response_values.bin", "digits", "classify_adaptive", 3, None),
    ("classify_adaptive_response_content.bin", "digits", "classify_adaptive", 3, None),
    ("features_response.bin", "digits", "features", 3, None),
    ("features_response_short.bin", "digits", "features", 3, None),
    ("head_8_response.bin", "digits", "head_8", 3, None),
    ("search_response.bin", "digits-index", "search", 1, None),
    ("describe_response.bin", "digits", "describe", 3, None),
    ("classify_adaptive_exits_request.bin", "depths", "classify_adaptive", None, []),
    ("classify_adaptive_exits_response.bin", "depths", "classify_adaptive", 3, None),
    ("classify_conv3_out_8_request.bin", "depths", "classify_conv3_out_8", None, []),
    ("classify_conv3_out_8_response.bin", "depths", "classify_conv3_out_8", 3, None),
    ("embed_conv3_out_8_request.bin", "depths", "embed_conv3_out_8", None, []),
    ("embed_conv3_out_8_response.bin", "depths", "embed_conv3_out_8", 3, None),
    ("embed_8_text_request.bin", "sentences", "embed_8", None, []),
    ("embed_8_text_response.bin", "sentences", "embed_8", 3, None),
    ("retrieve_request.bin", "sentences", "retrieve", None, []),
    ("retrieve_response.bin", "sentences", "retrieve", 3, None),
    ("describe_sentences_response.bin", "sentences", "describe", 3, None),
    ("describe_depths_response.bin", "depths", "describe", 3, None),
    ("classify_8_request.bin", "tags", "classify_8", None, []),
    ("classify_8_response.bin", "tags", "classify_8", 3, None),
    ("describe_tags_response.bin", "tags", "describe", 3, None),
    ("regress_8_request.bin", "prices", "regress_8", None, []),
    ("regress_8_response.bin", "prices", "regress_8", 3, None),
    ("describe_prices_response.bin", "prices", "describe", 3, None),
]


@pytest.mark.parametrize(
    ("folder", "file", "model", "signature", "version", "outputs"),
    [(folder, *spec) for folder in FOLDERS for spec in SPECS if spec[0] in files_in(folder)],
    ids=named,
)
def test_each_names_the_model_signature_and_version(
    folder: Path,
    file: str,
    model: str,
    signature: str,
    version: int | None,
    outputs: list[str] | None,
) -> None:
    if outputs is not None and folder == OLD:
        outputs = [name for name in outputs if name != "model_id"]
    for message in read(file, folder):
        spec = message.model_spec
        assert (spec.name, spec.signature_name) == (model, signature)
        assert (spec.version.value if spec.HasField("version") else None) == version
        if outputs is not None:
            assert list(message.output_filter) == outputs


@pytest.mark.parametrize(
    ("folder", "file"), [pair for pair in GOLDEN if "_request" in pair[1]], ids=named
)
def test_a_client_of_ours_asks_in_the_same_bytes(folder: Path, file: str) -> None:
    ours, _ = read(file, folder)
    if KIND_OF[file] == "PredictRequest":
        for tensor in ours.inputs.values():
            tensor.CopyFrom(to_proto(from_proto(tensor)))
    assert ours.SerializeToString(deterministic=True) == (folder / file).read_bytes()


def test_the_status_is_the_one_described() -> None:
    for message in read("get_model_status_request.bin"):
        assert message.model_spec.name == "digits"
        assert not message.model_spec.HasField("version")
    states = {10: "START", 20: "LOADING", 30: "AVAILABLE", 40: "UNLOADING", 50: "END"}
    for message in read("get_model_status_response.bin"):
        statuses = [
            (status.version, states[status.state], status.status.error_code)
            for status in message.model_version_status
        ]
        assert statuses == [(4, "LOADING", 0), (3, "AVAILABLE", 0), (2, "END", 5), (1, "END", 0)]


def test_the_manifest_is_valid_and_of_this_model(folder: Path) -> None:
    schema = Path(keras_mrl_serving.__file__).parent / "manifest.schema.json"
    jsonschema.Draft202012Validator(json.loads(schema.read_text())).validate(
        json.loads(MANIFESTS[folder])
    )
    manifest = Manifest.from_json(MANIFESTS[folder])
    assert manifest.model_id == (None if folder == OLD else MAKE["MODEL_ID"])
    assert manifest.name == "digits"
    assert manifest.cascade is not None
    assert CascadePolicy.from_json(manifest.cascade).dims == manifest.dims == (8, 16)
    assert list(manifest.inputs) == ["image"]


def test_the_answer_follows_from_the_manifest_s_own_cascade() -> None:
    manifest = Manifest.from_json(MANIFESTS[NEW])
    assert manifest.cascade is not None
    first = CascadePolicy.from_json(manifest.cascade).stages[0]
    outputs = read("classify_adaptive_response_values.bin")[0].outputs
    confidence, dim = from_proto(outputs["confidence"]), from_proto(outputs["dim"])
    assert first.threshold is not None
    np.testing.assert_array_equal(confidence > first.threshold, dim == first.dim)
    np.testing.assert_array_equal(from_proto(outputs["probabilities"])[:, 0], confidence)


def test_a_cascade_over_exits_is_read_as_one() -> None:
    manifest = Manifest.from_json(LATER["depths"])
    assert manifest.exits is not None
    assert manifest.exit_names == ("thumbnail", "conv3_out", "last")
    assert manifest.cascade is None
    assert manifest.adaptive_cascade is not None
    policy = CascadePolicy.from_json(manifest.adaptive_cascade)
    assert policy.keys == (("thumbnail", 8), ("conv3_out", 8), (None, 16))
    outputs = read("classify_adaptive_exits_response.bin")[0].outputs
    exits, dims = from_proto(outputs["exit"]).tolist(), from_proto(outputs["dim"]).tolist()
    asked = [(name or "last", dim) for name, dim in policy.keys]
    assert {(manifest.exit_names[e], d) for e, d in zip(exits, dims, strict=True)} <= {*asked}


def asked_by_ours(name: str, flow_of: Any, file: str = "") -> Any:
    """The answer that our client makes of a golden response, after it sent the golden request."""
    manifest = Manifest.from_json(LATER[name])
    flow = flow_of(manifest)
    call = next(flow)
    file = file or call.signature
    request = read(f"{file}_request.bin")[0]
    assert {key: from_proto(tensor).tolist() for key, tensor in request.inputs.items()} == {
        key: from_proto(to_proto(array)).tolist() for key, array in call.inputs.items()
    }
    response = read(f"{file}_response.bin")[0]
    with pytest.raises(StopIteration) as done:
        flow.send({key: from_proto(tensor) for key, tensor in response.outputs.items()})
    return done.value.value


def test_several_labels_and_values_are_read_as_what_they_are() -> None:
    tags = asked_by_ours(
        "tags", lambda manifest: classification.classify(manifest, MAKE["IMAGES"], 8)
    )
    assert tags.above(0.5) == [("grün", "blue"), ()]
    prices = asked_by_ours("prices", lambda manifest: flows.regress(manifest, MAKE["IMAGES"], 8))
    np.testing.assert_array_equal(prices, [[-12.5, 3], [0.25, 1024]])


def test_exits_are_read_as_names_and_costs() -> None:
    images = MAKE["IMAGES"]
    adaptive = asked_by_ours(
        "depths", lambda m: classification.classify_adaptive(m, images), "classify_adaptive_exits"
    )
    costs = {("thumbnail", 8): 0.0625, ("conv3_out", 8): 0.3125, ("last", 16): 1.0625}
    assert len({row.exit for row in adaptive}) > 1
    for row in adaptive:
        assert row.relative_cost == costs[row.exit, row.dim]
    early = asked_by_ours("depths", lambda m: classification.classify(m, images, 8, "conv3_out"))
    assert {(row.exit, row.relative_cost) for row in early} == {("conv3_out", 0.25)}
    embedding = asked_by_ours("depths", lambda m: flows.embed(m, images, 8, exit="conv3_out"))
    assert embedding.shape == (2, 8)


def test_texts_are_sent_with_the_prompts_of_their_manifest() -> None:
    manifest = Manifest.from_json(LATER["sentences"])
    query = manifest.check_prompt("query")
    texts = [text.removeprefix(query) for text in MAKE["TEXTS"]]
    assert texts == ["grüne Wiesen", "🌱\0", ""]
    sent = [query + text for text in texts]
    embedding = asked_by_ours("sentences", lambda m: flows.embed(m, sent, 8), "embed_8_text")
    assert embedding.shape == (3, 8)
    neighbors = asked_by_ours("sentences", lambda m: flows.retrieve(m, sent))
    np.testing.assert_array_equal(neighbors.ids, [[7, 2**40], [0, 7], [11, 0]])
    assert manifest.prompt == manifest.check_prompt("passage")
