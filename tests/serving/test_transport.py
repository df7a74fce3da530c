"""The transport: gRPC's errors as ours, targets, and channels as the options say."""

import asyncio
import json
import os
import re
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme

from keras_mrl_serving import errors
from keras_mrl_serving._transport import (
    AioTransport,
    GrpcTransport,
    channel_address,
    channel_arguments,
    translate_error,
)
from keras_mrl_serving.aio import AsyncClient
from keras_mrl_serving.calls import AskStatus, Call, Envelope
from keras_mrl_serving.client import Client
from keras_mrl_serving.errors import (
    KerasMrlError,
    MessageTooLargeError,
    ServerUnavailableError,
    error_class,
)
from keras_mrl_serving.options import Options, Tls
from tests.helpers.faulty_server import (
    FaultyServer,
    connect_to_all,
    echo,
    open_client,
    rows,
)
from tests.helpers.waiting import wait_until

Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]

SOAK = bool(os.environ.get("KERAS_MRL_SOAK"))
BOTH = pytest.mark.parametrize("kind", [Client, AsyncClient])
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


# The one table from gRPC's status to our errors.

# Every code there is, with a text that decides nothing.
CLASSES = {
    "CANCELLED": errors.ServerError,
    "UNKNOWN": errors.ServerError,
    "INVALID_ARGUMENT": errors.InvalidInputError,
    "DEADLINE_EXCEEDED": errors.DeadlineError,
    "NOT_FOUND": errors.ModelNotFoundError,
    "ALREADY_EXISTS": errors.ServerError,
    "PERMISSION_DENIED": errors.AccessDeniedError,
    "UNAUTHENTICATED": errors.AccessDeniedError,
    "RESOURCE_EXHAUSTED": errors.ServerError,
    "FAILED_PRECONDITION": errors.ServerError,
    "ABORTED": errors.ServerError,
    "UNIMPLEMENTED": errors.ServerError,
    "INTERNAL": errors.ServerError,
    "UNAVAILABLE": errors.ServerUnavailableError,
    "DATA_LOSS": errors.ServerError,
    "OUT_OF_RANGE": errors.ServerError,
    "OK": errors.ServerError,  # an error all the same
}
LATEST = "Servable not found for request: Latest(m)"
SPECIFIC = "Servable not found for request: Specific(m, 7)"
SIGNATURE = 'Serving signature key "embed_8" not found.'
NO_LABEL = "Unrecognized servable version label: beta"
TOO_LARGE = "CLIENT: Received message larger than max (1048640 vs. 1048576)"
DECIDED_BY_TEXT = {
    ("NOT_FOUND", SPECIFIC): errors.VersionNotFoundError,
    ("INVALID_ARGUMENT", NO_LABEL): errors.VersionNotFoundError,
    ("FAILED_PRECONDITION", SIGNATURE): errors.SignatureNotFoundError,
    ("RESOURCE_EXHAUSTED", TOO_LARGE): errors.MessageTooLargeError,
}


@pytest.mark.parametrize(
    "details", ["", "no.", LATEST, SPECIFIC, SIGNATURE, NO_LABEL, f"not {NO_LABEL}", TOO_LARGE]
)
def test_every_status_has_its_class_and_some_texts_another(details: str) -> None:
    classes = {code.name: error_class(code.name, details) for code in grpc.StatusCode}
    assert classes == {
        name: DECIDED_BY_TEXT.get((name, details), kind) for name, kind in CLASSES.items()
    }


class Failure(grpc.RpcError):
    """An error as grpc raises it, to the extent that it is read."""

    def __init__(self, code: str, details: str | None) -> None:
        super().__init__("as printed")
        self.status = grpc.StatusCode[code]
        self.text = details

    def code(self) -> grpc.StatusCode:
        return self.status

    def details(self) -> str | None:
        return self.text


grpc.Call.register(Failure)


def envelope(version: int | None = None, timeout_s: float = 10.0) -> Envelope:
    call = Call("embed_8", {"x": np.zeros((1, 2))})
    return Envelope("m", version, call, timeout_s / 2, timeout_s)


