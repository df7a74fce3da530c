"""Damaged requests: each gets an answer, none meets an error of the server's own, memory stays.

`make test` runs a tenth of the count; `make soak` runs it in full.
"""

import http.client
import json
import os
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError
from tensorflow_serving.apis.predict_pb2 import PredictRequest, PredictResponse

from keras_mrl_serving.server import DevServer
from tests.helpers.hostile_peers import mutated
from tests.helpers.server_target import TIMEOUT_S, UNLIMITED, predict

COUNT = 2000 if os.environ.get("KERAS_MRL_SOAK") else 200
MAX_GROWTH_BYTES = 48 * 2**20  # what allocators keep
X = np.arange(8, dtype=np.float32).reshape(2, 4)
SIZES = (0, 1, 2, 3, 4, 1000, 2**31, 2**40, 2**62, 2**63 - 1, -1, -(2**63))
CODES = ("OK", "INVALID_ARGUMENT", "NOT_FOUND", "FAILED_PRECONDITION", "UNIMPLEMENTED", "INTERNAL")


class Server(NamedTuple):
    channel: grpc.Channel
    rest_port: int


@pytest.fixture(scope="module", params=["alone", "batched"])
def server(
    request: pytest.FixtureRequest,
    publish: Callable[[Path, str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("base")
    publish(base, "1")
    server = DevServer(base, rest_api_port=0, enable_batching=request.param == "batched")
    with server as target, grpc.insecure_channel(target, UNLIMITED) as channel:
        assert server.rest_api_port
        yield Server(channel, server.rest_api_port)


REQUESTS = (
    predict(inputs={"x": X}),
    predict(("y",), inputs={"x": X}, signature="serving_default"),
    predict(inputs={"a": X[0], "b": X[1]}, signature="add"),
    predict(inputs={"x": X[0]}, signature="kinds"),
    predict(inputs={"text": b"hello"}, signature="echo"),
    predict(inputs={"a": X[0]}, signature="add_default"),
)
BODIES = (
    {"instances": X.tolist()},
    {"inputs": {"x": X.tolist()}, "signature_name": "serving_default"},
    {"signature_name": "add", "instances": [{"a": 1, "b": 2.5}, {"a": -1e3, "b": 0}]},
    {"signature_name": "echo", "inputs": {"text": {"b64": "aGVsbG8="}}},
    {"signature_name": "echo", "inputs": "grün \U0001f600"},
)


def twisted(rng: random.Random, request: PredictRequest) -> bytes:
    """A request that still parses, with fields that do not fit together."""
    changed = PredictRequest()
    changed.CopyFrom(request)
    tensor = changed.inputs[rng.choice(sorted(changed.inputs))]
    twists: tuple[Callable[[], Any], ...] = (
        lambda: setattr(tensor, "dtype", rng.choice((1, 3, 7, 10, 14, 19, 20, 21, 77, 101, -5))),
        lambda: [tensor.tensor_shape.dim.add(size=rng.choice(SIZES)) for _ in range(3)],
        lambda: (
            setattr(rng.choice(tensor.tensor_shape.dim or [tensor]), "size", rng.choice(SIZES))
            if tensor.tensor_shape.dim
            else None
        ),
        lambda: [tensor.tensor_shape.dim.add(size=1) for _ in range(300)],
        lambda: setattr(tensor.tensor_shape, "unknown_rank", True),
        lambda: setattr(tensor, "tensor_content", rng.randbytes(rng.choice((0, 1, 16, 33)))),
        lambda: tensor.string_val.append(rng.randbytes(5)),
        lambda: tensor.float_val.extend([float("nan")] * rng.randrange(20)),
        lambda: tensor.variant_val.add(type_name="tensorflow::Tensor"),
        lambda: tensor.resource_handle_val.add(name="weights"),
        lambda: changed.inputs[rng.choice("abxyz")].CopyFrom(tensor),
        lambda: setattr(changed.model_spec, "signature_name", rng.choice(("add", "\0", "ü" * 900))),
        lambda: setattr(changed.model_spec, "version_label", "\U0001f600"),
        lambda: changed.output_filter.append(rng.choice(("y", "", "string"))),
    )
    for _ in range(rng.choice((1, 2, 3))):
        rng.choice(twists)()
    return changed.SerializeToString()


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def predict_call(server: Server) -> Any:
    """Sends bytes as they are, and returns bytes."""
    return server.channel.unary_unary("/tensorflow.serving.PredictionService/Predict")


def still_serves(server: Server) -> None:
    request = predict(("total",), inputs={"x": X})
    data = predict_call(server)(request.SerializeToString(), timeout=TIMEOUT_S)
    response = PredictResponse.FromString(data)
    assert list(response.outputs["total"].float_val) == X.sum(1).tolist()


def code_of(server: Server, data: bytes) -> str:
    """The code with which a Predict call of these bytes ends."""
    try:
        PredictResponse.FromString(predict_call(server)(data, timeout=TIMEOUT_S))
    except grpc.RpcError as error:
        return str(error.code().name)
    return "OK"


def is_message(data: bytes) -> bool:
    try:
        PredictRequest.FromString(data)
    except DecodeError:
        return False
    return True


@pytest.mark.soak
def test_mutated_predict_requests(server: Server) -> None:
    rng = random.Random(0)
    before = 0
    codes = dict.fromkeys(CODES, 0)
    for index in range(COUNT):
        if index == COUNT // 4:  # caches are warm, threads are started
            before = resident_bytes()
        request = rng.choice(REQUESTS)
        data = (
            mutated(rng, request.SerializeToString())
            if rng.random() < 0.5
            else twisted(rng, request)
        )
        code = code_of(server, data)
        assert code in codes, (code, data)
        # gRPC's own code, for bytes that are no message
        assert code != "INTERNAL" or not is_message(data), data
        codes[code] += 1
    still_serves(server)
    assert codes["OK"] > COUNT / 20
    assert codes["INVALID_ARGUMENT"] > COUNT / 10
    assert resident_bytes() - before < MAX_GROWTH_BYTES


def post(server: Server, body: bytes) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.rest_port, timeout=TIMEOUT_S)
    with closing(connection):
        connection.request("POST", "/v1/models/default:predict", body)
        response = connection.getresponse()
        # Strings that are no UTF-8 come out as they went in, as from TensorFlow Serving.
        return response.status, json.loads(response.read().decode(errors="replace"))


@pytest.mark.soak
def test_mutated_rest_bodies(server: Server) -> None:
    rng = random.Random(0)
    before = 0
    codes = dict.fromkeys((200, 400, 404, 501), 0)
    for index in range(COUNT):
        if index == COUNT // 4:
            before = resident_bytes()
        text = json.dumps(rng.choice(BODIES), ensure_ascii=rng.random() < 0.5)
        body = mutated(rng, text.encode())
        status, answer = post(server, body)
        assert status in codes, (status, answer, body)
        assert answer.keys() & {"predictions", "outputs", "error"}
        codes[status] += 1
    still_serves(server)
    assert codes[200] > COUNT / 50
    assert codes[400] > COUNT / 3
    assert resident_bytes() - before < MAX_GROWTH_BYTES


def test_bytes_that_are_no_http(server: Server) -> None:
    rng = random.Random(0)
    greeting = b"POST /v1/models/default:predict HTTP/1.1\r\nContent-Length: 4\r\n\r\n{}{}"
    for _ in range(30):
        with socket.create_connection(("127.0.0.1", server.rest_port), TIMEOUT_S) as connection:
            connection.sendall(mutated(rng, greeting))
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(2**16):
                pass
    still_serves(server)
