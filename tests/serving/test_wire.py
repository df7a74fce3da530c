"""Tensors on the wire, beside TensorFlow's own readers; and responses that cannot be read.

The readers are `tf.make_ndarray` and, behind `tf.io.parse_tensor`, the server's `FromProto`.
"""

import re
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tensorflow.core.framework import tensor_pb2

from keras_mrl_serving import _wire_pb2 as wire
from keras_mrl_serving._wire import decode, from_proto, signatures_of, to_proto
from keras_mrl_serving.calls import AskSignatures, AskStatus, Call, Envelope, Output, VersionStatus
from keras_mrl_serving.errors import ManifestError, ServerError

# The first call into TensorFlow takes longer than Hypothesis allows an example.
SHORT = settings(deadline=None, max_examples=30)

Array = npt.NDArray[Any]

NUMERIC = [
    *("float16", "float32", "float64", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64", "bool"),
]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
TEXTS = st.text(max_size=5)
BYTES = st.binary(max_size=5)
# Every repeated field of TensorProto: the dtypes it carries, and what it may hold. Integers reach
# past the narrow dtypes: TensorFlow keeps the low bits.
INT32 = st.integers(-(2**31), 2**31 - 1)
FIELDS = [
    ("float_val", ["DT_FLOAT"], st.floats(width=32)),
    ("double_val", ["DT_DOUBLE"], st.floats()),
    ("half_val", ["DT_HALF", "DT_BFLOAT16"], INT32),
    ("int_val", ["DT_INT8", "DT_INT16", "DT_INT32", "DT_UINT8", "DT_UINT16"], INT32),
    ("int64_val", ["DT_INT64"], st.integers(-(2**63), 2**63 - 1)),
    ("uint32_val", ["DT_UINT32"], st.integers(0, 2**32 - 1)),
    ("uint64_val", ["DT_UINT64"], st.integers(0, 2**64 - 1)),
    ("bool_val", ["DT_BOOL"], st.booleans()),
    ("string_val", ["DT_STRING"], BYTES),
]
FIELD_CASES = [(dtype, field, values) for field, dtypes, values in FIELDS for dtype in dtypes]


def arrays(dtype: str) -> st.SearchStrategy[Array]:
    return hnp.arrays(dtype, SHAPES)


def object_array(elements: Sequence[object], shape: tuple[int, ...]) -> Array:
    array = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(shape)


@st.composite
def string_arrays(draw: st.DrawFn, elements: st.SearchStrategy[bytes | str]) -> Array:
    shape = draw(SHAPES)
    count = int(np.prod(shape))
    return object_array(draw(st.lists(elements, min_size=count, max_size=count)), shape)


def tensor(dtype: str, shape: Sequence[int], **fields: Any) -> wire.TensorProto:
    dims = [wire.TensorShapeProto.Dim(size=size) for size in shape]
    return wire.TensorProto(
        dtype=dtype,
        tensor_shape=wire.TensorShapeProto(dim=dims),
        **fields,
    )


def theirs(proto: wire.TensorProto) -> Any:
    """The same bytes as TensorFlow's own message."""
    return tensor_pb2.TensorProto.FromString(proto.SerializeToString())


def ours(proto: Any) -> wire.TensorProto:
    return wire.TensorProto.FromString(proto.SerializeToString())


def read_by_cpp(proto: wire.TensorProto) -> Array:
    read = tf.io.parse_tensor(proto.SerializeToString(), tf.as_dtype(int(proto.dtype)))
    if proto.dtype == wire.DT_BFLOAT16:
        read = tf.cast(read, tf.float32)
    array = read.numpy()
    # A scalar comes back bare.
    return object_array([array], ()) if isinstance(array, bytes) else np.asarray(array)


def assert_same(received: Array, expected: Array) -> None:
    """Equal to the bit, so that the signs of zeros and the bits of NaN count too."""
    assert received.shape == expected.shape
    assert received.dtype == expected.dtype
    if received.dtype == object:
        assert received.tolist() == expected.tolist()
    else:
        assert received.tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", NUMERIC)
@SHORT
@given(data=st.data())
def test_tensorflow_reads_the_numbers_we_write(dtype: str, data: st.DataObject) -> None:
    array = data.draw(arrays(dtype))
    proto = to_proto(array)
    real = theirs(proto)
    assert {field.name for field, _ in proto.ListFields()} <= {
        *("dtype", "tensor_shape", "tensor_content")
    }
    assert proto.HasField("tensor_shape")
    assert real.tensor_content == proto.tensor_content == array.tobytes()
    assert tf.as_dtype(real.dtype).as_numpy_dtype == array.dtype
    assert_same(tf.make_ndarray(real), array)
    assert_same(read_by_cpp(proto), array)
    assert_same(from_proto(proto), array)


@SHORT
@given(array=string_arrays(BYTES | TEXTS))
def test_tensorflow_reads_the_strings_we_write(array: Array) -> None:
    encoded = [e.encode() if isinstance(e, str) else e for e in array.ravel().tolist()]
    proto = to_proto(array)
    assert list(theirs(proto).string_val) == encoded
    assert not proto.tensor_content
    assert_same(read_by_cpp(proto), object_array(encoded, array.shape))
    assert_same(from_proto(proto), object_array(encoded, array.shape))


@pytest.mark.parametrize("dtype", ["U5", "S5", np.dtypes.StringDType()])
@SHORT
@given(data=st.data())
def test_strings_of_every_numpy_dtype_travel(dtype: Any, data: st.DataObject) -> None:
    # NumPy's fixed-width strings end at their last character that is not zero.
    texts = st.text(st.characters(min_codepoint=1, max_codepoint=127), max_size=5)
    words = data.draw(st.lists(texts, min_size=4, max_size=4))
    array = np.array(words, dtype).reshape(2, 2)
    encoded = object_array([word.encode() for word in words], (2, 2))
    assert_same(from_proto(to_proto(array)), encoded)


@pytest.mark.parametrize("dtype", NUMERIC)
@SHORT
@given(data=st.data())
def test_we_read_the_numbers_tensorflow_writes(dtype: str, data: st.DataObject) -> None:
    array = data.draw(arrays(dtype))
    assert_same(from_proto(ours(tf.make_tensor_proto(array))), array)


@SHORT
@given(array=string_arrays(BYTES))
def test_we_read_the_strings_tensorflow_writes(array: Array) -> None:
    real = tf.make_tensor_proto(array, dtype=tf.string, shape=array.shape)
    assert_same(from_proto(ours(real)), array)


@pytest.mark.parametrize(("dtype", "field", "values"), FIELD_CASES)
@SHORT
@given(data=st.data())
def test_repeated_fields_read_as_tensorflow_reads_them(
    dtype: str, field: str, values: st.SearchStrategy[Any], data: st.DataObject
) -> None:
    # Of any length: fewer than the shape asks for, none, or more.
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=3))
    proto = tensor(dtype, shape, **{field: data.draw(st.lists(values, max_size=10))})
    assert_same(from_proto(proto), read_by_cpp(proto))