def test_an_error_says_the_rule_what_was_received_and_what_to_do() -> None:
    failure = Failure("NOT_FOUND", SPECIFIC)
    error = translate_error(failure, envelope(7, 2.50), "host:8500", Options(), 0.1)
    assert type(error) is errors.VersionNotFoundError
    assert str(error) == (
        "The server must have the version. Received: NOT_FOUND from host:8500 for model 'm' "
        f"version 7, signature 'embed_8', timeout 2.5 s: {SPECIFIC}. "
        "Ask without a version for the newest one."
    )
    assert vars(error) == {
        "target": "host:8500",
        "model": "m",
        "version": 7,
        "signature": "embed_8",
        "timeout_s": 2.5,
        "attempts": None,
    }


@pytest.mark.parametrize(
    ("code", "details", "rule", "remedy"),
    [
        (
            *("UNAVAILABLE", "Connection refused"),
            "A TensorFlow Serving server must answer at the target.",
            "Start one with `keras-mrl serve --model_base_path PATH --port PORT`, or correct the "
            "target.",
        ),
        (
            *("DEADLINE_EXCEEDED", "Timed out waiting for notification"),
            "An answer must come within the timeout.",
            "Send fewer rows at once, or raise Options(timeout_s=...).",
        ),
        (
            *("NOT_FOUND", LATEST),
            "The server must have the model.",
            "Give the name the server was started with, Client(target, model=NAME), and see in its "
            "log whether a version loaded.",
        ),
        (
            *("INVALID_ARGUMENT", NO_LABEL),
            "The server must have the version.",
            "Give a label that the server's model config sets, or none for the newest version.",
        ),
        (
            *("FAILED_PRECONDITION", SIGNATURE),
            "The model must have the signature.",
            "Ask a model exported by keras_mrl_export.export_saved_model with this signature; any "
            "other by Client.predict, after a look at Client.signatures().",
        ),
        (
            *("INVALID_ARGUMENT", "Missing ModelSpec"),
            "The server must accept the inputs.",
            "Send what the model's inputs ask for: Client.describe().inputs.",
        ),
        (
            *("INVALID_ARGUMENT", "Task size 33 is larger than maximum input batch size 32"),
            "The server must accept the inputs.",
            "Set Options(max_batch_size=32).",
        ),
        (
            *("UNAUTHENTICATED", "no token"),
            "The server must let the caller in.",
            "Give what it asks for: Options(metadata={'authorization': ...}), or a client "
            "certificate, Options(tls=Tls(private_key=..., certificate_chain=...)).",
        ),
        (
            *("RESOURCE_EXHAUSTED", TOO_LARGE),
            "A message must be no larger than both ends take.",
            "Send fewer rows at once, Options(max_batch_size=...), or raise the limit that is "
            "named.",
        ),
        (
            *("RESOURCE_EXHAUSTED", "Run() timeout exceeded while waiting in batching queue"),
            "The server must answer without an error.",
            "See the server's log.",
        ),
        (
            *("INTERNAL", None),
            "The server must answer without an error.",
            "See the server's log.",
        ),
        (
            *("INTERNAL", ""),
            "The server must answer without an error.",
            "See the server's log.",
        ),
    ],
)
def test_each_status_has_a_text(code: str, details: str | None, rule: str, remedy: str) -> None:
    error = translate_error(Failure(code, details), envelope(), "host:8500", Options(), 0.1)
    call = f"{code} from host:8500 for model 'm', signature 'embed_8', timeout 10 s"
    own_words = (details or "as printed").rstrip(".")
    assert str(error) == f"{rule} Received: {call}: {own_words}. {remedy}"
    assert error.version is None
    assert not isinstance(error, grpc.RpcError)


def test_an_error_without_a_status_is_unknown() -> None:
    status = Envelope("m", None, AskStatus(), 1.0, 1.0)
    error = translate_error(grpc.RpcError("broken"), status, "host:8500", Options(), 0.1)
    assert type(error) is errors.ServerError
    assert error.signature is None
    assert str(error) == (
        "The server must answer without an error. Received: UNKNOWN from host:8500 for model 'm', "
        "timeout 1 s: broken. See the server's log."
    )


