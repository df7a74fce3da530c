"""Our messages beside tensorflow-serving-api's: the same fields, the same bytes."""

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.wrappers_pb2 import Int64Value
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
    predict_pb2,
)

from keras_mrl_serving import _wire_pb2 as wire
from keras_mrl_serving._wire import from_proto, to_proto

SHORT = settings(deadline=None, max_examples=50)
PROTO = Path(wire.__file__).with_name("_wire.proto")

# The messages on the wire; SignatureDefMap, which is there inside an Any; and saved_model.pb.
PAIRS: list[tuple[type[Message], Any]] = [
    (wire.PredictRequest, predict_pb2.PredictRequest),
    (wire.PredictResponse, predict_pb2.PredictResponse),
    (wire.GetModelMetadataRequest, get_model_metadata_pb2.GetModelMetadataRequest),
    (wire.GetModelMetadataResponse, get_model_metadata_pb2.GetModelMetadataResponse),
    (wire.SignatureDefMap, get_model_metadata_pb2.SignatureDefMap),
    (wire.GetModelStatusRequest, get_model_status_pb2.GetModelStatusRequest),
    (wire.GetModelStatusResponse, get_model_status_pb2.GetModelStatusResponse),
    (wire.SavedModel, saved_model_pb2.SavedModel),
]
# Names that our enums may lack.
LEFT_OUT_NAMES = re.compile(r".*_REF|DO_NOT_USE_.*")


def pairs_below(ours: Any, theirs: Any) -> Iterator[tuple[Descriptor, Descriptor]]:
    """Every message type of ours that `ours` reaches, beside TensorFlow's."""
    pairs, seen = [(ours, theirs)], set()
    while pairs:
        our, their = pairs.pop()
        if our.full_name in seen or our.file.package == "google.protobuf":
            continue
        seen.add(our.full_name)
        yield our, their
        for field in our.fields:
            other = their.fields_by_number.get(field.number)
            if field.message_type is not None and other is not None and other.message_type:
                pairs.append((field.message_type, other.message_type))


MESSAGES = {
    ours.full_name: (ours, theirs)
    for root, real in PAIRS
    for ours, theirs in pairs_below(root.DESCRIPTOR, real.DESCRIPTOR)
}


def properties(field: FieldDescriptor) -> dict[str, object]:
    """Everything about a field that shows in its bytes, its JSON or its Python attribute."""
    kind = field.message_type or field.enum_type
    return {
        "name": field.name,
        "number": field.number,
        "type": field.type,
        "type_name": kind and kind.name,
        "repeated": field.is_repeated,
        "required": field.is_required,
        "json_name": field.json_name,
        "oneof": field.containing_oneof and field.containing_oneof.name,
        "presence": field.has_presence,
        "packed": field.is_packed,
        "map_entry": bool(field.message_type and field.message_type.GetOptions().map_entry),
    }


@pytest.mark.parametrize("name", sorted(MESSAGES))
def test_every_field_is_theirs(name: str) -> None:
    ours, theirs = MESSAGES[name]
    assert ours.name == theirs.name
    assert ours.fields
    for field in ours.fields:
        assert field.number in theirs.fields_by_number, field.full_name
        assert properties(field) == properties(theirs.fields_by_number[field.number])


def test_well_known_types_are_the_very_same() -> None:
    shared = {
        field.message_type
        for ours, _ in MESSAGES.values()
        for field in ours.fields
        if field.message_type and field.message_type.file.package == "google.protobuf"
    }
    assert {kind.full_name for kind in shared} == {
        "google.protobuf.Any",
        "google.protobuf.Int64Value",
    }
    for ours, theirs in MESSAGES.values():
        for field in ours.fields:
            if field.message_type in shared:
                assert field.message_type is theirs.fields_by_number[field.number].message_type


def enums() -> dict[str, tuple[EnumDescriptor, Any]]:
    return {
        field.enum_type.full_name: (
            field.enum_type,
            theirs.fields_by_number[field.number].enum_type,
        )
        for ours, theirs in MESSAGES.values()
        for field in ours.fields
        if field.enum_type
    }


