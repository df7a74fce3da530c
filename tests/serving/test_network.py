"""Options that travel: what a server sees of them, over real sockets."""

import asyncio
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from keras_mrl_serving.aio import AsyncClient
from keras_mrl_serving.client import Client
from keras_mrl_serving.errors import KerasMrlError, ServerUnavailableError
from keras_mrl_serving.options import Options, Tls
from tests.helpers.faulty_server import Faulty, opened, rows

BOTH = pytest.mark.parametrize("kind", [Client, AsyncClient])

CA = trustme.CA()
SERVER = CA.issue_cert("127.0.0.1")
NAMED = CA.issue_cert("birds.example.org")
CLIENT = CA.issue_cert("client@example.org")
STRANGER = trustme.CA().issue_cert("stranger@example.org")


def pem(pair: trustme.LeafCert) -> tuple[bytes, bytes]:
    return pair.private_key_pem.bytes(), b"".join(c.bytes() for c in pair.cert_chain_pems)


def guarded(pair: trustme.LeafCert = SERVER, *, mutual: bool = False) -> Faulty:
    """A server that speaks TLS, and with `mutual` asks who its clients are."""
    roots = CA.cert_pem.bytes() if mutual else None
    return Faulty(credentials=grpc.ssl_server_credentials([pem(pair)], roots, mutual))


def trusting(ca: trustme.CA = CA, pair: trustme.LeafCert | None = None, **more: Any) -> Options:
    key, chain = pem(pair) if pair else (None, None)
    tls = Tls(root_certificates=ca.cert_pem.bytes(), private_key=key, certificate_chain=chain)
    return Options(tls=tls, max_attempts=1, **more)


@BOTH
def test_tls(kind: type[Any]) -> None:
    with guarded() as server, opened(kind, server.target, trusting()) as client:
        assert client.embed(rows(3), 2).shape == (3, 2)


@BOTH
def test_tls_with_certificates_in_files(kind: type[Any], tmp_path: Path) -> None:
    CA.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    (tmp_path / "key.pem").write_bytes(pem(CLIENT)[0])
    (tmp_path / "chain.pem").write_bytes(pem(CLIENT)[1])
    tls = Tls.from_files(tmp_path / "ca.pem", tmp_path / "key.pem", tmp_path / "chain.pem")
    with guarded(mutual=True) as server, opened(kind, server.target, Options(tls=tls)) as client:
        assert client.embed(rows(3), 2).shape == (3, 2)


@BOTH
def test_mutual_tls_lets_in_whom_its_ca_knows(kind: type[Any]) -> None:
    with guarded(mutual=True) as server:
        with opened(kind, server.target, trusting(pair=CLIENT)) as client:
            assert client.embed(rows(3), 2).shape == (3, 2)
        for options in (trusting(), trusting(pair=STRANGER)):
            with opened(kind, server.target, options) as client:
                assert_unavailable(client, server.target)
        assert len(server.asked) == 2  # those of the first client


@BOTH
def test_a_server_with_a_certificate_of_nobody_we_know(kind: type[Any]) -> None:
    with guarded() as server, opened(kind, server.target, trusting(trustme.CA())) as client:
        text = assert_unavailable(client, server.target)
    assert "CERTIFICATE_VERIFY_FAILED" in text


@BOTH
def test_a_clear_channel_to_a_guarded_port_and_back(kind: type[Any]) -> None:
    with guarded() as server, opened(kind, server.target, Options(max_attempts=1)) as client:
        assert_unavailable(client, server.target)
    with Faulty() as clear, opened(kind, clear.target, trusting()) as client:
        assert_unavailable(client, clear.target)


def assert_unavailable(client: Any, target: str) -> str:
    """A sentence with the call in it, and what gRPC knows of the reason."""
    with pytest.raises(ServerUnavailableError) as caught:
        client.describe()
    text = str(caught.value)
    assert re.fullmatch(
        r"A TensorFlow Serving server must answer at the target\. Received: UNAVAILABLE from "
        rf"{re.escape(target)} for model 'default', signature 'describe', timeout 10 s: .+\. "
        r"Start one with `keras-mrl serve --model_base_path PATH --port PORT`, or correct the "
        r"target\.",
        text,
        re.DOTALL,
    )
    assert caught.value.attempts == 1
    return text