@pytest.mark.parametrize(
    ("options", "took_s", "attempts"),
    [
        (Options(), 1.5, 5),  # 0.1 + 0.2 + 0.4 + 0.8
        (Options(), 1.21, 5),  # each wait may be a fifth shorter
        (Options(), 1.19, None),
        (Options(max_attempts=1), 0.0, 1),
        (Options(max_attempts=3, first_backoff_s=1.0, max_backoff_s=1.5), 1.9, None),
        (Options(max_attempts=3, first_backoff_s=1.0, max_backoff_s=1.5), 2.0, 3),
    ],
)
def test_attempts_are_known_where_there_was_time_for_all(
    options: Options, took_s: float, attempts: int | None
) -> None:
    failure = Failure("UNAVAILABLE", "busy")
    error = translate_error(failure, envelope(), "host:8500", options, took_s)
    assert error.attempts == attempts
    assert (f"after {attempts} attempts from" in str(error)) == ((attempts or 0) > 1)
    other = Failure("INTERNAL", "busy")
    assert translate_error(other, envelope(), "host:8500", options, took_s).attempts is None


# Targets.


@pytest.mark.parametrize(
    ("targets", "address"),
    [
        ("localhost:8500", "localhost:8500"),
        ("dns:///models:8500", "dns:///models:8500"),
        ("unix:/tmp/socket", "unix:/tmp/socket"),
        (["127.0.0.1:8500"], "127.0.0.1:8500"),
        (["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:1"], "ipv4:127.0.0.1:1,127.0.0.1:2"),
        (["[::1]:1", "[::1]:2"], "ipv6:[::1]:1,[::1]:2"),
    ],
)
def test_targets_become_one_address(targets: Any, address: str) -> None:
    assert channel_address(targets) == address


def no_port(target: str, example: str) -> tuple[str, str]:
    return target, (
        f"A target must be 'host:port'. Received: {target!r}. "
        f"Give the server's gRPC port, for example {example}:8500."
    )


@pytest.mark.parametrize(
    ("targets", "text"),
    [
        no_port("localhost", "localhost"),
        no_port("localhost:", "localhost"),
        no_port("birds.example.org:http", "birds.example.org:http"),
        no_port("", "localhost"),
        (["127.0.0.1:1", "models:"], no_port("models:", "models")[1]),
        (
            "one:1,two:2",
            "A target is one address. Received: 'one:1,two:2'. "
            "Give several as a list: ['one:1', 'two:2'].",
        ),
        (
            None,
            "A target is 'host:port', a list of them, or a transport. Received: NoneType. "
            "Give for example 'localhost:8500'.",
        ),
        (
            [],
            "A client needs a target. Received: an empty list. Give for example 'localhost:8500'.",
        ),
        (
            ["127.0.0.1:1", "[::1]:2"],
            "Targets of one list must all have addresses of IPv4, or all of IPv6. "
            "Received: 127.0.0.1:1, [::1]:2. "
            "Give a client to each kind, or one 'dns:///name:port'.",
        ),
    ],
)
@BOTH
def test_targets_nobody_could_reach_are_refused(
    kind: type[Any], targets: Any, text: str, refuses: Refuses
) -> None:
    with refuses(ValueError, text):
        kind(targets)


