"""The REST surface over real sockets: routes, bodies, numbers, and every way to be refused."""

import base64
import gzip
import http.client
import json
import math
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis.predict_pb2 import PredictRequest
from tensorflow_serving.apis.prediction_service_pb2_grpc import PredictionServiceStub

from keras_mrl_serving.server import DevServer

TIMEOUT_S = 60.0
X = np.array([[0.1, -2.5, 1 / 3, 7.0], [1e-30, 3e20, 0.0, -1.0]], np.float32)
VALUES = ("float64", "int8", "uint8", "int32", "int64", "uint32", "uint64", "bool")
PREDICT = "/v1/models/tiny:predict"


class Typed(tf.Module):
    """Every dtype that JSON has values for, in and out; and two that it has none for."""

    @tf.function(
        input_signature=[
            tf.TensorSpec((None,), t, name=n)
            for n, t in {name: name for name in (*VALUES, "float32")}.items()
        ]
        + [tf.TensorSpec((None,), tf.string, name="text")]
    )
    def same(self, *values: tf.Tensor) -> dict[str, tf.Tensor]:
        names = (*VALUES, "float32", "text")
        outputs = {name: tf.identity(v) for name, v in zip(names, values, strict=True)}
        return outputs | {"text_bytes": tf.identity(values[-1])}

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.float16, name="half")])
    def half(self, half: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"whole": tf.cast(half, tf.float32)}

    @tf.function(input_signature=[tf.TensorSpec((None,), name="x")])
    def to_half(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"half": tf.cast(x, tf.float16)}

    @tf.function(input_signature=[tf.TensorSpec((None,), name="x")])
    def repeat(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"once": tf.identity(x), "twice": tf.repeat(x, 2)}


