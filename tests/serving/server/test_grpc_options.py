"""Channel arguments, a Unix domain socket, TLS and the health service."""

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from keras_mrl_serving.server.grpc_options import (
    add_health,
    server_credentials,
    server_options,
    socket_address,
)

TIMEOUT_S = 60.0
DEFAULTS = (
    ("grpc.max_receive_message_length", 2**31 - 1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_allowed_incoming_connections", 1000),
    ("grpc.max_concurrent_streams", 100),
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.so_reuseport", 0),
)


@contextmanager
def healthy(
    address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None
) -> Iterator[str]:
    """A server with the health service alone; its address."""
    server = grpc.server(ThreadPoolExecutor(2), options=server_options())
    add_health(server)
    if credentials is None:
        port = server.add_insecure_port(address)
    else:
        port = server.add_secure_port(address, credentials)
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def check(target: str, service: str = "", credentials: Any = None) -> str:
    channel = (
        grpc.secure_channel(target, credentials) if credentials else grpc.insecure_channel(target)
    )
    with channel:
        request = health_pb2.HealthCheckRequest(service=service)
        response = health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT_S)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", DEFAULTS),
        (
            "grpc.max_connection_age_ms=60000",
            (*DEFAULTS, ("grpc.max_connection_age_ms", 60000)),
        ),
        (
            "grpc.so_reuseport=1,grpc.primary_user_agent=a=b,x=-3,y=,z=99999999999",
            (
                *DEFAULTS[:-1],
                ("grpc.so_reuseport", 1),
                ("grpc.primary_user_agent", "a=b"),
                ("x", -3),
                ("y", ""),
                ("z", "99999999999"),
            ),
        ),
    ],
)
def test_channel_arguments(text: str, options: tuple[tuple[str, int | str], ...]) -> None:
    assert server_options(text) == options
    grpc.server(ThreadPoolExecutor(1), options=server_options(text)).stop(None).wait()


@pytest.mark.parametrize(
    ("text", "received"), [("a=1,b", "b"), ("=1", "=1"), ("a=1,,b=2", ""), ("a=1,", "")]
)
def test_text_that_is_no_channel_argument(text: str, received: str) -> None:
    with pytest.raises(ValueError, match="key=value pairs") as caught:
        server_options(text)
    assert str(caught.value) == (
        "grpc_channel_arguments must be key=value pairs with commas between. Received: "
        f"{received!r} in grpc_channel_arguments={text!r}. Write them as in "
        "grpc.max_connection_age_ms=60000,grpc.so_reuseport=1."
    )


def test_the_services_of_tensorflow_serving_are_healthy_and_no_others() -> None:
    with healthy() as target:
        for service in ("", "ModelService", "PredictionService"):
            assert check(target, service) == "SERVING"
        with pytest.raises(grpc.RpcError) as caught:
            check(target, "SessionService")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_watching_takes_no_thread_of_the_server() -> None:
    with healthy() as target, grpc.insecure_channel(target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watches = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S) for _ in range(4)]
        assert [next(watch).status for watch in watches] == [1] * 4
        assert check(target) == "SERVING"


def test_a_socket_serves_and_may_be_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "grpc.sock"
    assert socket_address(str(path)) == f"unix:{path}"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    with healthy(socket_address(str(path))):
        assert path.is_socket()
        assert check(f"unix:{path}") == "SERVING"


def test_where_no_socket_can_be(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OSError, match="must be free") as taken:
        socket_address(str(file))
    assert str(taken.value) == (
        f"grpc_socket_path must be free. Received: grpc_socket_path={str(file)!r}, where something "
        "stands that is no socket. Remove it, or choose another path."
    )
    long = "/" + "ü" * 60
    with pytest.raises(OSError, match="at most 107 bytes") as caught:
        socket_address(long)
    assert str(caught.value) == (
        f"grpc_socket_path must be at most 107 bytes. Received: grpc_socket_path={long!r}, "
        "121 bytes. Choose a shorter one, under /tmp for example."
    )


CA = trustme.CA()
SERVER = CA.issue_cert("127.0.0.1")
CLIENT = CA.issue_cert("client@example.org")
STRANGER = trustme.CA().issue_cert("stranger@example.org")


def key_of(pair: trustme.LeafCert) -> bytes:
    return pair.private_key_pem.bytes()


def chain_of(pair: trustme.LeafCert) -> bytes:
    return b"".join(pem.bytes() for pem in pair.cert_chain_pems)


