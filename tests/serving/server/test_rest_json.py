"""JSON to arrays and back: values, numbers to the digit, and every refusal in its whole text."""

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf.meta_graph_pb2 import TensorInfo

from keras_mrl_serving.server.rest_json import parse_body, read_inputs, write_columns, write_rows
from keras_mrl_serving.server.status import StatusError

Declared = Mapping[str, TensorInfo]


def declared(**dtypes: str) -> Declared:
    return {
        name: TensorInfo(dtype=tf.as_dtype(dtype).as_datatype_enum)
        for name, dtype in dtypes.items()
    }


X = declared(x="float32")
A_AND_B = declared(a="float32", b="float32")
TEXT = declared(text="string")
STEPS = declared(steps="int64")
HALF = declared(half="float16")
TYPED = declared(
    **{
        name: name
        for name in ("float64", "float32", "int8", "uint8", "int32", "int64", "uint32", "uint64")
    },
    bool="bool",
    text="string",
)
VALUES: dict[str, list[Any]] = {
    "float64": [1 / 3, -1e300],
    "float32": [0.5, 2.0],
    "int8": [-128, 127],
    "uint8": [0, 255],
    "int32": [-(2**31), 2**31 - 1],
    "int64": [-(2**63), 2**63 - 1],
    "uint32": [0, 2**32 - 1],
    "uint64": [0, 2**64 - 1],
    "bool": [True, False],
    "text": ["a", 'ö"\n\\'],
}


def read(body: Any, inputs: Declared) -> dict[str, np.ndarray]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_inputs(parse_body(data), inputs)


def read_one(body: Any, inputs: Declared) -> np.ndarray:
    (array,) = read(body, inputs).values()
    return array


def refusal(body: Any, inputs: Declared) -> tuple[str, str]:
    with pytest.raises(StatusError) as caught:
        read(body, inputs)
    return caught.value.code.name, caught.value.message


def test_a_long_value_is_cut_in_an_error() -> None:
    code, message = refusal({"inputs": ["a" * 10**6]}, X)
    assert code == "INVALID_ARGUMENT"
    assert message.startswith('JSON Value: "aaa')
    assert message.endswith("aaa...TRUNCATED Type: String is not of expected type: float")
    assert len(message) < 70_000


def b64(text: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(text).decode()}


