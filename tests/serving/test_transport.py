"""The transport: gRPC's errors as ours, targets, and channels as the options say."""

import asyncio
import os
import re
import socket
import socketserver
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme

from keras_mrl_serving import errors
from keras_mrl_serving._targets import Proxy
from keras_mrl_serving._transport import AioTransport, GrpcTransport, translate_error
from keras_mrl_serving.aio import AsyncClient
from keras_mrl_serving.calls import AskStatus, Call, Envelope
from keras_mrl_serving.client import Client
from keras_mrl_serving.errors import (
    DeadlineError,
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
from tests.helpers.proxies import ConnectProxy, Relay
from tests.helpers.waiting import wait_until

Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]

SOAK = bool(os.environ.get("KERAS_MRL_SOAK"))
BOTH = pytest.mark.parametrize("kind", [Client, AsyncClient])
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


# The one table from gRPC's status to our errors.

# Every code there is, with a text that decides nothing.
CLASSES = {
    "CANCELLED": errors.ServerUnavailableError,
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
    error = translate_error(failure, envelope(7, 2.50), "host:8500")
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
        "attempts": 1,
    }


@pytest.mark.parametrize(
    ("code", "details", "rule", "remedy"),
    [
        (
            *("UNAVAILABLE", "Connection refused"),
            "A TensorFlow Serving server must answer at the target.",
            errors.NO_SERVER_REMEDY,
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
            "named; the client's is Options(max_message_bytes=...).",
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
    error = translate_error(Failure(code, details), envelope(), "host:8500")
    call = f"{code} from host:8500 for model 'm', signature 'embed_8', timeout 10 s"
    own_words = (details or "as printed").rstrip(".")
    assert str(error) == f"{rule} Received: {call}: {own_words}. {remedy}"
    assert error.version is None
    assert not isinstance(error, grpc.RpcError)


def test_an_error_without_a_status_is_unknown() -> None:
    status = Envelope("m", None, AskStatus(), 1.0, 1.0)
    error = translate_error(grpc.RpcError("broken"), status, "host:8500")
    assert type(error) is errors.ServerError
    assert error.signature is None
    assert str(error) == (
        "The server must answer without an error. Received: UNKNOWN from host:8500 for model 'm', "
        "timeout 1 s: broken. See the server's log."
    )


@pytest.mark.parametrize("code", ["UNAVAILABLE", "INTERNAL"])
def test_an_error_says_how_often_the_call_was_sent(code: str) -> None:
    for attempts in (1, 2):
        error = translate_error(Failure(code, "busy"), envelope(), "host:8500", attempts=attempts)
        assert error.attempts == attempts
        assert (f" {code} after {attempts} attempts from " in str(error)) == (attempts > 1)


def test_words_of_a_server_are_no_cause() -> None:
    """A proxy of the server's side says so of the connection behind it."""
    text = "upstream connect error: TLS_error CERTIFICATE_VERIFY_FAILED, HTTP_REQUEST"
    error = translate_error(Failure("UNAVAILABLE", text), envelope(), "host:8500")
    assert str(error).endswith(f": {text}. {errors.NO_SERVER_REMEDY}")


def test_an_error_behind_a_proxy_names_the_proxy() -> None:
    proxy = Proxy("http_proxy", "proxy.example.org:3128")
    without = "To go without the proxy, name the target in no_proxy, or give Options(proxy=False)."
    for code, details, remedy in (
        ("UNAVAILABLE", "Connection refused", without),
        (
            *("DEADLINE_EXCEEDED", "Deadline Exceeded"),
            "Send fewer rows at once, or raise Options(timeout_s=...). Where a network forgets "
            "connections that are idle, set Options(keepalive_s=...) to what the server allows. "
            + without,
        ),
    ):
        error = translate_error(Failure(code, details), envelope(), "host:8500", proxy=proxy)
        through = "(through the proxy proxy.example.org:3128 of http_proxy)"
        assert str(error).endswith(f" {through}. {remedy}")
    refused = Failure("NOT_FOUND", LATEST)
    assert str(translate_error(refused, envelope(), "host:8500", proxy=proxy)) == str(
        translate_error(refused, envelope(), "host:8500")
    )


# Targets.


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
EXPIRED = CA.issue_cert(
    "127.0.0.1",
    not_before=datetime(2019, 1, 1, tzinfo=UTC),
    not_after=datetime(2020, 1, 1, tzinfo=UTC),
)
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
    return Options(tls=tls)


def assert_unavailable(client: Any, target: str, words: str, remedy: str) -> None:
    """The error names the call, the reason in gRPC's words, and what to do about it."""
    with pytest.raises(ServerUnavailableError) as caught:
        client.describe()
    assert re.fullmatch(
        r"A TensorFlow Serving server must answer at the target\. Received: UNAVAILABLE from "
        rf"{re.escape(target)} for model 'default', signature 'describe', timeout 10 s: "
        rf"[^\n]*{words}[^\n]*\. {re.escape(remedy)}",
        str(caught.value),
    )
    assert caught.value.attempts == 1


AUTHORITY = (
    "CERTIFICATE_VERIFY_FAILED",
    "Give the authority that signed the server's certificate: "
    "Options(tls=Tls(root_certificates=...)).",
)
OUT_OF_DATE = (
    "certificate has expired",
    "The server's certificate is out of date: renew it, or set the clock of this machine.",
)
NO_TLS = (
    "WRONG_VERSION_NUMBER",
    "No TLS is spoken at this port: leave out Options(tls=...), or give a port with TLS.",
)
NAME = (
    "Hostname Verification Check failed",
    "The server's certificate bears another name than the target: give it by "
    "Options(tls=Tls(server_name=...)).",
)
HUNG_UP = (
    "Socket closed",
    "The server hung up before it spoke gRPC. If it asks for TLS, give "
    "Options(tls=Tls(root_certificates=...)); if for a certificate of its clients, add "
    "private_key=... and certificate_chain=....",
)
WITH_TLS = (
    "TLS is spoken at this port: give Options(tls=Tls(root_certificates=...)). If the server asks "
    "who its clients are, add private_key=... and certificate_chain=...."
)
NO_GRPC = (
    "Expected SETTINGS frame as the first frame",
    "No gRPC is spoken at this port. TensorFlow Serving has one port for gRPC (8500) and another "
    "for REST (8501): give that of gRPC.",
)


@BOTH
def test_tls(kind: type[Any]) -> None:
    with guarded() as server, open_client(kind, server.target, trusting()) as client:
        assert client.embed(rows(3), 2).shape == (3, 2)


@BOTH
def test_what_cannot_get_better_is_named_and_sent_once(kind: type[Any]) -> None:
    with guarded() as server, open_client(kind, server.target, trusting(trustme.CA())) as client:
        assert_unavailable(client, server.target, *AUTHORITY)
    with guarded(EXPIRED) as server, open_client(kind, server.target, trusting()) as client:
        assert_unavailable(client, server.target, *OUT_OF_DATE)
    with guarded(NAMED) as server, open_client(kind, server.target, trusting()) as client:
        assert_unavailable(client, server.target, *NAME)
    with FaultyServer() as clear, open_client(kind, clear.target, trusting()) as client:
        assert_unavailable(client, clear.target, *NO_TLS)


@pytest.mark.parametrize(
    "answer", [b"<!DOCTYPE HTML>", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n"]
)
@BOTH
def test_a_port_without_grpc_is_named_and_asked_once(kind: type[Any], answer: bytes) -> None:
    with answering(answer) as target, open_client(kind, target) as client:
        assert_unavailable(client, target, *NO_GRPC)


@BOTH
def test_an_alert_of_tls_is_named(kind: type[Any]) -> None:
    with answering(bytes.fromhex("15030300020246") + bytes(40)) as target:
        with open_client(kind, target) as client:
            assert_unavailable(client, target, "got frame type 0", WITH_TLS)


@pytest.mark.parametrize("mutual", [False, True])
@BOTH
def test_a_server_that_hangs_up_is_asked_whether_it_speaks_tls(
    kind: type[Any], mutual: bool
) -> None:
    """If so, another attempt would fail as well."""
    with guarded(mutual=mutual) as server, open_client(kind, server.target) as client:
        assert_unavailable(client, server.target, "Socket closed", WITH_TLS)


@BOTH
def test_a_server_that_hangs_up_and_speaks_no_tls_is_tried_again(kind: type[Any]) -> None:
    quick = Options(max_attempts=2, first_backoff_s=0.01)
    with answering(b"") as target, open_client(kind, target, quick) as client:
        with pytest.raises(ServerUnavailableError) as caught:
            client.describe()
    assert caught.value.attempts == 2
    assert str(caught.value).endswith(HUNG_UP[1])


@BOTH
def test_the_error_of_one_address_of_localhost_names_the_other(kind: type[Any]) -> None:
    with socket.socket(socket.AF_INET6) as held:  # bound, and not listening
        held.bind(("::1", 0))
        target = f"[::1]:{held.getsockname()[1]}"
        with open_client(kind, target, Options(max_attempts=1)) as client:
            remedy = (
                f"{errors.NO_SERVER_REMEDY} If the target is localhost, 127.0.0.1 was tried too: "
                "give that, to see its own error."
            )
            assert_unavailable(client, target, "Connection refused", remedy)


@contextmanager
def answering(answer: bytes) -> Iterator[str]:
    """A port that answers every connection with these bytes."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(1 << 16)
            self.request.sendall(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


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
            options = replace(options, max_attempts=1)
            with open_client(kind, server.target, options) as client:
                assert_unavailable(client, server.target, *HUNG_UP)
        assert len(server.requests) == 4  # those of the first two clients


@BOTH
def test_the_name_in_a_certificate_may_be_given(kind: type[Any]) -> None:
    tls = Tls(root_certificates=CA.cert_pem.bytes(), server_name="birds.example.org")
    with guarded(NAMED) as server:
        with open_client(kind, server.target, Options(tls=tls)) as client:
            assert client.embed(rows(3), 2).shape == (3, 2)


# Proxies.


@pytest.fixture
def proxy_variables(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets the variables that name proxies; others are not there."""

    def set_only(**value_by_name: str) -> None:
        for name in list(os.environ):
            if name.lower().endswith("_proxy"):
                monkeypatch.delenv(name)
        for name, value in value_by_name.items():
            monkeypatch.setenv(name, value)

    return set_only


FAR = "birds.example.org:8500"  # nobody looks it up but a proxy


@pytest.mark.parametrize("variable", ["grpc_proxy", "https_proxy", "http_proxy"])
@BOTH
def test_a_proxy_of_the_environment_is_asked(
    kind: type[Any], variable: str, proxy_variables: Callable[..., None]
) -> None:
    with FaultyServer() as server, ConnectProxy(server.port) as proxy:
        proxy_variables(**{variable: f"http://birds:5e1f@{proxy.target}"})
        with open_client(kind, FAR) as client:
            assert client.embed(rows(3), 2).shape == (3, 2)
        assert proxy.asked == [FAR]
        assert proxy.credentials == ["birds:5e1f"]


@BOTH
def test_metadata_that_are_too_long_are_named(kind: type[Any]) -> None:
    long = Options(metadata={"authorization": "s3cret" * 4000})
    with FaultyServer() as server, open_client(kind, server.target, long) as client:
        with pytest.raises(errors.MessageTooLargeError) as caught:
            client.describe()
    assert "s3cret" not in str(caught.value)
    assert str(caught.value).endswith(
        ". Shorten what Options(metadata=...) sends: a gRPC server takes 8 KiB of metadata unless "
        "its grpc.max_metadata_size says more."
    )


@BOTH
def test_no_half_of_a_proxy_s_password_is_repeated(
    kind: type[Any], proxy_variables: Callable[..., None]
) -> None:
    proxy_variables(http_proxy="http://birds:sE/cReT@127.0.0.1:1")
    with open_client(kind, FAR, Options(max_attempts=1)) as client:
        with pytest.raises(ServerUnavailableError) as caught:
            client.describe()
    assert "sE" not in "".join(traceback.format_exception(caught.value))
    assert str(caught.value).endswith(
        ": no connection was made (through the proxy of http_proxy). Write http_proxy as "
        "http://NAME:PASSWORD@HOST:PORT, with characters such as /, ? and # of the password as "
        "%2F, %3F and %23. To go without the proxy, name the target in no_proxy, or give "
        "Options(proxy=False)."
    )


@BOTH
def test_a_proxy_that_grpc_does_not_take_is_named(
    kind: type[Any], proxy_variables: Callable[..., None]
) -> None:
    proxy_variables(http_proxy="socks5://birds:5e1f@127.0.0.1:1")
    with open_client(kind, "nobody.invalid:1", Options(max_attempts=1)) as client:
        with pytest.raises(ServerUnavailableError) as caught:
            client.describe()
    assert "5e1f" not in str(caught.value)
    assert str(caught.value).endswith(
        "(asked directly: http_proxy is not taken). Give a host that has an address here. gRPC "
        "asks proxies of http:// alone: give http_proxy as http://HOST:PORT, or "
        "Options(proxy=False) to go without."
    )


@pytest.mark.parametrize("no_proxy", ["", "*", "other.example.org,127.0.0.1"])
@BOTH
def test_no_proxy_is_asked_for_this_machine(
    kind: type[Any], no_proxy: str, proxy_variables: Callable[..., None]
) -> None:
    with FaultyServer() as server, FaultyServer() as other, ConnectProxy(server.port) as proxy:
        proxy_variables(http_proxy=f"http://{proxy.target}", no_proxy=no_proxy)
        for target in (
            server.target,
            f"localhost:{server.port}",
            f"ipv4:127.0.0.1:{server.port}",
            [server.target, other.target],
        ):
            with open_client(kind, target) as client:
                assert client.embed(rows(3), 2).shape == (3, 2)
        assert proxy.connections == 0


@BOTH
def test_the_options_turn_proxies_off(
    kind: type[Any], proxy_variables: Callable[..., None]
) -> None:
    with ConnectProxy(1) as proxy:
        proxy_variables(http_proxy=f"http://{proxy.target}")
        with open_client(kind, "nobody.invalid:1", Options(proxy=False, max_attempts=1)) as client:
            with pytest.raises(ServerUnavailableError, match=r"errors resolving nobody\.invalid"):
                client.describe()
        assert proxy.connections == 0


@pytest.mark.parametrize(
    ("status", "attempts", "remedy"),
    [
        (
            *("407 Proxy Authentication Required", 1),
            "Give the proxy a name and a password in its variable: http://NAME:PASSWORD@HOST:PORT.",
        ),
        ("403 Forbidden", 1, "Let the proxy allow CONNECT to the target."),
        ("501 Not Implemented", 1, "Let the proxy allow CONNECT to the target."),
        (
            *("502 Bad Gateway", 2),
            "See whether a server runs at the target, and whether the proxy reaches it.",
        ),
    ],
)
@BOTH
def test_a_proxy_that_refuses_is_named(
    kind: type[Any],
    status: str,
    attempts: int,
    remedy: str,
    proxy_variables: Callable[..., None],
) -> None:
    with ConnectProxy(1, status) as proxy:
        proxy_variables(https_proxy=f"http://birds:5e1f@{proxy.target}")
        with open_client(kind, FAR, Options(max_attempts=2)) as client:
            with pytest.raises(ServerUnavailableError) as caught:
                client.describe()
    text = str(caught.value)
    assert caught.value.attempts == attempts
    assert f"HTTP proxy returned response code {status[:3]}" in text
    assert text.endswith(
        f" (through the proxy {proxy.target} of https_proxy). {remedy} To go without the proxy, "
        "name the target in no_proxy, or give Options(proxy=False)."
    )
    assert "5e1f" not in text


@BOTH
def test_a_proxy_that_is_silent_or_away_is_named(
    kind: type[Any], proxy_variables: Callable[..., None]
) -> None:
    with ConnectProxy(1, "") as proxy:
        proxy_variables(http_proxy=f"http://{proxy.target}")
        with open_client(kind, FAR, Options(timeout_s=0.3)) as client:
            with pytest.raises(DeadlineError) as caught:
                client.describe()
    through = f"(through the proxy {proxy.target} of http_proxy)"
    assert f"no connection was made {through}. See whether" in str(caught.value)
    with open_client(kind, FAR, Options(max_attempts=1)) as client:
        with pytest.raises(ServerUnavailableError) as refused:
            client.describe()
    assert str(refused.value).endswith(
        f"Connection refused {through}. To go without the proxy, name the target in no_proxy, or "
        "give Options(proxy=False)."
    )


# Settings: retries, deadlines, metadata, compression, keepalive, message sizes, interceptors.


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


DATA, PING, ACK = 0, 6, 1


def frames(relay: Relay) -> Iterator[tuple[int, int, bytes]]:
    """Type, flags and payload of each whole frame of HTTP/2 that clients have written."""
    for written in relay.written:
        data = bytes(written)
        assert b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".startswith(data[:24])
        at = 24
        while at + 9 <= len(data):
            length = int.from_bytes(data[at : at + 3])
            if at + 9 + length > len(data):
                break
            yield data[at + 3], data[at + 4], data[at + 9 : at + 9 + length]
            at += 9 + length


def pings(relay: Relay) -> int:
    return sum(frame == PING and not flags & ACK for frame, flags, _ in frames(relay))


@pytest.mark.parametrize("compress", [False, True])
@BOTH
def test_requests_are_sent_with_gzip_if_the_options_say_so(kind: type[Any], compress: bool) -> None:
    x = rows(1000)
    x[:, 0] = 1
    with FaultyServer() as server, Relay(server.port) as relay:
        with open_client(kind, relay.target, Options(compress=compress)) as client:
            assert client.embed(x, 2).shape == (1000, 2)
        data = [payload for frame, _, payload in frames(relay) if frame == DATA and payload]
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
        Relay(server.port) as silent_relay,
        Relay(server.port) as relay,
        open_client(kind, silent_relay.target) as silent,
        open_client(kind, relay.target, keepalive) as client,
    ):
        silent.describe()
        client.describe()
        wait_until(lambda: pings(relay) >= 3)  # the first measures the line
        assert pings(silent_relay) <= 1


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