@pytest.mark.parametrize(
    ("given_values", "expected"),
    [([1.5, 2.5], [1.5, 2.5, 2.5]), ([], [0, 0, 0]), ([1, 2, 3, 4], [1, 2, 3])],
)
def test_repeated_fields_of_another_length(given_values: Any, expected: Any) -> None:
    received = from_proto(tensor("DT_FLOAT", (3,), float_val=given_values))
    assert_same(received, np.array(expected, "float32"))


@pytest.mark.parametrize(
    ("given_values", "expected"),
    [
        ([b"a", b"bc"], [b"a", b"bc", b"bc"]),
        ([b"a\0"], [b"a\0"] * 3),
        ([], [b""] * 3),
        ([b"a"] * 4, [b"a"] * 3),
    ],
)
def test_strings_of_another_length(given_values: Any, expected: Any) -> None:
    received = from_proto(tensor("DT_STRING", (3,), string_val=given_values))
    assert_same(received, object_array(expected, (3,)))


EVERY_HALF = np.arange(2**16, dtype="uint16")


@pytest.mark.parametrize("name", ["DT_HALF", "DT_BFLOAT16"])
def test_every_sixteen_bit_float_reads_the_same_in_both_encodings(name: str) -> None:
    as_content = tensor(name, (2**16,), tensor_content=EVERY_HALF.tobytes())
    as_field = tensor(name, (2**16,), half_val=EVERY_HALF.tolist())
    if name == "DT_HALF":
        expected = EVERY_HALF.view("float16")
    else:
        # ml_dtypes makes signalling NaNs quiet, so here any NaN will do.
        expected = EVERY_HALF.view(ml_dtypes.bfloat16).astype("float32")
    for proto in (as_content, as_field):
        received = from_proto(proto)
        assert received.dtype == expected.dtype
        np.testing.assert_array_equal(received, expected)
    assert_same(from_proto(as_content), from_proto(as_field))


