"""Arrays as TensorProtos in both encodings, read back by TensorFlow itself."""

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from google.protobuf import text_format
from hypothesis import example, given
from hypothesis import strategies as st
from tensorflow.core.framework.tensor_pb2 import TensorProto

from keras_mrl_serving import _wire_pb2
from keras_mrl_serving._wire import from_proto
from keras_mrl_serving.server.tensors import decode, encode

DTYPES = (
    "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16",
    "uint32", "uint64", "bool", "complex64", "complex128", ml_dtypes.bfloat16,
)  # fmt: skip
TEXTS = [b"", b"ends in zero\0", b"x" * 300, "grün".encode()]


def content(array: np.ndarray) -> TensorProto:
    proto = TensorProto()
    encode(array, proto, as_tensor_content=True)
    return proto


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (0, 4)])
def test_numbers(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape)
    proto = content(array)
    assert proto.HasField("tensor_shape")
    assert [dim.size for dim in proto.tensor_shape.dim] == list(shape)
    assert proto.tensor_content == array.tobytes()
    assert len(proto.ListFields()) == 2 + bool(array.size)  # dtype and shape besides
    back = decode(proto)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(back, array)


def test_the_rows_of_a_transposed_array() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    np.testing.assert_array_equal(decode(content(array)), array)


@pytest.mark.parametrize("texts", [TEXTS[1], TEXTS, [TEXTS, TEXTS[::-1]], []])
def test_strings(texts: Any) -> None:
    array = np.empty(np.shape(texts), object)
    array[...] = texts
    proto = content(array)
    assert not proto.string_val
    assert decode(proto).tolist() == texts
    # Our client reads it as well.
    wire = _wire_pb2.TensorProto.FromString(proto.SerializeToString())
    assert from_proto(wire).tolist() == texts


def test_the_lengths_of_strings_stand_before_them() -> None:
    assert content(np.array([b"ab", b"", b"c"], object)).tensor_content == b"\x02\x00\x01abc"


def test_by_default_values_stand_in_their_field() -> None:
    proto = TensorProto()
    encode(np.ones(2, np.float32), proto)
    assert list(proto.float_val) == [1, 1]
    assert not proto.tensor_content


def test_a_dtype_of_half_a_byte_takes_one() -> None:
    proto = content(np.array([1, 7], ml_dtypes.int4))
    assert (proto.dtype, proto.tensor_content) == (tf.as_dtype("int4").as_datatype_enum, b"\1\7")


@pytest.mark.parametrize("dtype", ["DT_VARIANT", "DT_RESOURCE", "DT_FLOAT_REF", "DT_INVALID"])
def test_objects_of_the_runtime_are_no_inputs(dtype: str) -> None:
    text = f"""dtype: {dtype} tensor_shape {{}} variant_val {{ type_name: "tensorflow::Tensor" }}
               resource_handle_val {{ name: "weights" }}"""
    with pytest.raises(ValueError, match=r"^$"):
        decode(text_format.Parse(text, TensorProto()))


@pytest.mark.parametrize(
    "text",
    [
        "dtype: DT_FLOAT tensor_shape { dim { size: 4611686018427387904 } }",
        "dtype: DT_FLOAT float_val: 1 tensor_shape { dim { size: 9999999 } dim { size: 4 } }",
        # No element, but one row of zeros for each index of the first axis.
        "dtype: DT_FLOAT tensor_shape { dim { size: 1099511627776 } dim {} }",
        'dtype: DT_STRING string_val: "a" tensor_shape { dim { size: 1099511627776 } }',
        'dtype: DT_STRING string_val: "" tensor_shape { dim { size: 1500000 } }',
        f'dtype: DT_STRING string_val: "{"a" * 1000}" tensor_shape {{ dim {{ size: 20000 }} }}',
    ],
)
def test_a_few_bytes_are_no_large_tensor(text: str) -> None:
    with pytest.raises(ValueError, match=r"^$"):
        decode(text_format.Parse(text, TensorProto()))


def test_many_strings_that_are_sent_are_no_repetition() -> None:
    texts = np.full(400_000, b"", object)
    assert len(decode(content(texts))) == len(texts)
    listed = TensorProto()
    encode(texts, listed)
    assert len(decode(listed)) == len(texts)


NUMBERS = (1, 2, 3, 4, 6, 9, 10, 14, 17, 19, 23)  # DataType of most of DTYPES, and of others
SIZES = st.one_of(st.integers(-2, 4), st.sampled_from([2**31, 2**62]))


@given(
    number=st.sampled_from(NUMBERS),
    sizes=st.lists(SIZES, max_size=4) | st.lists(st.just(1), min_size=8, max_size=12),
    surplus=st.sampled_from([0, 0, 0, -1, 1, 8]),
    unknown=st.sampled_from([False, False, False, True]),
    listed=st.booleans(),
)
@example(number=1, sizes=[-1, -2], surplus=0, unknown=False, listed=False)
def test_bytes_are_read_as_the_runtime_reads_them(
    number: int, sizes: list[int], surplus: int, unknown: bool, listed: bool
) -> None:
    """`decode` reads plain bytes by itself; it leaves the others to the runtime, as this test."""
    itemsize = tf.as_dtype(number).size
    length = max(0, min(math.prod(sizes), 300) * itemsize + surplus)
    proto = TensorProto(dtype=number, tensor_content=bytes(i % 251 for i in range(length)))
    proto.tensor_shape.unknown_rank = unknown
    for size in sizes:
        proto.tensor_shape.dim.add(size=size)
    if listed:  # which the bytes take precedence over
        proto.float_val.append(7)
        proto.int_val.append(7)
    data, dtype = proto.SerializeToString(), tf.as_dtype(number)
    try:
        if math.prod(abs(size) or 1 for size in sizes) > 2**20:  # refused: too many to make up
            raise tf.errors.InvalidArgumentError(None, None, "")
        expected = tf.raw_ops.ParseTensor(serialized=data, out_type=dtype).numpy()
    except tf.errors.OpError:
        with pytest.raises(ValueError, match=r"^$"):
            decode(proto)
        return
    actual = decode(proto)
    assert (actual.dtype, actual.shape) == (np.asarray(expected).dtype, np.shape(expected))
    assert actual.tobytes() == np.asarray(expected).tobytes()