ROWS = "Failed to process element: "
TOO_BIG = "JSON Parse error: Number too big to be stored in double."
REFUSED: dict[str, tuple[Any, Declared, str]] = {
    "empty": (b"", X, "JSON Parse error: The document is empty"),
    "no JSON": (b'{"inputs": ]', X, "JSON Parse error: Expecting value. at offset: 11"),
    "no UTF-8": (
        b'{"inputs": "\xff"}',
        X,
        "JSON Parse error: 'utf-8' codec can't decode byte 0xff in position 12: invalid start "
        "byte.",
    ),
    "no object": ([1], X, "JSON Value: [\n    1\n] Is not object"),
    "signature no string": (
        {"signature_name": 1},
        X,
        'JSON Value: {\n    "signature_name": 1\n} not formatted correctly. '
        "'signature_name' key must be a string value.",
    ),
    "neither": ({}, X, "Missing 'inputs' or 'instances' key"),
    "both": (
        {"inputs": 1, "instances": 2},
        X,
        'JSON Value: {\n    "inputs": 1,\n    "instances": 2\n} Not formatted correctly expecting '
        "only one of 'inputs' or 'instances' keys to exist ",
    ),
    "rows no list": (
        {"instances": 2},
        X,
        "JSON Value: {\n    \"instances\": 2\n} Excepting 'instances' to be an list/array",
    ),
    "no rows": (
        {"instances": []},
        X,
        "JSON Value: {\n    \"instances\": []\n} No values in 'instances' array",
    ),
    "plain rows for two inputs": (
        {"instances": [1]},
        A_AND_B,
        "instances is a plain list, but expecting list of objects as multiple input tensors "
        "required as per tensorinfo_map",
    ),
    "plain columns for two inputs": (
        {"inputs": [1]},
        A_AND_B,
        "inputs is a plain value/list, but expecting an object as multiple input tensors "
        "required as per tensorinfo_map",
    ),
    "column missing": (
        {"inputs": {"a": [1]}},
        A_AND_B,
        "Missing named input: b in 'inputs' object.",
    ),
    "row with another key": (
        {"instances": [{"z": 1}]},
        X,
        f"{ROWS}0 key: z of 'instances' list. Error: INVALID_ARGUMENT: JSON object: does not have "
        "named input: z",
    ),
    "row without a key": (
        {"instances": [{"a": 1}]},
        A_AND_B,
        f"{ROWS}0 of 'instances' list. JSON object: {{\n    \"a\": 1\n}} must only have keys: a,b",
    ),
    "a plain row after a named one": (
        {"instances": [{"x": [1, 2, 3, 4]}, [1, 2, 3, 4]]},
        X,
        "Expecting object but got list at item 1 of input list",
    ),
    "a named row after a plain one": (
        {"instances": [[1, 2, 3, 4], {"x": [1, 2, 3, 4]}]},
        X,
        "Expecting value/list but got object at item 1 of input list",
    ),
    "rows of two sizes": (
        {"instances": [[1, 2], [1]]},
        X,
        f"{ROWS}1 of 'instances' list. Error: INVALID_ARGUMENT: Expecting tensor size: 2 but got: "
        "1",
    ),
    "rows of two shapes": (
        {"instances": [[1, 2], [[1, 2]]]},
        X,
        f"{ROWS}1 of 'instances' list. Error: INVALID_ARGUMENT: Expecting shape [2] but got: [1,2]",
    ),
    "ragged": (
        {"inputs": [[1, 2], [1]]},
        X,
        "Encountered list at unexpected size: 1 at level: 1 expected size: 2",
    ),
    "too shallow": (
        {"inputs": [[1], 2]},
        X,
        "JSON Value: 2 found at incorrect level: 2 in the JSON DOM. Expected at level: 2",
    ),
    "too deep": (
        {"inputs": [1, [2]]},
        X,
        "Encountered list at unexpected level: 1 expected < 1",
    ),
    "string for float": (
        {"inputs": ["1"]},
        X,
        'JSON Value: "1" Type: String is not of expected type: float',
    ),
    "null for float": (
        {"inputs": [1, None]},
        X,
        "JSON Value: null Type: Null is not of expected type: float",
    ),
    "bool for float": (
        {"inputs": [True]},
        X,
        "JSON Value: true Type: True is not of expected type: float",
    ),
    "bytes for float": (
        {"inputs": [{"b64": "YQ=="}]},
        X,
        'JSON Value: {\n    "b64": "YQ=="\n} Type: Object is not of expected type: float',
    ),
    "too big for float": (
        {"inputs": [1e39]},
        X,
        "Cannot convert JSON value: 1e+39 to float without loss of precision.",
    ),
    "too precise for float": (
        {"inputs": [2**24]},
        X,
        "Cannot convert JSON value: 16777216 to float without loss of precision.",
    ),
    "decimal for int64": (
        {"inputs": 1.0},
        STEPS,
        "JSON Value: 1.0 Type: Number is not of expected type: int64",
    ),
    "too big for int64": (
        {"inputs": 2**63},
        STEPS,
        f"JSON Value: {2**63} Type: Number is not of expected type: int64",
    ),
    "number for string": (
        {"inputs": 1},
        TEXT,
        "JSON Value: 1 Type: Number is not of expected type: string",
    ),
    "bad base64": ({"inputs": {"b64": "%"}}, TEXT, "Unable to base64 decode"),
    "half an object of bytes": (
        {"inputs": [{"b64": 1}]},
        TEXT,
        'JSON Value: {\n    "b64": 1\n} not formatted correctly for base64 data',
    ),
    "half a surrogate pair": (
        b'{"inputs": "\\ud800"}',
        TEXT,
        "JSON Parse error: The surrogate pair in string is invalid.",
    ),
    "more nesting than the parser takes": (
        b'{"inputs": ' + b"[" * 10**6,
        X,
        "JSON Parse error: The document is nested too deeply.",
    ),
    "more dims than an array takes": (
        b'{"inputs": ' + b"[" * 100 + b"]" * 100 + b"}",
        X,
        "tensor parsing error: x",
    ),
    **{
        f"number {number[:8]}": (f'{{"inputs": [[{number}, 0, 0, 0]]}}'.encode(), X, TOO_BIG)
        for number in ("1e309", "-1E+400", "0.1e310", "9" * 309, "9" * 309 + ".0", "-" + "9" * 5000)
    },
    "rows of half": (
        {"instances": [1.5]},
        HALF,
        f"{ROWS}0 of 'instances' list. Error: UNIMPLEMENTED: Conversion of JSON Value: 1.5 to "
        "type: half",
    ),
}


@pytest.mark.parametrize(("body", "inputs", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(body: Any, inputs: Declared, text: str) -> None:
    assert refusal(body, inputs) == ("INVALID_ARGUMENT", text)


def test_a_dtype_without_json_values() -> None:
    text = "Conversion of JSON Value: 1.5 to type: half"
    assert refusal({"inputs": [1.5]}, HALF) == ("UNIMPLEMENTED", text)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"instances": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
        b'{"instances": ' + b'{"b64":' * 5_000 + b"1" + b"}" * 5_000 + b"}",
        b'{"instances": [' + b"9" * 100_000 + b"]}",
        b'{"instances": [1e999999999]}',
        b'{"instances": "\\ud800"}',
        b"\xff\xfe{\x00}\x00",
        b"null",
        b"\0" * 1000,
    ],
    ids=lambda body: body[:20].decode(errors="replace"),
)
def test_a_body_made_to_hurt(body: bytes) -> None:
    assert refusal(body, X)[0] == "INVALID_ARGUMENT"