@pytest.mark.parametrize("name", ["DataType", "ModelVersionStatus.State", "StatusProto.Code"])
def test_every_enum_value_is_theirs(name: str) -> None:
    ours, theirs = enums()[f"keras_mrl.wire.{name}"]
    expected = {v.name: v.number for v in theirs.values if not LEFT_OUT_NAMES.fullmatch(v.name)}
    assert {v.name: v.number for v in ours.values} == expected


def test_the_walk_misses_nothing() -> None:
    def below(kinds: list[Descriptor]) -> Iterator[Descriptor]:
        for kind in kinds:
            yield kind
            yield from below(list(kind.nested_types))

    file = wire.DESCRIPTOR
    declared = list(below(list(file.message_types_by_name.values())))
    assert {kind.full_name for kind in declared} == set(MESSAGES)
    nested = {enum.full_name for kind in declared for enum in kind.enum_types}
    assert nested | {e.full_name for e in file.enum_types_by_name.values()} == set(enums())


def test_the_generated_module_is_of_this_proto() -> None:
    # Without protoc at hand: every name and number written in the file, beside every one loaded.
    code = re.sub(r"//.*", "", PROTO.read_text())
    written = sorted(re.findall(r"(\w+) = (\d+)\s*[;\[]", code))
    loaded = [
        (field.name, str(field.number))
        for ours, _ in MESSAGES.values()
        for field in ours.fields
        if not ours.GetOptions().map_entry
    ]
    loaded += [(v.name, str(v.number)) for ours, _ in enums().values() for v in ours.values]
    assert sorted(loaded) == written


def test_the_generated_module_runs_on_the_oldest_protobuf_we_allow() -> None:
    source = Path(wire.__file__).read_text()
    version = re.search(r"^# Protobuf Python Version: (\d+)\.(\d+)\.(\d+)$", source, re.MULTILINE)
    assert version is not None
    assert tuple(map(int, version.groups())) <= (6, 31, 1)


NAMES = st.text(max_size=6)
INT64 = st.integers(-(2**63), 2**63 - 1)
TENSORS = st.lists(st.floats(width=32, allow_nan=False), max_size=4).map(
    lambda values: to_proto(np.array(values, "float32"))
)
SPECS = st.builds(
    lambda choice, **names: wire.ModelSpec(**choice, **names),
    st.just({})
    | st.builds(lambda number: {"version": Int64Value(value=number)}, INT64)
    | st.builds(lambda label: {"version_label": label}, NAMES),
    name=NAMES,
    signature_name=NAMES,
)
SHAPES = st.builds(
    lambda sizes, unknown: wire.TensorShapeProto(
        dim=[wire.TensorShapeProto.Dim(size=size, name=name) for size, name in sizes],
        unknown_rank=unknown,
    ),
    st.lists(st.tuples(INT64, NAMES), max_size=3),
    st.booleans(),
)
INFOS = st.builds(
    wire.TensorInfo,
    name=NAMES,
    dtype=st.sampled_from(wire.DataType.values()),
    tensor_shape=SHAPES,
)
SIGNATURES = st.builds(
    wire.SignatureDef,
    inputs=st.dictionaries(NAMES, INFOS, max_size=2),
    outputs=st.dictionaries(NAMES, INFOS, max_size=2),
    method_name=NAMES,
    defaults=st.dictionaries(NAMES, TENSORS, max_size=2),
)
STATUSES = st.builds(
    wire.ModelVersionStatus,
    version=INT64,
    state=st.sampled_from(wire.ModelVersionStatus.State.values()),
    status=st.builds(
        wire.StatusProto,
        error_code=st.sampled_from(wire.StatusProto.Code.values()),
        error_message=NAMES,
    ),
)
EXAMPLES: dict[type[Message], st.SearchStrategy[Any]] = {
    wire.PredictRequest: st.builds(
        wire.PredictRequest,
        model_spec=SPECS,
        inputs=st.dictionaries(NAMES, TENSORS, max_size=3),
        output_filter=st.lists(NAMES, max_size=3),
    ),
    wire.PredictResponse: st.builds(
        wire.PredictResponse,
        model_spec=SPECS,
        outputs=st.dictionaries(NAMES, TENSORS, max_size=3),
    ),
    wire.GetModelMetadataRequest: st.builds(
        wire.GetModelMetadataRequest, model_spec=SPECS, metadata_field=st.lists(NAMES, max_size=2)
    ),
    wire.GetModelMetadataResponse: st.builds(wire.GetModelMetadataResponse, model_spec=SPECS),
    wire.SignatureDefMap: st.builds(
        wire.SignatureDefMap, signature_def=st.dictionaries(NAMES, SIGNATURES, max_size=2)
    ),
    wire.GetModelStatusRequest: st.builds(wire.GetModelStatusRequest, model_spec=SPECS),
    wire.GetModelStatusResponse: st.builds(
        wire.GetModelStatusResponse, model_version_status=st.lists(STATUSES, max_size=3)
    ),
    wire.SavedModel: st.builds(
        wire.SavedModel,
        saved_model_schema_version=st.integers(0, 9),
        meta_graphs=st.lists(
            st.builds(
                wire.MetaGraphDef, signature_def=st.dictionaries(NAMES, SIGNATURES, max_size=2)
            ),
            max_size=2,
        ),
    ),
}


