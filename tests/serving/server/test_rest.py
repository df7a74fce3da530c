"""The REST surface over real sockets: paths, bodies, connections, and the end of a server."""

import gzip
import http.client
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from keras_mrl_serving.server import DevServer
from keras_mrl_serving.server.rest import HttpServer, answer
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


def exchange(port: int, data: bytes) -> bytes:
    """The answer to bytes as they are, to the end of the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


HEAD = f"POST {PREDICT} HTTP/1.1\r\nHost: x\r\n".encode()
LENGTH = "A body must have a length or come in chunks. Received: Transfer-Encoding="


@pytest.mark.parametrize(
    ("data", "code", "text"),
    [
        (
            HEAD + b"Content-Length: -1\r\n\r\n",
            400,
            f"{LENGTH}'identity', Content-Length='-1'. Send Content-Length.",
        ),
        (
            HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
            400,
            f"{LENGTH}'identity', Content-Length='2, 3'. Send Content-Length.",
        ),
        (
            HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
            400,
            f"{LENGTH}'gzip', Content-Length='0'. Send Content-Length.",
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
    head, _, body = exchange(rest.port, data).rpartition(b"\r\n\r\n")
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
    assert exchange(rest.port, data) == b""
    assert rest("GET", "/v1/models/tiny")[0] == 200


def test_an_error_of_the_servers_own_is_answered(caplog: pytest.LogCaptureFixture) -> None:
    models: Any = None  # which has no versions to ask for
    status, document = answer(models, None, "GET", "/v1/models/tiny", b"")
    assert (status, json.loads(document)) == (
        500,
        {"error": "The server met an error of its own; its log tells more."},
    )
    assert "GET /v1/models/tiny" in caplog.messages


def test_a_head_has_no_body(rest: Rest) -> None:
    response = exchange(rest.port, b"HEAD /v1/models/tiny HTTP/1.1\r\n\r\n")
    assert response.startswith(b"HTTP/1.1 400 ")
    assert response.endswith(b"\r\n\r\n")


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


class Echo:
    """Answers a request with its body, once a gate is open."""

    def __init__(self) -> None:
        self.entered, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, _method: str, _path: str, body: bytes) -> tuple[int, bytes]:
        self.entered.set()
        assert self.gate.wait(TIMEOUT_S)
        return 200, body


def test_a_packed_body_is_unpacked() -> None:
    """It counts as empty if it is damaged, cut off, or unpacks to more than the limit."""
    body = b"x" * 1000
    packed = gzip.compress(body)
    server = HttpServer("127.0.0.1", 0, Echo(), max_unpacked_bytes=len(body))
    server.start()
    with connected(server.server_port) as connection:

        def echo(data: bytes) -> bytes:
            connection.request("POST", "/", data, {"Content-Encoding": "gzip"})
            return connection.getresponse().read()

        assert echo(packed) == body
        for damaged in (body, packed[:-9], packed[:5] + b"x" + packed[6:-20] + bytes(20)):
            assert echo(damaged) == b""
        assert echo(gzip.compress(body + b"x")) == b""
    server.stop(TIMEOUT_S)


def test_an_answer_is_sent_at_once() -> None:
    """Nagle's algorithm would hold a body back until the client acknowledges the head."""
    no_delay = []

    class Watched(HttpServer):
        def shutdown_request(self, request: Any) -> None:
            no_delay.append(request.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            super().shutdown_request(request)

    server = Watched("127.0.0.1", 0, Echo())
    server.start()
    assert exchange(server.server_port, b"GET / HTTP/1.0\r\n\r\n")
    server.stop(TIMEOUT_S)
    assert all(no_delay)
    assert len(no_delay) == 1


def test_a_stop_answers_what_is_under_way_and_closes_what_is_idle() -> None:
    echo = Echo()
    server = HttpServer("127.0.0.1", 0, echo)
    server.start()
    with connected(server.server_port) as idle, connected(server.server_port) as busy:
        idle.request("POST", "/", b"first")
        assert idle.getresponse().read() == b"first"
        echo.entered.clear()
        echo.gate.clear()
        busy.request("POST", "/", b"second")
        assert echo.entered.wait(TIMEOUT_S)
        stopping = threading.Thread(target=server.stop, args=(TIMEOUT_S,))
        stopping.start()
        assert idle.sock.recv(1) == b""  # closed, while the other one still waits
        assert stopping.is_alive()
        echo.gate.set()
        assert busy.getresponse().read() == b"second"
        stopping.join()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", server.server_port))


def test_a_stop_waits_no_longer_than_its_grace() -> None:
    echo = Echo()
    echo.gate.clear()
    server = HttpServer("127.0.0.1", 0, echo)
    server.start()
    with connected(server.server_port) as busy:
        busy.request("POST", "/", b"late")
        assert echo.entered.wait(TIMEOUT_S)
        server.stop(0)  # returns, although the gate is closed
        echo.gate.set()
        assert busy.getresponse().read() == b"late"