def test_rows_and_columns_become_the_same_arrays() -> None:
    rows = [[1, 2.5], [-3, 0]]
    for body in (
        {"instances": rows},
        {"instances": [{"x": row} for row in rows]},
        {"inputs": rows},
        {"inputs": {"x": rows}},
    ):
        np.testing.assert_array_equal(read_one(body, X), np.array(rows, np.float32), strict=True)


def test_every_dtype_goes_in_and_comes_out() -> None:
    arrays = read({"inputs": VALUES}, TYPED)
    assert {name: str(array.dtype) for name, array in arrays.items()} == {
        name: "object" if name == "text" else name for name in TYPED
    }
    document = json.loads(write_columns(arrays))["outputs"]
    assert document == VALUES
    kinds = {name: type(values[0]) for name, values in document.items()}
    assert kinds == {name: type(values[0]) for name, values in VALUES.items()}
    rows = [{name: values[i] for name, values in VALUES.items()} for i in range(2)]
    assert json.loads(write_rows(read({"instances": rows}, TYPED))) == {"predictions": rows}


def test_narrow_integers_keep_the_low_bits() -> None:
    inputs = declared(int8="int8", uint8="uint8")
    arrays = read({"inputs": {"int8": [300, -129], "uint8": [256, -1]}}, inputs)
    assert [array.tolist() for array in arrays.values()] == [[44, 127], [0, 255]]


def test_a_scalar_is_a_scalar() -> None:
    for value in ("dä", b64("dä".encode()), {"b64": "ZMOk"}):
        array = read_one({"inputs": value}, TEXT)
        assert (array.shape, array.item()) == ((), "dä".encode())
        assert json.loads(write_columns({"text": array})) == {"outputs": "dä"}
    # Without padding, as the decoder of TensorFlow Serving takes it too.
    assert read_one({"inputs": {"b64": "YQ"}}, TEXT).item() == b"a"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        ("0.1", "0.1"),
        ("0.33333333", "0.333333343"),
        ("7", "7.0"),
        ("9000000", "9e+06"),
        ("0.00003", "3e-05"),
        ("-0.0", "-0.0"),
        ("16777215", "16777215.0"),
        ("3.4028234663852886e38", "3.40282347e+38"),
        ("NaN", "NaN"),
        ("Infinity", "Infinity"),
        ("-Infinity", "-Infinity"),
    ],
)
def test_a_number_is_written_as_tensorflow_serving_writes_it(number: str, text: str) -> None:
    array = read_one(f'{{"inputs": [{number}]}}'.encode(), X)
    assert write_columns({"y": array}) == f'{{"outputs": [{text}]}}'.encode()


def test_numbers_survive_the_way_there_and_back() -> None:
    """Any float32, written as JSON and read again, is itself."""
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    body = write_columns({"y": values}).replace(b'"outputs"', b'"inputs"')
    np.testing.assert_array_equal(read_one(body, X), values, strict=True)


def test_bytes_that_are_no_text_are_encoded_only_under_a_bytes_name() -> None:
    array = np.array([b"\xff\0", b"b"], object)
    assert write_columns({"text": array}) == b'{"outputs": ["\xff\\u0000", "b"]}'  # no UTF-8
    encoded = json.loads(write_columns({"text_bytes": array}))["outputs"]
    assert encoded == [b64(b"\xff\0"), b64(b"b")]
    np.testing.assert_array_equal(read_one({"inputs": encoded}, TEXT), array)


def test_a_single_output_loses_its_name() -> None:
    y = np.array([3.5, -1], np.float32)
    assert write_rows({"y": y}) == b'{"predictions": [3.5, -1.0]}'
    assert write_columns({"y": y}) == b'{"outputs": [3.5, -1.0]}'
    assert write_rows({"z": y, "y": y[:, None]}) == (
        b'{"predictions": [{"y": [3.5], "z": 3.5}, {"y": [-1.0], "z": -1.0}]}'
    )
    assert write_columns({"z": y, "y": y[:0]}) == b'{"outputs": {"y": [], "z": [3.5, -1.0]}}'


@pytest.mark.parametrize(
    ("outputs", "text"),
    [
        (
            {"once": np.ones(2), "twice": np.ones(4)},
            "Tensor name: twice has inconsistent batch size: 4 expecting: 2",
        ),
        ({"scalar": np.float32(1)}, "Tensor name: scalar has no shape information "),
        ({"y": np.ones(0)}, "Tensor name: y has invalid batch size: 0"),
        ({"y": np.ones(1, np.float16)}, "Failed to write JSON value for tensor type: half"),
    ],
)
def test_outputs_that_are_no_rows(outputs: dict[str, Any], text: str) -> None:
    with pytest.raises(StatusError) as caught:
        write_rows({name: np.asarray(array) for name, array in outputs.items()})
    assert (caught.value.code.name, caught.value.message) == ("INVALID_ARGUMENT", text)
