"""A server of small models that fails as a test tells it, in this process or in one of its own."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from keras_mrl_serving import _wire_pb2 as wire
from keras_mrl_serving import contract
from keras_mrl_serving._wire import from_proto, to_proto
from keras_mrl_serving.aio import AsyncClient
from keras_mrl_serving.calls import Arrays, Call
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.client import Client
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.errors import DeadlineError
from keras_mrl_serving.options import Options
from tests.helpers.waiting import wait_until

Model = Callable[[Call], Arrays]

ROOT = Path(__file__).parents[2]
POLICY = CascadePolicy((Stage(2, 0.5), Stage(4, None)))
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
)


def rows(count: int, start: int = 1) -> npt.NDArray[np.float32]:
    """Return rows that name themselves: their number is in column 0, its parity in column 1."""
    x = np.zeros((count, 4), np.float32)
    x[:, 0] = np.arange(start, start + count)
    x[:, 1] = x[:, 0] % 2  # the confidence: every other row is sure at dim 2
    return x


def manifest(version: int) -> Manifest:
    return Manifest(
        name="echo",
        kind="classifier",
        fingerprint=f"v{version}",
        dims=(2, 4),
        width=4,
        inputs={"x": {"dtype": "float32", "shape": [None, 4]}},
        made_with={},
        num_classes=100,
        top_k=1,
        cascade=POLICY.to_json(),
    )


def echo(version: int) -> Model:
    """Return a model whose answers name the row, the version, and the maker of the features.

    An embedding begins with the row's number and the version. A class is ten times the version
    that made the features plus the one that classified them, so 11, 22, ... and never 12.
    """
    digit = version % 10

    def answer(call: Call) -> Arrays:
        inputs = {name: np.asarray(array) for name, array in call.inputs.items()}
        kind, _, dim = call.signature.rpartition("_")
        if call.signature == contract.DESCRIBE:
            text = np.array([manifest(version).to_json().encode()], object)
            return {"manifest": np.repeat(text, len(inputs["key"]))}
        if call.signature == contract.FEATURES:
            x = inputs["x"]
            return {"features": np.stack([np.full(len(x), digit), x[:, 1], x[:, 0], x[:, 2]], 1)}
        if call.signature == contract.CLASSIFY_ADAPTIVE:
            x = inputs["x"]
            return {**_classes(np.full(len(x), digit), digit, x[:, 0]), "dim": _dims(x[:, 1])}
        if kind == "classify":
            return _classes(np.full(len(inputs["x"]), digit), digit, inputs["x"][:, 0])
        if kind == "head":
            features = inputs["features"]
            logits = np.zeros((len(features), 100), np.float32)
            logits[:, 0] = 50 * features[:, 1]
            return {**_classes(features[:, 0], digit, features[:, 1]), "logits": logits}
        if kind == "embed":
            x = np.insert(inputs["x"], 1, version, axis=1)
            return {"embedding": x[:, : int(dim)]}
        raise KeyError(call.signature)

    return answer


def identified(model: Model, model_id: int, **changes: Any) -> Model:
    """Return a model whose rows carry an id, and whose manifest names it, or has other changes."""

    def answer(call: Call) -> Arrays:
        arrays = model(call)
        if call.signature == contract.DESCRIBE:
            named = replace(
                Manifest.from_json(arrays["manifest"][0]), **{"model_id": model_id, **changes}
            )
            text = np.array([named.to_json().encode()], object)
            return {"manifest": np.repeat(text, len(arrays["manifest"]))}
        rows = len(next(iter(arrays.values())))
        return {contract.MODEL_ID: np.full(rows, model_id, np.int32), **arrays}

    return answer


def _classes(made_by: Any, digit: int, confidence: Any) -> dict[str, npt.NDArray[Any]]:
    class_ids = (10 * made_by + digit).astype(np.int64)
    confidence = confidence.astype(np.float32)
    return {
        "class_ids": class_ids[:, None],
        "probabilities": confidence[:, None],
        "confidence": confidence,
    }


def _dims(sure: Any) -> npt.NDArray[np.int32]:
    return np.where(sure > 0, 2, 4).astype(np.int32)


@dataclass(frozen=True)
class Request:
    """One request as it arrived; every attempt is one."""

    signature: str
    version: int | None
    count: int  # rows
    first: float  # first value, which in `rows` is the number of the first row
    headers: Mapping[str, str]
    peer: str  # address of the client's connection
    remaining_s: float  # until the client's deadline
    at: float  # seconds on the monotonic clock


Before = Callable[[Request, grpc.ServicerContext], object]


class FaultyServer:
    """A gRPC server that calls `before` with each request, which may wait or abort it.

    Args:
        versions: The models by version; by default version 1 is an `echo`.
        before: Called with each request before it is answered.
        address: Address to listen at.
        credentials: Certificates of a server that speaks TLS.
        workers: How many requests are answered at once.

    Attributes:
        requests: Every request so far.
        most_at_once: The most requests that were ever being answered at once.
    """

    def __init__(
        self,
        versions: Mapping[int, Model] | None = None,
        before: Before = lambda *_: None,
        *,
        address: str = "127.0.0.1:0",
        credentials: grpc.ServerCredentials | None = None,
        workers: int = 16,
    ) -> None:
        self.versions = {1: echo(1)} if versions is None else versions
        self.before = before
        self.requests: list[Request] = []
        self.most_at_once = 0
        self._at_once = 0
        self._counting = threading.Lock()
        method = grpc.unary_unary_rpc_method_handler(
            self._predict,
            request_deserializer=wire.PredictRequest.FromString,
            response_serializer=wire.PredictResponse.SerializeToString,
        )
        name = "tensorflow.serving.PredictionService"
        self._server = grpc.server(ThreadPoolExecutor(workers), options=_OPTIONS)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(name, {"Predict": method}),)
        )
        if credentials is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, credentials)
        self.port = port
        self.target = address if address.startswith("unix:") else f"127.0.0.1:{port}"

    def __enter__(self) -> "FaultyServer":
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(None).wait()

    def stop(self, grace_s: float | None) -> threading.Event:
        """Refuse new requests; the event is set once those under way are answered."""
        stopped: threading.Event = self._server.stop(grace_s)
        return stopped

    def requests_of(self, signature: str) -> list[Request]:
        return [request for request in self.requests if request.signature == signature]

    def _predict(
        self, message: wire.PredictRequest, context: grpc.ServicerContext
    ) -> wire.PredictResponse:
        spec = message.model_spec
        inputs = {name: from_proto(proto) for name, proto in message.inputs.items()}
        array = next(iter(inputs.values()))
        request = Request(
            spec.signature_name,
            spec.version.value if spec.HasField("version") else None,
            len(array),
            float(array.flat[0]) if array.dtype != object and array.size else 0.0,
            {str(key): str(value) for key, value in context.invocation_metadata()},
            context.peer(),
            context.time_remaining() or 0.0,
            time.monotonic(),
        )
        with self._counting:
            self.requests.append(request)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            self.before(request, context)
            return self._answer(request, Call(request.signature, inputs), message, context)
        finally:
            with self._counting:
                self._at_once -= 1

    def _answer(
        self,
        request: Request,
        call: Call,
        message: wire.PredictRequest,
        context: grpc.ServicerContext,
    ) -> wire.PredictResponse:
        model, versions = message.model_spec.name, dict(self.versions)
        if not versions or request.version not in (None, *versions) or model != "default":
            which = "Latest({})" if request.version is None else "Specific({}, {})"
            text = f"Servable not found for request: {which.format(model, request.version)}"
            context.abort(grpc.StatusCode.NOT_FOUND, text)
        number = max(versions) if request.version is None else request.version
        try:
            answer = versions[number](call)
        except KeyError:
            text = f'Serving signature key "{call.signature}" not found.'
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)
        for name in set(message.output_filter) - set(answer):
            text = f"output tensor alias not found in signature: {name}"
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        response = wire.PredictResponse()
        response.model_spec.version.value = number
        for name in message.output_filter or answer:
            response.outputs[name].CopyFrom(to_proto(np.asarray(answer[name])))
        return response


def connect_to_all(client: Any, *servers: FaultyServer) -> None:
    """Describe until every server has been asked: a client asks the first one it reaches."""
    wait_until(lambda: client.describe() and all(server.requests for server in servers))


class ServerProcess:
    """The same server in a process that can be killed. The first `stuck` embeddings never end."""

    def __init__(self, port: int = 0, stuck: int = 0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.faulty_server", str(port), str(stuck)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.port = int(self.next_line())
        self.target = f"127.0.0.1:{self.port}"

    def next_line(self) -> str:
        """Return the next line it prints: its port, then the signature of each stuck request."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline().strip()
        assert line, "the server is gone"
        return line

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class _Awaited:
    """An `AsyncClient` whose methods block: each is awaited in the runner's loop."""

    def __init__(self, client: AsyncClient, runner: asyncio.Runner) -> None:
        self._client = client
        self._runner = runner

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if not callable(method):
            return method
        return lambda *args, **named: self._runner.run(method(*args, **named))

    def side_by_side(self, ask: Callable[[AsyncClient], Any], count: int) -> list[Any]:
        async def gather() -> list[Any]:
            return await asyncio.gather(*(ask(self._client) for _ in range(count)))

        return self._runner.run(gather())


