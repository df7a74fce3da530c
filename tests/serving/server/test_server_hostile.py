"""Storms at both ports of a server in a process of its own: it answers, and does not grow.

`make test` sends a few of each; `make soak` sends many.
"""

import json
import os
import random
import re
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from tensorflow_serving.apis.prediction_service_pb2_grpc import PredictionServiceStub

from tests.helpers.hostile_peers import (
    HTTP1,
    HTTP2,
    grpc_bytes,
    open_connections,
    post,
    rest_bytes,
    send,
)
from tests.helpers.server_process import server_process
from tests.helpers.server_target import TIMEOUT_S, UNLIMITED, predict

pytestmark = pytest.mark.soak
IS_LONG = bool(os.environ.get("KERAS_MRL_SOAK"))
NUM_BYTES = 20_000 if IS_LONG else 300
NUM_FRAMES = 100_000 if IS_LONG else 2000
NUM_CONNECTIONS = 2000 if IS_LONG else 600
MAX_THREADS = 400  # 256 of gRPC, 17 of REST, and those of TensorFlow
MAX_GROWTH_KB = 300 * 1024
X = np.ones((2, 4), np.float32)


class Server:
    """The process, and honest requests to it."""

    def __init__(self, process: subprocess.Popen[str], target: str, rest_port: int) -> None:
        self.process = process
        self.target = target
        self.grpc_port = int(target.rpartition(":")[2])
        self.rest_port = rest_port

    def status(self, key: str) -> int:
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(rf"^{key}:\s+(\d+)", text, re.MULTILINE)
        assert match
        return int(match[1])

    def still_serves(self) -> None:
        assert self.process.poll() is None
        options = [*UNLIMITED, ("grpc.use_local_subchannel_pool", 1)]
        with grpc.insecure_channel(self.target, options) as channel:
            request = predict(("total",), inputs={"x": X})
            response = PredictionServiceStub(channel).Predict(request, timeout=TIMEOUT_S)
        assert list(response.outputs["total"].float_val) == [4, 4]
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.rest_port}/v1/models/default:predict",
            json.dumps({"instances": X.tolist()}).encode(),
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            rows = json.load(answer)["predictions"]
        assert [row["total"] for row in rows] == [4, 4]
        assert self.status("Threads") <= MAX_THREADS


@pytest.fixture(scope="module")
def running(
    publish: Callable[[Path, str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("base")
    publish(base, "1")
    log = tmp_path_factory.mktemp("log") / "log"
    with server_process(base, log) as (process, target, rest_port):
        yield Server(process, target, rest_port)
    assert process.returncode == 0  # after all storms


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """The server before a storm; after it, it serves as before."""
    running.still_serves()
    before = running.status("VmRSS")
    yield running
    running.still_serves()
    assert running.status("VmRSS") - before < MAX_GROWTH_KB


def test_bytes_at_the_grpc_port(server: Server) -> None:
    rng = random.Random(0)
    for _ in range(NUM_BYTES):
        send(server.grpc_port, grpc_bytes(rng))


def test_bytes_at_the_rest_port(server: Server) -> None:
    rng = random.Random(0)
    for _ in range(NUM_BYTES):
        answer = send(server.rest_port, rest_bytes(rng))
        assert not answer.startswith(b"HTTP/1.1 5") or answer.startswith(b"HTTP/1.1 501"), answer


@pytest.mark.parametrize("kind", HTTP1)
def test_requests_at_the_rest_port(server: Server, kind: str) -> None:
    answers = send(server.rest_port, HTTP1[kind])
    for answer in answers.split(b"HTTP/1.1 ")[1:]:
        assert answer[:3] in (b"200", b"400", b"413", b"431", b"501")
        json.loads(answer.partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize("kind", HTTP2)
def test_floods_at_the_grpc_port(server: Server, kind: str) -> None:
    send(server.grpc_port, HTTP2[kind](NUM_FRAMES))


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /v1/models/default:pre", post(bytes(100))[:-50]],
    ids=["none", "head", "body"],
)
def test_slow_connections_at_the_rest_port(server: Server, sent: bytes) -> None:
    threads = server.status("Threads")
    with open_connections(server.rest_port, NUM_CONNECTIONS, sent):
        server.still_serves()
        assert server.status("Threads") <= threads + 16  # the workers of REST


@pytest.mark.parametrize("num_heads", [0, 1])
def test_slow_connections_at_the_grpc_port(server: Server, num_heads: int) -> None:
    sent = b"".join(HTTP2["heads alone"](num_heads))
    with open_connections(server.grpc_port, min(NUM_CONNECTIONS, 900), sent):
        server.still_serves()


def test_calls_that_are_cancelled(server: Server) -> None:
    request = predict(inputs={"x": X})
    with grpc.insecure_channel(server.target) as channel:
        stub = PredictionServiceStub(channel)
        for _ in range(NUM_BYTES):
            stub.Predict.future(request).cancel()