def escaped(pem: bytes) -> str:
    return pem.decode().replace("\n", "\\n")


def pasted(pem: bytes) -> str:
    return pem.decode()


def ssl_config(
    form: Callable[[bytes], str] = escaped,
    *,
    key: bytes = key_of(SERVER),
    cert: bytes = chain_of(SERVER),
    ca: bytes = b"",
    client_verify: bool = False,
) -> str:
    lines = [f'server_key: "{form(key)}"', f"server_cert: '{form(cert)}'  # it's \"ours\""]
    if ca:
        lines.append(f'custom_ca: "{form(ca)}"')
    return "\n".join([*lines, f"client_verify: {str(client_verify).lower()}"])


def trusting(pair: trustme.LeafCert | None = None) -> grpc.ChannelCredentials:
    root = CA.cert_pem.bytes()
    if pair is None:
        return grpc.ssl_channel_credentials(root)
    return grpc.ssl_channel_credentials(root, key_of(pair), chain_of(pair))


def is_refused(target: str, credentials: grpc.ChannelCredentials | None) -> bool:
    with pytest.raises(grpc.RpcError) as caught:
        check(target, credentials=credentials)
    return caught.value.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize("form", [escaped, pasted])
def test_the_port_speaks_tls_and_nothing_else(tmp_path: Path, form: Callable[[bytes], str]) -> None:
    file = tmp_path / "tls.txt"
    file.write_text(ssl_config(form))
    with healthy(credentials=server_credentials(str(file))) as target:
        assert check(target, credentials=trusting()) == "SERVING"
        assert is_refused(target, None)
        unknown = grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes())
        assert is_refused(target, unknown)


def test_client_verify_asks_for_a_certificate_of_the_custom_ca(tmp_path: Path) -> None:
    file = tmp_path / "tls.txt"
    file.write_text(ssl_config(ca=CA.cert_pem.bytes(), client_verify=True))
    with healthy(credentials=server_credentials(str(file))) as target:
        assert check(target, credentials=trusting(CLIENT)) == "SERVING"
        assert is_refused(target, trusting())
        assert is_refused(target, trusting(STRANGER))


NOT_PARSED = "Error parsing text-format tensorflow.serving.SSLConfig: "
NOT_A_PAIR = "server_key and server_cert are no PEM pair: "


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("server_key: a", f"{NOT_PARSED}1:13: Expected string, got: a. "),
        ('server_keys: "a"', f'{NOT_PARSED}1:12: Message type "tensorflow.serving.SSLConfig" '),
        ("", NOT_A_PAIR),
        (ssl_config(key=b"key"), NOT_A_PAIR),
        (ssl_config(key=chain_of(SERVER), cert=key_of(SERVER)), NOT_A_PAIR),
        (ssl_config(key=key_of(SERVER) + chain_of(SERVER), cert=b""), NOT_A_PAIR),
        (ssl_config(key=b"", cert=key_of(SERVER) + chain_of(SERVER)), NOT_A_PAIR),
        (ssl_config(key=key_of(CLIENT)), f"{NOT_A_PAIR}[X509: KEY_VALUES_MISMATCH]"),
        (ssl_config(cert=b"-----BEGIN CERTIFICATE-----\n"), NOT_A_PAIR),
        (ssl_config(ca=b"authority"), "custom_ca is no PEM certificate: "),
        (
            ssl_config(client_verify=True),
            "client_verify without a custom_ca to verify clients with. ",
        ),
    ],
)
def test_an_ssl_config_that_cannot_be_used(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "tls.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"^ssl_config_file must be") as caught:
        server_credentials(str(file))
    message = str(caught.value)
    assert message.startswith(
        "ssl_config_file must be a text proto of tensorflow.serving.SSLConfig. Received: "
        f"ssl_config_file={str(file)!r}, {reason}"
    )
    assert message.endswith(
        ". Correct the file: server_key, server_cert and custom_ca hold PEM text."
    )
    assert ".. " not in message


def test_an_ssl_config_that_is_not_there(tmp_path: Path) -> None:
    file = str(tmp_path / "none")
    with pytest.raises(OSError, match="ssl_config_file") as caught:
        server_credentials(file)
    assert str(caught.value) == (
        f"ssl_config_file must be a file that can be read. Received: ssl_config_file={file!r} "
        "(No such file or directory). Correct the path."
    )
