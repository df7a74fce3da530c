"""The REST surface over real sockets: paths and bodies."""

import base64
import http.client
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from keras_mrl_serving.server import DevServer
from keras_mrl_serving.server.rest import answer
from tests.helpers.server_target import TIMEOUT_S, Served, predict

X = np.array([[0.1, -2.5, 1 / 3, 7.0], [1e-30, 3e20, 0.0, -1.0]], np.float32)
PREDICT = "/v1/models/tiny:predict"
ADD = {"signature_name": "add", "inputs": {"a": [1], "b": [2]}}
TYPES = ("float64", "int8", "uint8", "int32", "int64", "uint32", "uint64", "bool", "float32")


class Typed(tf.Module):
    """The dtypes that JSON has values for, in and out; and outputs without a common batch."""

    @tf.function(input_signature=[tf.TensorSpec((None,), name, name=name) for name in TYPES])
    def same(self, *values: tf.Tensor) -> dict[str, tf.Tensor]:
        return {name: tf.identity(value) for name, value in zip(TYPES, values, strict=True)}

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, name="text")])
    def text(self, text: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"text": tf.identity(text), "text_bytes": tf.identity(text)}

    @tf.function(input_signature=[tf.TensorSpec((None,), name="x")])
    def repeat(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"once": tf.identity(x), "twice": tf.repeat(x, 2)}


class Rest:
    """A server with both ports, and requests to each."""

    def __init__(self, port: int, target: str) -> None:
        self.port = port
        self._served = Served(target, Path(), 1)

    def raw(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes]:
        with connected(self.port) as connection:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            response = connection.getresponse()
            assert response.headers["Content-Type"] == "application/json"
            return response.status, response.read()

    def __call__(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        status, document = self.raw(method, path, data)
        return status, json.loads(document.decode(errors="replace"))

    def predict(self, body: Any, path: str = PREDICT) -> Any:
        status, document = self("POST", path, body)
        assert status == 200, document
        return document

    def refuses(self, body: Any, path: str = PREDICT) -> tuple[int, str]:
        status, document = self("POST", path, body)
        assert list(document) == ["error"]
        return status, document["error"]

    def grpc(self, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
        outputs = self._served(predict(inputs=inputs, name="tiny")).outputs
        return {name: tf.make_ndarray(proto) for name, proto in outputs.items()}

    def close(self) -> None:
        self._served.channel.close()


def connected(port: int) -> closing[http.client.HTTPConnection]:
    return closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S))


@contextmanager
def serving(base: Path, **flags: Any) -> Iterator[Rest]:
    server = DevServer(base, model_name="tiny", rest_api_port=0, **flags)
    with server as target:
        assert server.rest_api_port
        with closing(Rest(server.rest_api_port, target)) as rest:
            yield rest


@pytest.fixture(scope="module")
def base(publish: Callable[[Path, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("base")
    publish(base, "123")
    return base


@pytest.fixture(scope="module")
def rest(base: Path) -> Iterator[Rest]:
    with serving(base) as rest:
        yield rest


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rest]:
    base = tmp_path_factory.mktemp("typed")
    module = Typed()
    signatures = {name: getattr(module, name) for name in ("same", "text", "repeat")}
    tf.saved_model.save(module, str(base / "1"), signatures=signatures)
    with serving(base) as rest:
        yield rest


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
    document = rest.predict({"instances": X.tolist()}, path)
    assert list(document) == ["predictions"]
    assert [set(row) for row in document["predictions"]] == [{"total", "y"}] * 2
    for name in ("total", "y"):
        actual = float32([row[name] for row in document["predictions"]])
        np.testing.assert_array_equal(actual, expected[name], strict=True)


def test_columns_are_what_grpc_answers_to_the_bit(rest: Rest) -> None:
    expected = rest.grpc({"x": X})
    document = rest.predict({"inputs": X.tolist()})
    assert list(document) == ["outputs"]
    assert set(document["outputs"]) == {"total", "y"}
    for name in ("total", "y"):
        actual = float32(document["outputs"][name])
        np.testing.assert_array_equal(actual, expected[name], strict=True)


def test_every_dtype_goes_through_the_model(typed: Rest) -> None:
    largest = {
        name: [True] if name == "bool" else [tf.as_dtype(name).max]
        for name in TYPES
        if not name.startswith("float")
    }
    values = largest | {"float64": [1 / 3], "float32": [0.5]}
    values = {name: np.array(value).tolist() for name, value in values.items()}
    assert typed.predict({"signature_name": "same", "inputs": values}) == {"outputs": values}
    bytes_ = {"b64": "/wA="}
    outputs = typed.predict({"signature_name": "text", "inputs": [bytes_, "b"]})["outputs"]
    assert outputs == {"text": ["\ufffd\0", "b"], "text_bytes": [bytes_, {"b64": "Yg=="}]}


def test_outputs_without_a_common_batch_are_columns_but_no_rows(typed: Rest) -> None:
    assert typed.refuses({"signature_name": "repeat", "instances": [1, 2]}) == (
        400,
        "Tensor name: twice has inconsistent batch size: 4 expecting: 2",
    )
    columns = typed.predict({"signature_name": "repeat", "inputs": [1, 2]})["outputs"]
    assert columns == {"once": [1.0, 2.0], "twice": [1.0, 1.0, 2.0, 2.0]}


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"", 400, "JSON Parse error: The document is empty"),
        (
            {"signature_name": "S"},
            400,
            'Serving signature name: "S" not found in signature def',
        ),
        (
            {"signature_name": "__saved_model_init_op", "inputs": []},
            400,
            "Failed to get input map for signature: __saved_model_init_op",
        ),
        (
            {"signature_name": "add", "inputs": {"a": [1]}},
            400,
            "Missing named input: b in 'inputs' object.",
        ),
    ],
)
def test_refused(rest: Rest, body: Any, status: int, text: str) -> None:
    assert rest.refuses(body) == (status, text)


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
    status, document = rest("GET", "/v1/models/tiny/metadata")
    assert status == 200
    assert rest("GET", "/v1/models/tiny/versions/123/metadata") == (200, document)
    assert document["model_spec"] == {"name": "tiny", "signature_name": "", "version": "123"}
    assert list(document["metadata"]) == ["signature_def"]
    signatures = document["metadata"]["signature_def"]["signature_def"]
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