@SHORT
@given(array=string_arrays(BYTES), long=st.sampled_from([0, 127, 128, 70000]))
def test_strings_in_tensor_content(array: Array, long: int) -> None:
    strings = [*array.ravel().tolist(), b"x" * long]
    content = b"".join(map(varint, map(len, strings))) + b"".join(strings)
    proto = tensor("DT_STRING", (len(strings), 1), tensor_content=content)
    received = from_proto(proto)
    assert_same(received, object_array(strings, (len(strings), 1)))
    assert_same(received, read_by_cpp(proto))


def varint(number: int) -> bytes:
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


BASE = np.arange(24, dtype="float64").reshape(2, 3, 4)
READ_ONLY = BASE.copy()
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    "array",
    [
        BASE.T,
        BASE[:, ::2, ::-1],
        np.asfortranarray(BASE),
        np.broadcast_to(BASE[0, 0], (3, 4)),
        READ_ONLY,
        BASE.astype(">f8"),
        BASE.astype(">f4").T,
        BASE.astype(">i2"),
        BASE[:0],
        np.float64(3.5),
        np.array(3.5),
        np.array(["blue", "green", "red"])[::-1],
        np.array(["blue", "green"], ">U5"),
        np.array("blue"),
    ],
    ids=str,
)
def test_any_layout_travels(array: Array) -> None:
    before = np.array(array)
    received = from_proto(to_proto(array))
    if array.dtype.kind == "U":
        received = np.char.decode(received.astype("S"))
    assert received.shape == array.shape
    np.testing.assert_array_equal(received, array)
    np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize(
    "proto",
    [
        to_proto(np.ones((2, 3), "float32")),
        to_proto(np.ones((2, 3), "float16")),
        to_proto(np.ones((2, 3), "bool")),
        to_proto(np.full((2, 3), "a")),
        tensor("DT_FLOAT", (2, 3), float_val=[1] * 6),
        tensor("DT_FLOAT", (2, 3), float_val=[1]),
        tensor("DT_FLOAT", (2, 3), float_val=[1] * 7),
        tensor("DT_INT32", (2, 3), int_val=[1] * 6),
        tensor("DT_BFLOAT16", (2, 3), half_val=[16256] * 6),
        tensor("DT_STRING", (2, 3), string_val=[b"a"] * 6),
    ],
    ids=lambda proto: wire.DataType.Name(proto.dtype),
)
def test_arrays_are_writable_and_their_own(proto: wire.TensorProto) -> None:
    first, before = from_proto(proto), proto.SerializeToString()
    copy = first.copy()
    first[...] = b"other" if first.dtype == object else 0
    assert not np.array_equal(first, copy)
    assert proto.SerializeToString() == before
    assert_same(from_proto(proto), copy)


LEGAL = "dtype must be float16 to float64, int8 to int64, uint8 to uint64, bool, bytes or str. "
CONVERT = "Convert the array first: array.astype('float32')."


@pytest.mark.parametrize(
    ("array", "received"),
    [
        (np.ones(1, "complex64"), "complex64"),
        (np.ones(1, "datetime64[s]"), "datetime64[s]"),
        (np.ones(1, "longdouble"), str(np.dtype("longdouble"))),
        (np.ones(1, ml_dtypes.bfloat16), "bfloat16"),
        (np.ones(1, ml_dtypes.int4), "int4"),
        (np.zeros(1, [("a", "i4")]), "[('a', '<i4')]"),
    ],
    ids=str,
)
def test_other_dtypes_are_refused(array: Array, received: str) -> None:
    text = f"{LEGAL}Received: dtype={received}. {CONVERT}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        to_proto(array)