class Rest:
    """A server with both ports, and requests to each."""

    def __init__(self, port: int, target: str) -> None:
        self.port = port
        self._channel = grpc.insecure_channel(target)
        self._stub = PredictionServiceStub(self._channel)

    def raw(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, named)
        response = connection.getresponse()
        data = response.read()
        assert response.headers["Content-Type"] == "application/json"
        connection.close()
        return response.status, data

    def __call__(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        status, answer = self.raw(method, path, data)
        return status, json.loads(answer)

    def predict(self, body: Any, path: str = PREDICT) -> Any:
        status, answer = self("POST", path, body)
        assert status == 200, answer
        return answer

    def refuses(self, body: Any, path: str = PREDICT) -> tuple[int, str]:
        status, answer = self("POST", path, body)
        assert list(answer) == ["error"]
        return status, answer["error"]

    def grpc(self, inputs: dict[str, Any], signature: str = "") -> dict[str, np.ndarray]:
        request = PredictRequest()
        request.model_spec.name = "tiny"
        request.model_spec.signature_name = signature
        for name, value in inputs.items():
            request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
        outputs = self._stub.Predict(request, timeout=TIMEOUT_S).outputs
        return {name: tf.make_ndarray(proto) for name, proto in outputs.items()}

    def close(self) -> None:
        self._channel.close()


@pytest.fixture(scope="module")
def rest(
    publish: Callable[[Path, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Rest]:
    base = tmp_path_factory.mktemp("base")
    publish(base, "123")
    server = DevServer(base, model_name="tiny", rest_api_port=0)
    with server as target:
        assert server.rest_api_port
        rest = Rest(server.rest_api_port, target)
        yield rest
        rest.close()


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rest]:
    base = tmp_path_factory.mktemp("typed")
    module = Typed()
    signatures = {name: getattr(module, name) for name in ("same", "half", "to_half", "repeat")}
    tf.saved_model.save(module, str(base / "1"), signatures=signatures)
    server = DevServer(base, model_name="tiny", rest_api_port=0)
    with server as target:
        assert server.rest_api_port
        rest = Rest(server.rest_api_port, target)
        yield rest
        rest.close()


def float32(values: Any) -> np.ndarray:
    return np.array(values, np.float64).astype(np.float32)


@pytest.mark.parametrize(
    "path",
    [
        PREDICT,
        "/V1/Models/tiny:predict",
        "/v1/models/t%69ny:predict",
        "/v1/models/tiny/versions/123:predict",
        "/v1/models/tiny/VERSIONS/000123:predict",
    ],
)
def test_rows_are_what_grpc_answers_to_the_bit(rest: Rest, path: str) -> None:
    expected = rest.grpc({"x": X})
    for instances in (X.tolist(), [{"x": row} for row in X.tolist()]):
        answer = rest.predict({"instances": instances}, path)
        assert list(answer) == ["predictions"]
        assert [set(row) for row in answer["predictions"]] == [{"total", "y"}] * 2
        for name in ("total", "y"):
            got = float32([row[name] for row in answer["predictions"]])
            np.testing.assert_array_equal(got, expected[name], strict=True)


def test_columns_are_what_grpc_answers_to_the_bit(rest: Rest) -> None:
    expected = rest.grpc({"x": X})
    for inputs in (X.tolist(), {"x": X.tolist()}):
        answer = rest.predict({"inputs": inputs})
        assert list(answer) == ["outputs"]
        assert set(answer["outputs"]) == {"total", "y"}
        for name in ("total", "y"):
            got = float32(answer["outputs"][name])
            np.testing.assert_array_equal(got, expected[name], strict=True)


def test_a_single_output_loses_its_name(rest: Rest) -> None:
    rows = [{"a": 1, "b": 2.5}, {"a": -1, "b": 0}]
    body: dict[str, Any] = {"signature_name": "add", "instances": rows}
    assert rest.raw("POST", PREDICT, json.dumps(body).encode()) == (
        200,
        b'{"predictions": [3.5, -1.0]}',
    )
    body = {"signature_name": "add", "inputs": {"a": [1, -1], "b": [2.5, 0]}}
    assert rest.raw("POST", PREDICT, json.dumps(body).encode()) == (
        200,
        b'{"outputs": [3.5, -1.0]}',
    )


def test_a_scalar_is_a_scalar(rest: Rest) -> None:
    for text in ("dä", {"b64": base64.b64encode("dä".encode()).decode()}):
        body = {"signature_name": "echo", "inputs": text}
        assert rest.predict(body) == {"outputs": "dä"}
    # Without padding, as the decoder of TensorFlow Serving takes it too.
    assert rest.predict({"signature_name": "echo", "inputs": {"b64": "ZMOk"}}) == {"outputs": "dä"}
    assert rest.predict({"signature_name": "echo", "inputs": {"b64": "YQ"}}) == {"outputs": "a"}


@pytest.mark.parametrize(
    ("sent", "written"),
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
def test_a_number_is_written_as_tensorflow_serving_writes_it(
    rest: Rest, sent: str, written: str
) -> None:
    body = f'{{"signature_name": "add", "inputs": {{"a": [{sent}], "b": [-0.0]}}}}'.encode()
    assert rest.raw("POST", PREDICT, body) == (200, f'{{"outputs": [{written}]}}'.encode())


VALUE: dict[str, list[Any]] = {
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
ENCODED = [{"b64": base64.b64encode(t.encode()).decode()} for t in ("a", 'ö"\n\\')]


def test_every_dtype_goes_in_and_comes_out(typed: Rest) -> None:
    expected = VALUE | {"text_bytes": ENCODED}
    answer = typed.predict({"signature_name": "same", "inputs": VALUE})
    assert answer == {"outputs": expected}
    kinds = {name: type(values[0]) for name, values in answer["outputs"].items()}
    assert kinds == {name: type(values[0]) for name, values in expected.items()}
    rows = [{name: values[i] for name, values in VALUE.items()} for i in range(2)]
    predictions = [{name: values[i] for name, values in expected.items()} for i in range(2)]
    answer = typed.predict({"signature_name": "same", "instances": rows})
    assert answer == {"predictions": predictions}
    by_grpc = typed.grpc(
        {n: np.array(v, n if n != "text" else None) for n, v in VALUE.items()}, "same"
    )
    np.testing.assert_array_equal(by_grpc["float64"], VALUE["float64"])
    np.testing.assert_array_equal(by_grpc["int8"], VALUE["int8"])


def test_narrow_integers_keep_the_low_bits(typed: Rest) -> None:
    inputs = VALUE | {"int8": [300, -129], "uint8": [256, -1]}
    outputs = typed.predict({"signature_name": "same", "inputs": inputs})["outputs"]
    assert (outputs["int8"], outputs["uint8"]) == ([44, 127], [0, 255])


def test_bytes_that_are_no_text_come_back_only_under_a_bytes_name(typed: Rest) -> None:
    raw = b"\xff\x00"
    inputs = VALUE | {"text": [{"b64": base64.b64encode(raw).decode()}, "b"]}
    body = json.dumps({"signature_name": "same", "inputs": inputs}).encode()
    status, answer = typed.raw("POST", PREDICT, body)
    assert status == 200
    assert b'"text": ["\xff\\u0000", "b"]' in answer  # as they are, which is no UTF-8
    encoded = json.loads(answer.decode(errors="replace"))["outputs"]["text_bytes"]
    assert base64.b64decode(encoded[0]["b64"]) == raw


def test_dtypes_without_json_values(typed: Rest) -> None:
    text = "Conversion of JSON Value: 1.5 to type: half"
    assert typed.refuses({"signature_name": "half", "inputs": [1.5]}) == (501, text)
    assert typed.refuses({"signature_name": "half", "instances": [1.5]}) == (
        400,
        f"Failed to process element: 0 of 'instances' list. Error: UNIMPLEMENTED: {text}",
    )
    assert typed.refuses({"signature_name": "to_half", "inputs": [1.5]}) == (
        400,
        "Failed to write JSON value for tensor type: half",
    )


def test_outputs_without_a_common_batch_are_no_rows(typed: Rest, rest: Rest) -> None:
    assert typed.refuses({"signature_name": "repeat", "instances": [1, 2]}) == (
        400,
        "Tensor name: twice has inconsistent batch size: 4 expecting: 2",
    )
    columns = typed.predict({"signature_name": "repeat", "inputs": [1, 2]})["outputs"]
    assert columns == {"once": [1.0, 2.0], "twice": [1.0, 1.0, 2.0, 2.0]}
    status, text = rest.refuses({"signature_name": "kinds", "instances": [1.0]})
    assert (status, text) == (400, "Tensor name: scalar has no shape information ")
    assert rest.predict({"signature_name": "add", "inputs": {"a": [], "b": []}}) == {"outputs": []}


ROWS = "Failed to process element: "
REFUSED: dict[str, tuple[Any, int, str]] = {
    "empty": (b"", 400, "JSON Parse error: The document is empty"),
    "no JSON": (b'{"inputs": ]', 400, "JSON Parse error: Expecting value. at offset: 11"),
    "no object": ([1], 400, "JSON Value: [\n    1\n] Is not object"),
    "signature no string": (
        {"signature_name": 1},
        400,
        'JSON Value: {\n    "signature_name": 1\n} not formatted correctly. '
        "'signature_name' key must be a string value.",
    ),
    "signature unknown": (
        {"signature_name": "S"},
        400,
        'Serving signature name: "S" not found in signature def',
    ),
    "signature without inputs": (
        {"signature_name": "__saved_model_init_op", "inputs": []},
        400,
        "Failed to get input map for signature: __saved_model_init_op",
    ),
    "neither": ({}, 400, "Missing 'inputs' or 'instances' key"),
    "both": (
        {"inputs": 1, "instances": 2},
        400,
        'JSON Value: {\n    "inputs": 1,\n    "instances": 2\n} Not formatted correctly expecting '
        "only one of 'inputs' or 'instances' keys to exist ",
    ),
    "rows no list": (
        {"instances": 2},
        400,
        "JSON Value: {\n    \"instances\": 2\n} Excepting 'instances' to be an list/array",
    ),
    "no rows": (
        {"instances": []},
        400,
        "JSON Value: {\n    \"instances\": []\n} No values in 'instances' array",
    ),
    "plain rows for two inputs": (
        {"signature_name": "add", "instances": [1]},
        400,
        "instances is a plain list, but expecting list of objects as multiple input tensors "
        "required as per tensorinfo_map",
    ),
    "plain columns for two inputs": (
        {"signature_name": "add", "inputs": [1]},
        400,
        "inputs is a plain value/list, but expecting an object as multiple input tensors "
        "required as per tensorinfo_map",
    ),
    "column missing": (
        {"signature_name": "add", "inputs": {"a": [1]}},
        400,
        "Missing named input: b in 'inputs' object.",
    ),
    "row with another key": (
        {"instances": [{"z": 1}]},
        400,
        f"{ROWS}0 key: z of 'instances' list. Error: INVALID_ARGUMENT: JSON object: does not have "
        "named input: z",
    ),
    "row without a key": (
        {"signature_name": "add", "instances": [{"a": 1}]},
        400,
        f"{ROWS}0 of 'instances' list. JSON object: {{\n    \"a\": 1\n}} must only have keys: a,b",
    ),
    "a plain row after a named one": (
        {"instances": [{"x": [1, 2, 3, 4]}, [1, 2, 3, 4]]},
        400,
        "Expecting object but got list at item 1 of input list",
    ),
    "a named row after a plain one": (
        {"instances": [[1, 2, 3, 4], {"x": [1, 2, 3, 4]}]},
        400,
        "Expecting value/list but got object at item 1 of input list",
    ),
    "rows of two sizes": (
        {"instances": [[1, 2], [1]]},
        400,
        f"{ROWS}1 of 'instances' list. Error: INVALID_ARGUMENT: Expecting tensor size: 2 but got: "
        "1",
    ),
    "rows of two shapes": (
        {"instances": [[1, 2], [[1, 2]]]},
        400,
        f"{ROWS}1 of 'instances' list. Error: INVALID_ARGUMENT: Expecting shape [2] but got: [1,2]",
    ),
    "ragged": (
        {"inputs": [[1, 2], [1]]},
        400,
        "Encountered list at unexpected size: 1 at level: 1 expected size: 2",
    ),
    "too shallow": (
        {"inputs": [[1], 2]},
        400,
        "JSON Value: 2 found at incorrect level: 2 in the JSON DOM. Expected at level: 2",
    ),
    "too deep": (
        {"inputs": [1, [2]]},
        400,
        "Encountered list at unexpected level: 1 expected < 1",
    ),
    "string for float": (
        {"inputs": ["1"]},
        400,
        'JSON Value: "1" Type: String is not of expected type: float',
    ),
    "null for float": (
        {"inputs": [1, None]},
        400,
        "JSON Value: null Type: Null is not of expected type: float",
    ),
    "bool for float": (
        {"inputs": [True]},
        400,
        "JSON Value: true Type: True is not of expected type: float",
    ),
    "bytes for float": (
        {"inputs": [{"b64": "YQ=="}]},
        400,
        'JSON Value: {\n    "b64": "YQ=="\n} Type: Object is not of expected type: float',
    ),
    "too big for float": (
        {"inputs": [1e39]},
        400,
        "Cannot convert JSON value: 1e+39 to float without loss of precision.",
    ),
    "too precise for float": (
        {"inputs": [2**24]},
        400,
        "Cannot convert JSON value: 16777216 to float without loss of precision.",
    ),
    "decimal for int64": (
        {"signature_name": "count", "inputs": 1.0},
        400,
        "JSON Value: 1.0 Type: Number is not of expected type: int64",
    ),
    "too big for int64": (
        {"signature_name": "count", "inputs": 2**63},
        400,
        f"JSON Value: {2**63} Type: Number is not of expected type: int64",
    ),
    "number for string": (
        {"signature_name": "echo", "inputs": 1},
        400,
        "JSON Value: 1 Type: Number is not of expected type: string",
    ),
    "bad base64": (
        {"signature_name": "echo", "inputs": {"b64": "%"}},
        400,
        "Unable to base64 decode",
    ),
    "half an object of bytes": (
        {"signature_name": "echo", "inputs": [{"b64": 1}]},
        400,
        'JSON Value: {\n    "b64": 1\n} not formatted correctly for base64 data',
    ),
    "half a surrogate pair": (
        b'{"signature_name": "echo", "inputs": "\\ud800"}',
        400,
        "JSON Parse error: The surrogate pair in string is invalid.",
    ),
    "more nesting than a parser takes": (
        b'{"inputs": ' + b"[" * 10**6,
        400,
        "JSON Parse error: The document is nested too deeply.",
    ),
    "more dims than an array takes": (
        b'{"inputs": ' + b"[" * 100 + b"]" * 100 + b"}",
        400,
        "tensor parsing error: x",
    ),
}


@pytest.mark.parametrize(("body", "status", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(rest: Rest, body: Any, status: int, text: str) -> None:
    assert rest.refuses(body) == (status, text)
    assert rest.predict({"signature_name": "add", "inputs": {"a": [1], "b": [2]}}) == {
        "outputs": [3.0]
    }


def test_a_packed_body_is_unpacked(rest: Rest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or counts as empty where it is damaged, cut off, or unpacks to more than can be meant."""
    body = json.dumps({"signature_name": "add", "inputs": {"a": [1], "b": [2]}}).encode()
    packed = gzip.compress(body)
    empty = b'{"error": "JSON Parse error: The document is empty"}'
    connection = http.client.HTTPConnection("127.0.0.1", rest.port, timeout=TIMEOUT_S)

    def answer(sent: bytes) -> tuple[int, bytes]:
        connection.request("POST", PREDICT, sent, {"Content-Encoding": "gzip"})
        response = connection.getresponse()
        return response.status, response.read()

    assert answer(packed) == (200, b'{"outputs": [3.0]}')
    for broken in (body, packed[:-9], packed[:5] + b"x" + packed[6:-20] + bytes(20)):
        assert answer(broken) == (400, empty)
    monkeypatch.setattr("keras_mrl_serving.server.rest._MOST_UNPACKED_BYTES", len(body) - 1)
    assert answer(packed) == (400, empty)
    connection.close()


@pytest.mark.parametrize(("given_ms", "limit_s"), [(250, 0.25), (0, None), (-1, None)])
def test_how_long_a_call_may_compute(given_ms: int, limit_s: float | None) -> None:
    assert DevServer("models", rest_api_timeout_in_ms=given_ms)._rest_timeout_s == limit_s


def test_no_utf8(rest: Rest) -> None:
    status, text = rest.refuses(b'{"inputs": "\xff"}')
    assert status == 400
    assert text.startswith("JSON Parse error: 'utf-8' codec can't decode byte 0xff in position 12")


@pytest.mark.parametrize(
    "number", ["1e309", "-1E+400", "0.1e310", "9" * 309, "9" * 309 + ".0", "-" + "9" * 5000]
)
def test_a_number_that_no_double_holds(rest: Rest, number: str) -> None:
    said = "JSON Parse error: Number too big to be stored in double."
    assert rest.refuses(f'{{"inputs": [[{number}, 0, 0, 0]]}}'.encode()) == (400, said)


def test_a_wrong_shape_is_the_kernels_to_refuse(rest: Rest) -> None:
    status, text = rest.refuses({"inputs": [[1, 2, 3, 4, 5]]})
    assert status == 400
    assert text.startswith("Matrix size-incompatible: In[0]: [1,5], In[1]: [4,3]\n\t [[{{node ")


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        ("POST", "/x", 404, "Malformed request: POST /x"),
        ("GET", "/", 404, "Malformed request: GET /"),
        ("POST", "/v1/x", 400, "Malformed request: POST /v1/x"),
        ("POST", "/v1/models/tiny", 400, "Malformed request: POST /v1/models/tiny"),
        ("POST", "/v1/models/tiny:PREDICT", 400, "Malformed request: POST /v1/models/tiny:PREDICT"),
        ("PUT", PREDICT, 400, f"Malformed request: PUT {PREDICT}"),
        ("GET", PREDICT, 400, f"Malformed request: GET {PREDICT}"),
        ("GET", "/v1/models", 400, "Missing model name in request."),
        ("GET", "/v1/models/none", 404, "Could not find any versions of model none"),
        ("GET", "/v1/models/tiny/versions/7", 404, "Could not find version 7 of model tiny"),
        (
            "GET",
            f"/v1/models/tiny/versions/{2**63}",
            400,
            f"Failed to convert version: {2**63} to numeric.",
        ),
        (
            "GET",
            "/v1/models/none/metadata",
            404,
            "Servable not found for request: Latest(none)",
        ),
        (
            "POST",
            "/v1/models/none/versions/7:predict",
            404,
            "Servable not found for request: Specific(none, 7)",
        ),
        (
            "POST",
            "/v1/models/tiny/labels/canary:predict",
            400,
            "Unrecognized servable version label: canary",
        ),
        (
            "GET",
            "/v1/models/tiny/labels/canary/metadata",
            400,
            "Unrecognized servable version label: canary",
        ),
        *(
            (
                "POST",
                f"/v1/models/tiny:{verb}",
                501,
                "The development server answers predict calls only. Received: POST "
                f"/v1/models/tiny:{verb}. Ask /v1/models/tiny:predict, or run tensorflow/serving "
                "on the same files.",
            )
            for verb in ("classify", "regress")
        ),
    ],
)
def test_paths_that_are_refused(rest: Rest, method: str, path: str, status: int, text: str) -> None:
    assert rest(method, path, b"{}") == (status, {"error": text})


@pytest.mark.parametrize("suffix", ["", "/versions/123", "/labels/any"])
def test_status(rest: Rest, suffix: str) -> None:
    assert rest("GET", f"/v1/models/tiny{suffix}") == (
        200,
        {
            "model_version_status": [
                {
                    "version": "123",
                    "state": "AVAILABLE",
                    "status": {"error_code": "OK", "error_message": ""},
                }
            ]
        },
    )


def test_metadata(rest: Rest) -> None:
    status, answer = rest("GET", "/v1/models/tiny/metadata")
    assert status == 200
    assert rest("GET", "/v1/models/tiny/versions/123/metadata") == (200, answer)
    assert answer["model_spec"] == {"name": "tiny", "signature_name": "", "version": "123"}
    assert list(answer["metadata"]) == ["signature_def"]
    signatures = answer["metadata"]["signature_def"]["signature_def"]
    assert "kinds" in signatures
    assert signatures["serving_default"]["inputs"] == {
        "x": {
            "dtype": "DT_FLOAT",
            "tensor_shape": {
                "dim": [{"size": "-1", "name": ""}, {"size": "4", "name": ""}],
                "unknown_rank": False,
            },
            "name": "serving_default_x:0",
        }
    }
    assert signatures["serving_default"]["method_name"] == "tensorflow/serving/predict"


def test_one_connection_serves_request_after_request(rest: Rest) -> None:
    body = json.dumps({"signature_name": "add", "inputs": {"a": [1], "b": [2]}})
    connection = http.client.HTTPConnection("127.0.0.1", rest.port, timeout=TIMEOUT_S)
    connection.connect()
    first = connection.sock
    answers, took_s = [], []
    bodies: list[Any] = [body, "{", body, iter([body.encode()]), *[body] * 50]
    for sent in bodies:
        start = time.monotonic()
        connection.request("POST", PREDICT, sent, encode_chunked=not isinstance(sent, str))
        response = connection.getresponse()
        answers.append((response.status, response.read()))
        took_s.append(time.monotonic() - start)
    assert sorted(took_s)[27] < 0.03  # Nagle's algorithm would hold each body back for 40 ms
    assert connection.sock is first
    connection.close()
    assert [status for status, _ in answers] == [200, 400, 200, 200, *[200] * 50]
    assert answers[3] == answers[0] == (200, b'{"outputs": [3.0]}')


def sent(port: int, data: bytes) -> bytes:
    """What comes back, to the end of the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


HEAD = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\n".encode()


@pytest.mark.parametrize(
    ("data", "code", "text"),
    [
        (
            HEAD + b"Content-Length: -1\r\n\r\n",
            400,
            "A body must have a length or come in chunks. Received: Transfer-Encoding='identity', "
            "Content-Length='-1'. Send Content-Length.",
        ),
        (
            HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
            400,
            "A body must have a length or come in chunks. Received: Transfer-Encoding='identity', "
            "Content-Length='2, 3'. Send Content-Length.",
        ),
        (
            HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
            400,
            "A body must have a length or come in chunks. Received: Transfer-Encoding='gzip', "
            "Content-Length='0'. Send Content-Length.",
        ),
        (
            HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n",
            400,
            "Each chunk must begin with its size, a hexadecimal number. Received: b'-5\\r\\n'. "
            "Send Content-Length instead.",
        ),
        (b"BREW /v1/models HTTP/1.1\r\n\r\n", 501, "Unsupported method ('BREW')"),
        (b"GET /v1/models HTTP/9\r\n\r\n", 400, "Bad request version ('HTTP/9')"),
    ],
)
def test_requests_that_are_no_http(rest: Rest, data: bytes, code: int, text: str) -> None:
    head, _, body = sent(rest.port, data).rpartition(b"\r\n\r\n")
    assert json.loads(body) == {"error": text}
    if head:  # a request of no known version is answered without one
        assert head.startswith(f"HTTP/1.1 {code} ".encode())
        assert b"Connection: close" in head


@pytest.mark.parametrize(
    "data",
    [
        HEAD + f"Content-Length: {10**18}\r\n\r\n".encode() + b"{}",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 15 + b"\r\n{}",
    ],
)
def test_a_body_that_ends_early_gets_no_answer_and_does_no_harm(rest: Rest, data: bytes) -> None:
    assert sent(rest.port, data) == b""
    assert rest("GET", "/v1/models/tiny")[0] == 200


def test_an_error_of_the_servers_own_is_answered(
    rest: Rest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("keras_mrl_serving.server.rest.get_model_status", lambda: None)
    assert rest("GET", "/v1/models/tiny") == (
        500,
        {"error": "The server met an error of its own; its log tells more."},
    )
    assert "GET /v1/models/tiny" in caplog.messages


def test_a_head_has_no_body(rest: Rest) -> None:
    answer = sent(rest.port, b"HEAD /v1/models/tiny HTTP/1.1\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.endswith(b"\r\n\r\n")


def test_big_answers_arrive_whole(rest: Rest) -> None:
    rows = 20_000
    answer = rest.predict({"inputs": {"x": np.ones((rows, 4)).tolist()}})["outputs"]
    assert answer["y"] == [[18.0, 22.0, 26.0]] * rows


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not on PATH")
def test_curl(rest: Rest) -> None:
    url = f"http://127.0.0.1:{rest.port}{PREDICT}"
    body = json.dumps({"instances": X.tolist()})
    plain = ["curl", "--silent", "--show-error", "--fail", "--noproxy", "*", "-d", "@-", url]
    answers = [
        json.loads(
            subprocess.run(command, input=body, capture_output=True, text=True, check=True).stdout
        )
        for command in (plain, [*plain, "-H", "Transfer-Encoding: chunked"])
    ]
    assert answers[0] == answers[1]
    got = float32([row["y"] for row in answers[0]["predictions"]])
    np.testing.assert_array_equal(got, rest.grpc({"x": X})["y"], strict=True)


def test_without_a_port_there_is_no_rest(
    publish: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    publish(tmp_path, "1")
    server = DevServer(tmp_path)
    with server:
        assert server.rest_api_port is None


@pytest.mark.parametrize("taken", ["port", "rest_api_port"])
def test_a_port_that_is_taken_leaves_the_other_free(
    publish: Callable[[Path, str], Path], tmp_path: Path, taken: str
) -> None:
    publish(tmp_path, "1")
    with socket.create_server(("127.0.0.1", 0)) as first, socket.socket() as second:
        second.bind(("127.0.0.1", 0))
        port, free = first.getsockname()[1], second.getsockname()[1]
        second.close()
        ports = {"port": free, "rest_api_port": free, taken: port}
        server = DevServer(tmp_path, **ports)
        with pytest.raises(OSError, match="The address must be free") as caught:
            server.start()
    assert str(caught.value) == (
        f"The address must be free. Received: host='127.0.0.1', {taken}={port}, which "
        f"cannot be bound. Choose another port, or {taken}=0 for any free one."
    )
    socket.create_server(("127.0.0.1", free)).close()


def test_the_end_answers_what_is_under_way_and_closes_what_is_idle(
    publish: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    publish(tmp_path, "1")
    server = DevServer(tmp_path, rest_api_port=0)
    server.start()
    port = server.rest_api_port
    assert port is not None
    idle = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    idle.request("GET", "/v1/models/default")
    assert idle.getresponse().read()
    busy = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    busy.request(
        "POST",
        "/v1/models/default:predict",
        json.dumps({"signature_name": "count", "inputs": 200_000}),
    )
    time.sleep(0.2)
    start = time.monotonic()
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    assert json.loads(busy.getresponse().read()) == {"outputs": 200_000}
    stopping.join()
    assert time.monotonic() - start < 5
    assert idle.sock.recv(1) == b""
    idle.close()
    busy.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port))


def test_numbers_survive_the_way_there_and_back(rest: Rest) -> None:
    """Any float32, written as JSON and read again, is itself."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 20_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    body = {"a": values.tolist(), "b": [0.0] * len(values)}
    answer = rest.predict({"signature_name": "add", "inputs": body})["outputs"]
    by_grpc = rest.grpc({"a": values, "b": np.zeros_like(values)}, "add")["total"]
    assert math.isfinite(max(answer))
    np.testing.assert_array_equal(float32(answer), by_grpc, strict=True)