@BOTH
def test_the_name_in_a_certificate_may_be_told(kind: type[Any]) -> None:
    roots = CA.cert_pem.bytes()
    told = Options(tls=Tls(root_certificates=roots, server_name="birds.example.org"))
    with guarded(NAMED) as server:
        with opened(kind, server.target, told) as client:
            assert client.embed(rows(3), 2).shape == (3, 2)
        with opened(kind, server.target, trusting()) as client:
            assert_unavailable(client, server.target)


@BOTH
def test_metadata_arrives_with_every_call(kind: type[Any]) -> None:
    options = Options(metadata={"authorization": "Bearer 5e1f", "x-team": "birds"})
    with Faulty() as server, opened(kind, server.target, options) as client:
        client.embed(rows(3), 2)
    assert len(server.asked) == 2
    for asked in server.asked:
        assert asked.headers["authorization"] == "Bearer 5e1f"
        assert asked.headers["x-team"] == "birds"


@BOTH
def test_metadata_may_be_made_for_each_call(kind: type[Any]) -> None:
    tokens = iter(range(100))
    options = Options(
        metadata=lambda: {"authorization": f"Bearer {next(tokens)}"},
        max_batch_size=1,
        max_in_flight=1,
    )
    with Faulty() as server, opened(kind, server.target, options) as client:
        client.embed(rows(3), 2)
    assert [a.headers["authorization"] for a in server.asked] == [f"Bearer {n}" for n in range(4)]


# What is on the wire.


