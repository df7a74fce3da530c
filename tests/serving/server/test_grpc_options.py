"""Channel arguments, a Unix domain socket and the health service."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from keras_mrl_serving.server.grpc_options import add_health, server_options, socket_address

DEFAULTS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),
)


@contextmanager
def healthy(address: str) -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(2), options=server_options())
    add_health(server)
    port = server.add_insecure_port(address)
    server.start()
    yield port
    server.stop(None).wait()


def check(target: str, service: str) -> str:
    with grpc.insecure_channel(target) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=30)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


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
                *DEFAULTS[:2],
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
def test_what_is_no_channel_argument(text: str, received: str) -> None:
    with pytest.raises(ValueError, match="key=value pairs") as caught:
        server_options(text)
    assert str(caught.value) == (
        "grpc_channel_arguments must be key=value pairs with commas between. Received: "
        f"{received!r} in grpc_channel_arguments={text!r}. Write them as in "
        "grpc.max_connection_age_ms=60000,grpc.so_reuseport=1."
    )


@pytest.mark.parametrize("service", ["", "ModelService", "PredictionService"])
def test_the_services_of_tensorflow_serving_are_healthy(service: str) -> None:
    with healthy("127.0.0.1:0") as port:
        assert check(f"127.0.0.1:{port}", service) == "SERVING"


def test_another_service_is_not_known() -> None:
    with healthy("127.0.0.1:0") as port, pytest.raises(grpc.RpcError) as caught:
        check(f"127.0.0.1:{port}", "SessionService")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_watching_takes_no_thread_of_the_server() -> None:
    with healthy("127.0.0.1:0") as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watching = [stub.Watch(health_pb2.HealthCheckRequest(), timeout=30) for _ in range(4)]
        assert [next(watch).status for watch in watching] == [1] * 4
        assert check(f"127.0.0.1:{port}", "") == "SERVING"


def test_a_socket_serves_and_may_be_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "grpc.sock"
    assert socket_address(str(path)) == f"unix:{path}"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    with healthy(socket_address(str(path))):
        assert path.is_socket()
        assert check(f"unix:{path}", "") == "SERVING"


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