def plain(message: Message) -> dict[str, object]:
    """Every field that is set, by name, as plain Python."""
    return {field.name: plain_value(field, value) for field, value in message.ListFields()}


def plain_value(field: FieldDescriptor, value: Any) -> object:
    if field.message_type is None:
        return value if isinstance(value, str | bytes | int | float) else list(value)
    if field.message_type.GetOptions().map_entry:
        return {key: plain(entry) for key, entry in value.items()}
    return plain(value) if isinstance(value, Message) else [plain(item) for item in value]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS, ids=lambda kind: kind.__name__)
@SHORT
@given(data=st.data())
def test_messages_cross_both_ways(
    ours: type[Message], theirs: type[Message], data: st.DataObject
) -> None:
    message = data.draw(EXAMPLES[ours])
    real = theirs.FromString(message.SerializeToString())
    assert plain(real) == plain(message)
    assert not real.SerializeToString() or plain(real)
    assert ours.FromString(real.SerializeToString()) == message
    assert real.SerializeToString(deterministic=True) == message.SerializeToString(
        deterministic=True
    )


def test_version_zero_is_a_version_and_none_is_the_latest() -> None:
    zero = wire.ModelSpec(name="m", version=Int64Value(value=0))
    latest = wire.ModelSpec(name="m")
    assert model_pb2.ModelSpec.FromString(zero.SerializeToString()).HasField("version")
    assert not model_pb2.ModelSpec.FromString(latest.SerializeToString()).HasField("version")


def test_unknown_fields_are_kept() -> None:
    real = predict_pb2.PredictRequest(client_id=b"someone", output_filter=["y"])
    mine = wire.PredictRequest.FromString(real.SerializeToString())
    assert list(mine.output_filter) == ["y"]
    assert mine.SerializeToString() == real.SerializeToString()


def test_signatures_are_parsed_from_the_value_of_the_any() -> None:
    real = get_model_metadata_pb2.GetModelMetadataResponse()
    signatures = get_model_metadata_pb2.SignatureDefMap()
    signatures.signature_def["embed_8"].inputs["x"].dtype = tf.float32.as_datatype_enum
    real.metadata["signature_def"].Pack(signatures)
    packed = wire.GetModelMetadataResponse.FromString(real.SerializeToString()).metadata[
        "signature_def"
    ]
    parsed = wire.SignatureDefMap()
    assert not packed.Unpack(parsed)
    parsed.ParseFromString(packed.value)
    assert parsed.signature_def["embed_8"].inputs["x"].dtype == wire.DT_FLOAT