class Wire:
    """What a client wrote to a server: a proxy between them that keeps it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._written: list[bytearray] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._listener, *self._open):
            try:
                each.shutdown(socket.SHUT_RDWR)
            except OSError:  # it is closed already
                pass
        for thread in self._threads:
            thread.join()
        for each in (self._listener, *self._open):
            each.close()

    def frames(self) -> Iterator[tuple[int, int, bytes]]:
        """Type, flags and payload of each whole frame of HTTP/2."""
        for written in self._written:
            data = bytes(written)
            assert data.startswith(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            at = 24
            while at + 9 <= len(data):
                length = int.from_bytes(data[at : at + 3])
                if at + 9 + length > len(data):
                    break
                yield data[at + 3], data[at + 4], data[at + 9 : at + 9 + length]
                at += 9 + length

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            written = bytearray()
            self._written.append(written)
            self._open += [client, server]
            for args in ((client, server, written), (server, client, bytearray())):
                self._threads.append(threading.Thread(target=self._copy, args=args))
                self._threads[-1].start()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket, kept: bytearray) -> None:
        try:
            while data := source.recv(1 << 16):
                kept += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:  # the other side is gone
            return


DATA, PING, ACK = 0, 6, 1


@pytest.mark.parametrize("compress", [False, True])
@BOTH
def test_requests_are_sent_with_gzip_if_asked(kind: type[Any], compress: bool) -> None:
    x = rows(1000)
    x[:, 0] = 1
    with Faulty() as server, Wire(server.port) as wire:
        with opened(kind, wire.target, Options(compress=compress)) as client:
            assert client.embed(x, 2).shape == (1000, 2)
        data = [payload for frame, _, payload in wire.frames() if frame == DATA and payload]
    gzips = [payload for payload in data if payload[0] == 1 and payload[5:8] == b"\x1f\x8b\x08"]
    sent = sum(map(len, data))
    if compress:
        assert gzips
        assert sent < x.nbytes / 10
    else:
        assert not gzips
        assert sent > x.nbytes


@pytest.mark.parametrize("keepalive_s", [None, 0.2])
@BOTH
def test_an_idle_client_sends_no_ping_unless_asked(
    kind: type[Any], keepalive_s: float | None
) -> None:
    def pings() -> int:
        return sum(frame == PING and not flags & ACK for frame, flags, _ in wire.frames())

    with Faulty() as server, Wire(server.port) as wire:
        with opened(kind, wire.target, Options(keepalive_s=keepalive_s)) as client:
            client.describe()
            time.sleep(0.3)  # for the ping by which gRPC measures the line
            before = pings()
            time.sleep(1.2)  # gRPC sends no two within a second
            idle = pings() - before
    assert (idle == 0) if keepalive_s is None else (idle >= 1)


# Interceptors.


class Seen(grpc.UnaryUnaryClientInterceptor):
    def __init__(self) -> None:
        self.methods: list[str] = []

    def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        self.methods.append(client_call_details.method)
        return continuation(client_call_details, request)


class SeenInALoop(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self) -> None:
        self.methods: list[str] = []

    async def intercept_unary_unary(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        method = client_call_details.method
        self.methods.append(method.decode() if isinstance(method, bytes) else method)
        return await continuation(client_call_details, request)


PREDICT = "/tensorflow.serving.PredictionService/Predict"


@pytest.mark.parametrize(("kind", "seen"), [(Client, Seen), (AsyncClient, SeenInALoop)])
def test_interceptors_see_every_call(kind: type[Any], seen: type[Any]) -> None:
    first, second = seen(), seen()
    options = Options(interceptors=(first, second), max_batch_size=2)
    with Faulty() as server, opened(kind, server.target, options) as client:
        assert client.embed(rows(5), 2)[:, 0].tolist() == [1, 2, 3, 4, 5]
        with pytest.raises(KerasMrlError):
            client.status()  # which this server has not: seen all the same
    for interceptor in (first, second):
        assert interceptor.methods == [
            *[PREDICT] * 4,
            "/tensorflow.serving.ModelService/GetModelStatus",
        ]


@pytest.mark.parametrize(
    ("kind", "given", "wanted"),
    [
        (Client, SeenInALoop(), "grpc.UnaryUnaryClientInterceptor"),
        (AsyncClient, Seen(), "grpc.aio.ClientInterceptor"),
        (Client, len, "grpc.UnaryUnaryClientInterceptor"),
    ],
)
def test_interceptors_of_the_other_client_are_refused(
    kind: type[Any], given: Any, wanted: str
) -> None:
    with pytest.raises(ValueError, match="interceptor") as caught:
        kind("localhost:8500", options=Options(interceptors=(given,)))
    assert str(caught.value) == (
        f"An interceptor must be a {wanted}. Received: {type(given).__name__}. "
        "Give a Client those of grpc, and an AsyncClient those of grpc.aio."
    )


# Targets.


@BOTH
def test_targets_of_a_list_take_turns(kind: type[Any]) -> None:
    with Faulty() as one, Faulty() as other:
        with opened(kind, [one.target, other.target]) as client:
            deadline = time.monotonic() + 5
            while not (one.asked and other.asked):  # until both are connected
                client.describe()
                assert time.monotonic() < deadline
            before = len(one.asked), len(other.asked)
            for _ in range(20):
                client.describe()
        assert len(one.asked) - before[0] == len(other.asked) - before[1] == 10


@BOTH
def test_a_target_of_a_list_that_is_not_there_is_passed_over(kind: type[Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    with Faulty() as server, opened(kind, [nobody, server.target]) as client:
        for _ in range(20):
            client.describe()
        assert len(server.asked) == 20


@pytest.mark.parametrize("target", ["dns:///localhost:{}", "localhost:{}", "ipv4:127.0.0.1:{}"])
@BOTH
def test_names_of_targets(kind: type[Any], target: str) -> None:
    with Faulty() as server, opened(kind, target.format(server.port)) as client:
        assert client.embed(rows(3), 2).shape == (3, 2)
        assert client.target == target.format(server.port)
        with pytest.raises(KerasMrlError) as caught:
            client.status()
    assert caught.value.target == target.format(server.port)


@BOTH
def test_a_unix_socket(kind: type[Any]) -> None:
    # Not pytest's folder: a socket's path has room for 107 bytes.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        with Faulty(address=f"unix:{folder}/s") as server:
            with opened(kind, f"unix:{folder}/s") as client:
                assert client.embed(rows(3), 2).shape == (3, 2)
            assert len(server.asked) == 2


@BOTH
@pytest.mark.parametrize("target", ["localhost", "localhost:", "birds.example.org:http", ""])
def test_a_target_without_a_port_is_refused(kind: type[Any], target: str) -> None:
    with pytest.raises(ValueError, match="port") as caught:
        kind(target)
    assert str(caught.value) == (
        f"A target must be 'host:port'. Received: {target!r}. "
        f"Give the server's gRPC port, for example {target.rstrip(':') or 'localhost'}:8500."
    )
    with pytest.raises(ValueError, match="port"):
        kind(["127.0.0.1:8500", target])


def test_one_loop_asks_two_servers_at_once() -> None:
    """The channels of one loop do not wait for each other."""
    with Faulty(before=lambda *_: time.sleep(0.3)) as one, Faulty() as other:

        async def main() -> float:
            async with AsyncClient(one.target) as slow, AsyncClient(other.target) as quick:
                waiting = asyncio.create_task(slow.describe())
                start = time.monotonic()
                for _ in range(5):
                    await quick.describe()
                took_s = time.monotonic() - start
                await waiting
                return took_s

        assert asyncio.run(main()) < 0.25