@pytest.mark.parametrize(
    ("element", "name"), [(1, "int"), (None, "NoneType"), (bytearray(b"a"), "bytearray")]
)
def test_objects_that_are_no_strings_are_refused(element: object, name: str) -> None:
    text = (
        f"an object array must hold bytes and str only. Received: an element of type {name}. "
        "Give numbers a dtype of their own: array.astype('float32')."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        to_proto(object_array([b"a", element], (2,)))


@pytest.mark.parametrize(
    ("number", "name"),
    [(0, "DT_INVALID"), (8, "DT_COMPLEX64"), (24, "DT_FLOAT8_E5M2"), (101, "101"), (999, "999")],
)
def test_unknown_dtypes_are_refused(number: int, name: str) -> None:
    proto = wire.TensorProto()
    proto.MergeFromString(b"\x08" + varint(number))
    text = (
        "a tensor's dtype must be a float, integer, bool or string dtype that NumPy has, or "
        f"bfloat16. Received: dtype={name}. Cast the output in the exported signature: "
        "tf.cast(output, tf.float32)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        from_proto(proto)


DAMAGED = "The tensor is damaged: ask again, and if it stays so look at what the server runs."


@pytest.mark.parametrize("dtype", ["DT_FLOAT", "DT_STRING"])
@pytest.mark.parametrize(
    ("shape", "received"),
    [
        (wire.TensorShapeProto(unknown_rank=True), "an unknown rank"),
        (wire.TensorShapeProto(dim=[wire.TensorShapeProto.Dim(size=-1)]), "sizes (-1,)"),
    ],
)
def test_unknown_shapes_are_refused(
    dtype: str, shape: wire.TensorShapeProto, received: str
) -> None:
    proto = wire.TensorProto(dtype=dtype, tensor_shape=shape)
    text = f"a tensor's shape must be fully known. Received: {received}. {DAMAGED}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        from_proto(proto)


@pytest.mark.parametrize(
    ("dtype", "shape", "size", "due", "element"),
    [
        ("DT_FLOAT", (2, 3), 23, 24, 4),
        ("DT_FLOAT", (2, 3), 28, 24, 4),
        ("DT_BFLOAT16", (3,), 12, 6, 2),
        ("DT_HALF", (3,), 12, 6, 2),
        ("DT_BOOL", (), 2, 1, 1),
        ("DT_DOUBLE", (0,), 8, 0, 8),
    ],
)
def test_content_that_does_not_fit_its_shape_is_refused(
    dtype: str, shape: tuple[int, ...], size: int, due: int, element: int
) -> None:
    text = (
        f"tensor_content must hold {due} bytes: {element} for each element of shape {shape}. "
        f"Received: {size} bytes. {DAMAGED}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        from_proto(tensor(dtype, shape, tensor_content=bytes(size)))


@pytest.mark.parametrize(
    "content",
    [
        *(b"\x01", b"\x01\x02ab", b"\x01\x02abcd", b"\x80", b"\x01\x80", b"\xff" * 9),
        b"\x80" * 10 + b"\x00\x00",  # a length of eleven bytes
    ],
)
def test_string_content_that_does_not_fit_its_shape_is_refused(content: bytes) -> None:
    text = (
        "tensor_content must hold the lengths and the bytes of 2 strings, one for each element of "
        f"shape (2,). Received: {len(content)} bytes that are not that. {DAMAGED}"
    )
    proto = tensor("DT_STRING", (2,), tensor_content=content)
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        from_proto(proto)
    with pytest.raises(tf.errors.InvalidArgumentError):
        read_by_cpp(proto)


def test_the_dtypes_read_are_the_ones_tested_here() -> None:
    tested = {dtype for _, dtypes, _ in FIELDS for dtype in dtypes}
    assert {name for name in wire.DataType.keys() if is_read(name)} == tested


def is_read(dtype: str) -> bool:
    try:
        from_proto(wire.TensorProto(dtype=dtype))
    except ValueError:
        return False
    return True


def test_a_tensor_this_client_cannot_read_is_an_error_of_ours() -> None:
    strange = wire.PredictResponse()
    strange.outputs["manifest"].dtype = wire.DT_COMPLEX64
    envelope = Envelope("default", None, Call("describe", {}), 1.0, 1.0)
    with pytest.raises(ServerError) as caught:
        decode(envelope, strange.SerializeToString(), "host:8500")
    assert str(caught.value) == (
        "The server must answer without an error. Received: what this client cannot read from "
        "host:8500 for model 'default', signature 'describe', timeout 1 s: a tensor's dtype must "
        "be a float, integer, bool or string dtype that NumPy has, or bfloat16. Received: "
        "dtype=DT_COMPLEX64. Cast the output in the exported signature: tf.cast(output, "
        "tf.float32). Ask a model exported by keras_mrl_export.export_saved_model."
    )


# What a server may say, and what becomes of it before any array is made.


def call(**promised: Output) -> Envelope:
    inputs = {"x": np.zeros((3, 2), np.float32)}
    return Envelope("m", None, Call("embed_2", inputs, promised=promised), 1.0, 1.0)


def answer(**outputs: wire.TensorProto) -> bytes:
    response = wire.PredictResponse()
    response.model_spec.version.value = 7
    for name, proto in outputs.items():
        response.outputs[name].CopyFrom(proto)
    return response.SerializeToString()


LARGE = to_proto(np.zeros((2**14 + 1, 4), np.float32))  # an answer with it is not small


@pytest.mark.parametrize("others", [{}, {"large": LARGE}])
def test_an_output_that_was_not_asked_for_is_not_decoded(others: Any) -> None:
    unreadable = tensor("DT_COMPLEX64", (2**40,))
    asked = to_proto(np.ones((3, 2), np.float32))
    data = answer(y=asked, z=unreadable, **others)
    reply = decode(call(y=Output("float32", 2)), data, "host:8500")
    assert reply.version == 7
    assert list(reply.answer) == ["y"]
    assert reply.answer["y"].tolist() == [[1, 1]] * 3
    with pytest.raises(ServerError, match=r"DT_COMPLEX64|need"):
        decode(call(), data, "host:8500")


@pytest.mark.parametrize("others", [{}, {"large": LARGE}])
@pytest.mark.parametrize(
    ("proto", "received"),
    [
        (tensor("DT_FLOAT", (2**28,), float_val=[1]), "float32 (268435456,)"),
        (tensor("DT_FLOAT", (3, 2**60), float_val=[1]), "float32 (3, 1152921504606846976)"),
        (tensor("DT_STRING", (3, 2), string_val=[b"a"]), "object (3, 2)"),
        (tensor("DT_COMPLEX64", (3, 2)), "complex64 (3, 2)"),
    ],
)
def test_another_dtype_or_size_is_refused_before_it_is_decoded(
    proto: wire.TensorProto, received: str, others: Any
) -> None:
    with pytest.raises(ManifestError) as caught:
        decode(call(y=Output("float32", 2)), answer(y=proto, **others), "host:8500")
    assert caught.value.version == 7
    assert str(caught.value) == (
        "A signature must answer y float32 (rows, 2), with a row for each row sent. Received: "
        f"y {received}{', large' if others else ''} for 3 rows of signature 'embed_2'. "
        "Export the model again with keras_mrl_export.export_saved_model."
    )


def test_a_small_answer_does_not_become_a_large_array() -> None:
    repeated = answer(y=tensor("DT_FLOAT", (2**20,), float_val=[1]))
    assert decode(call(), repeated, "host:8500").answer["y"].sum() == 2**20  # TensorFlow's rule
    many = answer(y=tensor("DT_FLOAT", (2**20,), float_val=[1]), z=tensor("DT_BOOL", (2**19,)))
    most = 8 * len(many) + 2**22
    text = (
        f"an answer of {len(many)} bytes may become arrays of {most} bytes. Received: shapes that "
        f"need {2**22 + 2**19} bytes. Send every value, not only the first of equal ones, or fewer "
        "rows at once."
    )
    with pytest.raises(ServerError, match=re.escape(text)):
        decode(call(), many, "host:8500")


LABELS = Output("object", 2)
MANY_DIMS = wire.TensorShapeProto(dim=[wire.TensorShapeProto.Dim()] * 600)


@pytest.mark.parametrize(
    ("data", "promised", "text"),
    [
        (
            answer(y=tensor("DT_STRING", (3, 2), string_val=[b"a" * 2**17])),
            LABELS,
            "output 'y' must take at most 25600 bytes for shape (3, 2). Received: 131088 bytes.",
        ),
        (
            answer(y=tensor("DT_FLOAT", (3, 2), float_val=[1] * 2**15)),
            Output("float32", 2),
            "output 'y' must take at most 1096 bytes for shape (3, 2). Received: 131088 bytes.",
        ),
        (
            answer(y=tensor("DT_STRING", (3, 2), string_val=[b""] * 2**18)),
            Output("object", 2, string_bytes=None),
            "output 'y' must have at most 70 fields. Received: more.",
        ),
        (
            answer(y=wire.TensorProto(dtype=wire.DT_FLOAT, tensor_shape=MANY_DIMS), z=LARGE),
            Output("float32", 2),
            "a tensor's shape must have at most 32 sizes. Received: 1200 bytes of them.",
        ),
        (
            answer(y=tensor("DT_FLOAT", (1,) * 33)),
            Output("float32", 2),
            "a tensor must have at most 32 axes. Received: 33.",
        ),
        (
            b"\x0a\x04\x0a\x00\x12\x00" * 2**14,
            Output("float32", 2),
            "an answer must have at most 4096 fields. Received: more.",
        ),
        (
            b"\x0a\x84\x80\x08" + b"\x12\xfe\xff\x07" + bytes(2**17 - 2) + b"\x12\x00",
            LABELS,
            "an output must be one name and one tensor. Received: two.",
        ),
        (b"\x0b" * 2**17, LABELS, "a message must end where its last field does."),
        (b"\x0a" + b"\xff" * 2**17, LABELS, "a number of a message must have at most 10 bytes."),
        (b"\x08" * 2**17, LABELS, "a string or message must be bytes. Received: a number."),
    ],
)
def test_what_no_serializer_writes_is_refused(data: bytes, promised: Output, text: str) -> None:
    with pytest.raises(ServerError, match=re.escape(text)) as caught:
        decode(call(y=promised), data, "host:8500")
    assert "what this client cannot read from host:8500 for model 'm'" in str(caught.value)


def field_of(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | 2]) + varint(len(value)) + value


@pytest.mark.parametrize("field", [1, 2])
def test_a_large_tensor_has_one_dtype_and_one_shape(field: int) -> None:
    whole = tensor("DT_STRING", (3, 2), string_val=[b"a" * 2**16] * 6).SerializeToString()
    part = b"\x08\x07" if field == 1 else b"\x12\x04\x12\x02\x08\x03"
    data = field_of(1, field_of(1, b"y") + field_of(2, whole + part))
    promised = Output("object", 2, string_bytes=None)
    with pytest.raises(ServerError, match="output 'y' must be a dtype, a shape and values"):
        decode(call(y=promised), data, "host:8500")


@SHORT
@given(data=st.data())
def test_a_large_answer_is_read_as_a_small_one(data: st.DataObject) -> None:
    small = {
        dtype: data.draw(arrays(dtype)) for dtype in data.draw(st.sets(st.sampled_from(NUMERIC)))
    }
    small["text"] = data.draw(string_arrays(BYTES))
    protos = {name: to_proto(array) for name, array in small.items()}
    received = decode(call(), answer(**protos, large=LARGE), "host:8500").answer
    for name, array in decode(call(), answer(**protos), "host:8500").answer.items():
        assert_same(received[name], array)
        assert_same(array, small[name])


def test_what_is_no_message_is_an_error_of_ours() -> None:
    for request in (Call("x", {}), AskSignatures(), AskStatus()):
        envelope = Envelope("m", None, request, 1.0, 1.0)
        with pytest.raises(ServerError, match="what this client cannot read from host:8500"):
            decode(envelope, b"\xff\xff", "host:8500")


def test_a_state_or_a_dtype_newer_than_this_client_is_no_error() -> None:
    status = wire.GetModelStatusResponse.FromString(b"\x0a\x04\x08\x01\x10\x63")
    envelope = Envelope("m", None, AskStatus(), 1.0, 1.0)
    reply = decode(envelope, status.SerializeToString(), "host:8500")
    assert reply.answer == (VersionStatus(1, "UNKNOWN"),)
    info = wire.TensorInfo.FromString(b"\x10\x63")
    signatures = {"s": wire.SignatureDef(outputs={"y": info})}
    assert signatures_of(signatures)["s"].outputs["y"]["dtype"] == "99"


@pytest.mark.parametrize("request_", [AskSignatures(), AskStatus()])
@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\x0a\x00" * 60_000, "the message must have at most 50000 fields. Received: more."),
        (b"\x7a\x80\x80\x80\x01" + bytes(2**21), "must have at most 2097152 bytes."),
    ],
)
def test_what_is_said_of_models_is_bounded(request_: Any, data: bytes, text: str) -> None:
    with pytest.raises(ServerError, match=re.escape(text)):
        decode(Envelope("m", None, request_, 1.0, 1.0), data, "host:8500")