@contextmanager
def open_client(kind: type[Any], target: Any, options: Options | None = None) -> Iterator[Any]:
    """Open a `Client` or an `AsyncClient`; either is used as a `Client`."""
    if kind is Client:
        with Client(target, options=options) as client:
            yield client
        return
    with asyncio.Runner() as runner:
        awaited = AsyncClient(target, options=options)
        try:
            yield _Awaited(awaited, runner)
        finally:
            runner.run(awaited.close())


def deadlines_until(condition: Callable[[], bool], client: Any, callers: int) -> list[int]:
    """Ask by so many threads or tasks until the condition holds; how often each was too late.

    A caller that was too late 100 times gives up.
    """
    x = rows(1)

    def ask(_: int) -> int:
        late = 0
        while not condition() and late < 100:
            try:
                client.embed(x, 2)
            except DeadlineError:
                late += 1
        return late

    async def ask_awaiting(waiting: AsyncClient) -> int:
        late = 0
        while not condition() and late < 100:
            try:
                await waiting.embed(x, 2)
            except DeadlineError:
                late += 1
        return late

    if isinstance(client, _Awaited):
        return client.side_by_side(ask_awaiting, callers)
    with ThreadPoolExecutor(callers) as pool:
        return list(pool.map(ask, range(callers)))


def main(port: int, stuck: int) -> None:
    numbers = iter(range(stuck))

    def before(request: Request, _: grpc.ServicerContext) -> None:
        if request.signature.startswith("embed") and next(numbers, None) is not None:
            print(request.signature, flush=True)
            threading.Event().wait()

    with FaultyServer(before=before, address=f"127.0.0.1:{port}") as server:
        print(server.port, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
    os._exit(0)