@pytest.mark.parametrize(("timeout_ms", "status"), [(20, 504), (0, 200), (-1, 200)])
def test_a_call_computes_no_longer_than_the_flag_says(
    base: Path, timeout_ms: int, status: int
) -> None:
    """Of three calls, the first would take half a minute, the others more than no time at all."""
    body = {"signature_name": "count", "inputs": 10**7 if status == 504 else 5_000}
    with serving(base, rest_api_timeout_in_ms=timeout_ms) as rest:
        assert rest("POST", PREDICT, body)[0] == status


def test_one_connection_serves_request_after_request(rest: Rest) -> None:
    body = json.dumps(ADD)
    with connected(rest.port) as connection:
        connection.connect()
        first = connection.sock
        answers = []
        bodies: list[Any] = [body, "{", body, iter([body.encode()])]
        for sent in bodies:
            connection.request("POST", PREDICT, sent, encode_chunked=not isinstance(sent, str))
            response = connection.getresponse()
            answers.append((response.status, response.read()))
        assert connection.sock is first
    assert [status for status, _ in answers] == [200, 400, 200, 200]
    assert answers[3] == answers[0] == (200, b'{"outputs": [3.0]}')


def test_an_error_of_the_servers_own_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    models: Any = None  # which has no versions to ask for
    status, document = answer(models, None, "GET", "/v1/models/tiny", b"")
    assert (status, json.loads(document)) == (
        500,
        {"error": "The server met an error of its own; its log tells more."},
    )
    assert "GET /v1/models/tiny" in caplog.messages


def test_an_answer_that_is_too_large_is_refused(typed: Rest) -> None:
    text = {"b64": base64.b64encode(bytes(2**20)).decode()}
    body = {"signature_name": "text", "inputs": [text] * 20}
    assert typed.refuses(body) == (
        429,
        "An answer of the development server must have at most 33554432 bytes. Received: a request "
        "whose answer has about 41945600. Send fewer rows in a request.",
    )


def test_big_answers_arrive_whole(rest: Rest) -> None:
    rows = 20_000
    outputs = rest.predict({"inputs": {"x": np.ones((rows, 4)).tolist()}})["outputs"]
    assert outputs["y"] == [[18.0, 22.0, 26.0]] * rows


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not on PATH")
def test_curl(rest: Rest) -> None:
    url = f"http://127.0.0.1:{rest.port}{PREDICT}"
    body = json.dumps({"instances": X.tolist()})
    plain = ["curl", "--silent", "--show-error", "--fail", "--noproxy", "*", "-d", "@-", url]
    documents = [
        json.loads(
            subprocess.run(command, input=body, capture_output=True, text=True, check=True).stdout
        )
        for command in (plain, [*plain, "-H", "Transfer-Encoding: chunked"])
    ]
    assert documents[0] == documents[1]
    y = float32([row["y"] for row in documents[0]["predictions"]])
    np.testing.assert_array_equal(y, rest.grpc({"x": X})["y"], strict=True)