def test_a_target_of_a_list_without_an_address_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be a host with an address\. Received: 'a b:1' \("):
        channel_address(["127.0.0.1:1", "a b:1"])


@pytest.mark.parametrize("target", ["dns:///localhost:{}", "localhost:{}", "ipv4:127.0.0.1:{}"])
@BOTH
def test_names_of_targets(kind: type[Any], target: str) -> None:
    with FaultyServer() as server, open_client(kind, target.format(server.port)) as client:
        assert client.embed(rows(3), 2).shape == (3, 2)
        assert client.target == target.format(server.port)
        with pytest.raises(KerasMrlError) as caught:
            client.status()
    assert caught.value.target == target.format(server.port)


@BOTH
def test_a_unix_socket(kind: type[Any]) -> None:
    # Not pytest's folder: a socket's path has room for 107 bytes.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        with FaultyServer(address=f"unix:{folder}/s") as server:
            with open_client(kind, f"unix:{folder}/s") as client:
                assert client.embed(rows(3), 2).shape == (3, 2)
            assert len(server.requests) == 2


@BOTH
def test_targets_of_a_list_take_turns(kind: type[Any]) -> None:
    with FaultyServer() as one, FaultyServer() as other:
        with open_client(kind, [one.target, other.target]) as client:
            connect_to_all(client, one, other)
            before = len(one.requests), len(other.requests)
            for _ in range(20):
                client.describe()
        assert len(one.requests) - before[0] == len(other.requests) - before[1] == 10


@BOTH
def test_a_target_of_a_list_that_is_not_there_is_passed_over(kind: type[Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        nobody = f"127.0.0.1:{free.getsockname()[1]}"
    with FaultyServer() as server, open_client(kind, [nobody, server.target]) as client:
        for _ in range(20):
            client.describe()
        assert len(server.requests) == 20


# TLS.

CA = trustme.CA()
SERVER = CA.issue_cert("127.0.0.1")
NAMED = CA.issue_cert("birds.example.org")
CLIENT = CA.issue_cert("client@example.org")
STRANGER = trustme.CA().issue_cert("stranger@example.org")


def pem(pair: trustme.LeafCert) -> tuple[bytes, bytes]:
    return pair.private_key_pem.bytes(), b"".join(c.bytes() for c in pair.cert_chain_pems)


def guarded(pair: trustme.LeafCert = SERVER, *, mutual: bool = False) -> FaultyServer:
    """A server that speaks TLS, and with `mutual` asks who its clients are."""
    roots = CA.cert_pem.bytes() if mutual else None
    return FaultyServer(credentials=grpc.ssl_server_credentials([pem(pair)], roots, mutual))


def trusting(ca: trustme.CA = CA, pair: trustme.LeafCert | None = None) -> Options:
    key, chain = pem(pair) if pair else (None, None)
    tls = Tls(root_certificates=ca.cert_pem.bytes(), private_key=key, certificate_chain=chain)
    return Options(tls=tls, max_attempts=1)


def assert_unavailable(client: Any, target: str) -> str:
    """The error names the call, and what gRPC knows of the reason."""
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
def test_tls(kind: type[Any]) -> None:
    with guarded() as server:
        with open_client(kind, server.target, trusting()) as client:
            assert client.embed(rows(3), 2).shape == (3, 2)
        with open_client(kind, server.target, trusting(trustme.CA())) as client:
            assert "CERTIFICATE_VERIFY_FAILED" in assert_unavailable(client, server.target)
        with open_client(kind, server.target, Options(max_attempts=1)) as client:  # in the clear
            assert_unavailable(client, server.target)
    with FaultyServer() as clear, open_client(kind, clear.target, trusting()) as client:
        assert_unavailable(client, clear.target)


@BOTH
def test_mutual_tls_lets_in_whom_its_ca_knows(kind: type[Any], tmp_path: Path) -> None:
    CA.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    (tmp_path / "key.pem").write_bytes(pem(CLIENT)[0])
    (tmp_path / "chain.pem").write_bytes(pem(CLIENT)[1])
    files = Tls.from_files(tmp_path / "ca.pem", tmp_path / "key.pem", tmp_path / "chain.pem")
    with guarded(mutual=True) as server:
        for options in (trusting(pair=CLIENT), Options(tls=files)):
            with open_client(kind, server.target, options) as client:
                assert client.embed(rows(3), 2).shape == (3, 2)
        for options in (trusting(), trusting(pair=STRANGER)):
            with open_client(kind, server.target, options) as client:
                assert_unavailable(client, server.target)
        assert len(server.requests) == 4  # those of the first two clients


@BOTH
def test_the_name_in_a_certificate_may_be_given(kind: type[Any]) -> None:
    tls = Tls(root_certificates=CA.cert_pem.bytes(), server_name="birds.example.org")
    with guarded(NAMED) as server:
        with open_client(kind, server.target, Options(tls=tls)) as client:
            assert client.embed(rows(3), 2).shape == (3, 2)
        with open_client(kind, server.target, trusting()) as client:
            assert_unavailable(client, server.target)


# Settings: retries, deadlines, metadata, compression, keepalive, message sizes, interceptors.


def test_the_options_are_in_the_channel_s_service_config() -> None:
    def retry_policy(options: Options) -> Any:
        config = json.loads(dict(channel_arguments(options))["grpc.service_config"])
        (method,) = config["methodConfig"]
        return method.get("retryPolicy")

    assert retry_policy(Options(max_attempts=3, first_backoff_s=0.25, max_backoff_s=1e9)) == {
        "maxAttempts": 3,
        "initialBackoff": "0.250s",
        "maxBackoff": "86400.000s",  # the longest that gRPC reads
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    assert retry_policy(Options(max_attempts=1)) is None
    arguments = dict(channel_arguments(Options()))
    assert arguments["grpc.max_reconnect_backoff_ms"] == 5000  # of a server that was restarted


def test_a_call_has_the_time_that_remains_of_the_answer() -> None:
    call = Call("embed_2", {"x": rows(1)})
    sent = Envelope("default", None, call, remaining_s=5.0, timeout_s=20.0)
    with FaultyServer() as server:
        transport = GrpcTransport(server.target, Options(timeout_s=20.0))
        transport.send(sent)
        transport.close()

        async def main() -> None:
            transport = AioTransport(server.target, Options(timeout_s=20.0))
            await transport.send_async(sent)
            await transport.close_async()

        asyncio.run(main())
    for request in server.requests:
        assert 0 < request.remaining_s < 5.5  # gRPC rounds up
    assert len(server.requests) == 2


@pytest.mark.parametrize("timeout_s", [1e9, 1e10, 1e300])
@BOTH
def test_a_timeout_past_what_grpc_can_count_is_a_long_one(
    kind: type[Any], timeout_s: float
) -> None:
    """gRPC counts deadlines in nanoseconds since 1970: one after 2262 would be over at once."""
    options = Options(timeout_s=timeout_s)
    with FaultyServer() as server, open_client(kind, server.target, options) as client:
        assert client.embed(rows(3), 2).shape == (3, 2)


@BOTH
def test_metadata_arrives_with_every_call(kind: type[Any]) -> None:
    options = Options(metadata={"authorization": "Bearer 5e1f", "x-team": "birds"})
    with FaultyServer() as server, open_client(kind, server.target, options) as client:
        client.embed(rows(3), 2)
    assert len(server.requests) == 2
    for request in server.requests:
        assert request.headers["authorization"] == "Bearer 5e1f"
        assert request.headers["x-team"] == "birds"


@BOTH
def test_metadata_may_be_made_for_each_call(kind: type[Any]) -> None:
    tokens = iter(range(100))
    options = Options(
        metadata=lambda: {"authorization": f"Bearer {next(tokens)}"},
        max_batch_size=1,
        max_in_flight=1,
    )
    with FaultyServer() as server, open_client(kind, server.target, options) as client:
        client.embed(rows(3), 2)
    headers = [request.headers["authorization"] for request in server.requests]
    assert headers == [f"Bearer {n}" for n in range(4)]


class Wire:
    """A proxy between a client and a server, which keeps the bytes that the client writes."""

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
            assert b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".startswith(data[:24])
            at = 24
            while at + 9 <= len(data):
                length = int.from_bytes(data[at : at + 3])
                if at + 9 + length > len(data):
                    break
                yield data[at + 3], data[at + 4], data[at + 9 : at + 9 + length]
                at += 9 + length

    def pings(self) -> int:
        return sum(frame == PING and not flags & ACK for frame, flags, _ in self.frames())

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
    def _copy(source: socket.socket, sink: socket.socket, copy: bytearray) -> None:
        try:
            while data := source.recv(1 << 16):
                copy += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:  # the other side is gone
            return


DATA, PING, ACK = 0, 6, 1


@pytest.mark.parametrize("compress", [False, True])
@BOTH
def test_requests_are_sent_with_gzip_if_the_options_say_so(kind: type[Any], compress: bool) -> None:
    x = rows(1000)
    x[:, 0] = 1
    with FaultyServer() as server, Wire(server.port) as wire:
        with open_client(kind, wire.target, Options(compress=compress)) as client:
            assert client.embed(x, 2).shape == (1000, 2)
        data = [payload for frame, _, payload in wire.frames() if frame == DATA and payload]
    gzips = [payload for payload in data if payload[0] == 1 and payload[5:8] == b"\x1f\x8b\x08"]
    sent_bytes = sum(map(len, data))
    if compress:
        assert gzips
        assert sent_bytes < x.nbytes / 10
    else:
        assert not gzips
        assert sent_bytes > x.nbytes


@BOTH
def test_an_idle_client_sends_pings_only_if_the_options_say_so(kind: type[Any]) -> None:
    keepalive = Options(keepalive_s=0.2)
    with (
        FaultyServer() as server,
        Wire(server.port) as silent_wire,
        Wire(server.port) as wire,
        open_client(kind, silent_wire.target) as silent,
        open_client(kind, wire.target, keepalive) as client,
    ):
        silent.describe()
        client.describe()
        wait_until(lambda: wire.pings() >= 3)  # the first measures the line
        assert silent_wire.pings() <= 1


@BOTH
def test_an_answer_larger_than_the_limit_is_refused(kind: type[Any]) -> None:
    def verbose(call: Any) -> Any:
        answer = echo(1)(call)
        if call.signature == "embed_2":
            return {**answer, "surplus": np.zeros((len(call.inputs["x"]), 1000), np.float32)}
        return answer

    limit = Options(max_message_bytes=2048)
    with FaultyServer({1: verbose}) as server, open_client(kind, server.target, limit) as client:
        with pytest.raises(MessageTooLargeError, match=r" RESOURCE_EXHAUSTED from ") as caught:
            client.embed(rows(1), 2)
        assert len(server.requests_of("embed_2")) == 1
    assert re.search(r"larger than max \(\d+ vs. 2048\)", str(caught.value))


class Interceptor(grpc.UnaryUnaryClientInterceptor):
    def __init__(self) -> None:
        self.methods: list[str] = []

    def intercept_unary_unary(
        self, continuation: Callable[..., Any], client_call_details: Any, request: Any
    ) -> Any:
        self.methods.append(client_call_details.method)
        return continuation(client_call_details, request)


class AioInterceptor(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self) -> None:
        self.methods: list[str] = []

    async def intercept_unary_unary(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        method = client_call_details.method
        self.methods.append(method.decode() if isinstance(method, bytes) else method)
        return await continuation(client_call_details, request)


PREDICT = "/tensorflow.serving.PredictionService/Predict"


@pytest.mark.parametrize(
    ("kind", "interceptor"), [(Client, Interceptor), (AsyncClient, AioInterceptor)]
)
def test_interceptors_see_every_call(kind: type[Any], interceptor: type[Any]) -> None:
    first, second = interceptor(), interceptor()
    options = Options(interceptors=(first, second), max_batch_size=2)
    with FaultyServer() as server, open_client(kind, server.target, options) as client:
        assert client.embed(rows(5), 2)[:, 0].tolist() == [1, 2, 3, 4, 5]
        with pytest.raises(KerasMrlError):
            client.status()  # which this server lacks
    for each in (first, second):
        assert each.methods == [
            *[PREDICT] * 4,
            "/tensorflow.serving.ModelService/GetModelStatus",
        ]


@pytest.mark.parametrize(
    ("kind", "interceptor", "expected"),
    [
        (Client, AioInterceptor(), "grpc.UnaryUnaryClientInterceptor"),
        (AsyncClient, Interceptor(), "grpc.aio.ClientInterceptor"),
        (Client, len, "grpc.UnaryUnaryClientInterceptor"),
    ],
)
def test_interceptors_of_the_other_client_are_refused(
    kind: type[Any], interceptor: Any, expected: str, refuses: Refuses
) -> None:
    text = (
        f"An interceptor must be a {expected}. Received: {type(interceptor).__name__}. "
        "Give a Client those of grpc, and an AsyncClient those of grpc.aio."
    )
    with refuses(ValueError, text):
        kind("localhost:8500", options=Options(interceptors=(interceptor,)))
