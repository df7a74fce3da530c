"""The HTTP server: connections, what clients may take of it, and its end."""

import gzip
import http.client
import json
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any

import pytest

from keras_mrl_serving.server.http_server import HttpLimits, HttpServer
from tests.helpers.hostile_peers import open_connections
from tests.helpers.waiting import wait_until

TIMEOUT_S = 60.0
BUSY = "The server is busy with as many connections and bodies as it takes. Ask again later."


class Echo:
    """Answers a request with its body, once a gate is open."""

    def __init__(self) -> None:
        self.entered, self.gate = threading.Event(), threading.Event()
        self.gate.set()
        self.count = 0

    def __call__(self, _method: str, _path: str, body: bytes) -> tuple[int, bytes]:
        self.count += 1
        self.entered.set()
        assert self.gate.wait(TIMEOUT_S)
        return 200, body


@contextmanager
def serving(echo: Echo | None = None, **limits: Any) -> Iterator[int]:
    """The port of a server that runs for as long as the context lasts."""
    server = HttpServer("127.0.0.1", 0, echo or Echo(), HttpLimits(**limits))
    server.start()
    yield server.server_port
    server.stop(TIMEOUT_S)


def connected(port: int) -> closing[http.client.HTTPConnection]:
    return closing(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S))


def echoed(port: int, body: bytes = b"body", **headers: str) -> tuple[int, bytes]:
    with connected(port) as connection:
        connection.request("POST", "/", body, headers)
        response = connection.getresponse()
        return response.status, response.read()


def read_all(peer: socket.socket) -> bytes:
    return b"".join(iter(lambda: peer.recv(65536), b""))


def exchange(port: int, data: bytes) -> bytes:
    """The answer to bytes as they are, to the end of the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return read_all(connection)


def code_and_error(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.rpartition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]


HEAD = b"POST / HTTP/1.1\r\nHost: x\r\n"


def no_http(reason: str) -> str:
    return f"A request must be HTTP/1.1. Received: {reason}. Ask by an HTTP library."


@pytest.mark.parametrize(
    ("data", "code", "text"),
    [
        (HEAD + b"Content-Length: -1\r\n\r\n", 400, no_http("bad Content-Length")),
        (
            HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
            400,
            no_http("conflicting Content-Length headers"),
        ),
        (
            HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
            400,
            "A body must have a length or come in chunks. Received: both. Leave one out.",
        ),
        (
            HEAD + b"Transfer-Encoding: gzip\r\n\r\n",
            501,
            no_http("Only Transfer-Encoding: chunked is supported"),
        ),
        (b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n", 501, "Unsupported method ('BREW')"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nx: " + b"y" * 500, 431, "*"),
        (b"GET /" + b"y" * 500, 431, "*"),
        (HEAD + b"Content-Length: 101\r\n\r\n", 413, "101"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"3c\r\n" + b"x" * 60, 413, "120"),
    ],
)
def test_requests_that_are_refused(data: bytes, code: int, text: str) -> None:
    if text == "*":
        text = (
            "The head of a request must have at most 200 bytes. Received: more. Send the rest as "
            "the body."
        )
    if text == "120":
        data += b"\r\n3c\r\n" + b"x" * 60 + b"\r\n0\r\n\r\n"
    if text.isdigit():
        text = (
            f"A body must have at most 100 bytes. Received: {text} or more. Send fewer rows in a "
            "request, or ask over gRPC."
        )
    with serving(max_head_bytes=200, max_body_bytes=100) as port:
        assert code_and_error(exchange(port, data)) == (code, text)
        assert echoed(port) == (200, b"body")


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"Content-Length: 50\r\n\r\n{}",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nf\r\n{}",
        HEAD,
        b"",
    ],
)
def test_a_request_that_ends_early_gets_no_answer_and_does_no_harm(data: bytes) -> None:
    with serving() as port:
        assert exchange(port, data) == b""
        assert echoed(port) == (200, b"body")


def test_a_head_has_no_body() -> None:
    with serving() as port:
        response = exchange(port, b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert response.startswith(b"HTTP/1.1 200 ")
    assert response.endswith(b"\r\n\r\n")


def test_requests_without_a_pause_are_answered_in_their_order() -> None:
    requests = [HEAD + b"Content-Length: 3\r\n\r\n%03d" % i for i in range(100)]
    with serving() as port:
        answers = exchange(port, b"".join(requests))
    bodies = [answer.partition(b"\r\n\r\n")[2] for answer in answers.split(b"HTTP/1.1 200")[1:]]
    assert [int(body) for body in bodies] == list(range(100))


def test_a_client_that_asks_first_may_send_its_body() -> None:
    with serving() as port, socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as peer:
        peer.sendall(HEAD + b"Content-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        assert peer.recv(1000).startswith(b"HTTP/1.1 100 ")
        peer.sendall(b"body")
        assert peer.recv(1000).endswith(b"body")


def test_a_packed_body_is_unpacked() -> None:
    """It counts as empty if it is damaged, cut off, or unpacks to more than the limit."""
    body = b"x" * 1000
    packed = gzip.compress(body)
    headers = {"Content-Encoding": "gzip"}
    with serving(max_body_bytes=len(body)) as port:
        assert echoed(port, packed, **headers) == (200, body)
        for damaged in (body, packed[:-9], packed[:5] + b"x" + packed[6:-20] + bytes(20)):
            assert echoed(port, damaged, **headers) == (200, b"")
        assert echoed(port, gzip.compress(body + b"x"), **headers) == (200, b"")


def rest_threads() -> int:
    return sum(thread.name.startswith("rest") for thread in threading.enumerate())


@pytest.mark.parametrize("sent", [b"", HEAD, HEAD + b"Content-Length: 9\r\n\r\nbody"])
def test_connections_that_wait_take_no_threads(sent: bytes) -> None:
    before = rest_threads()
    with serving(max_connections=100) as port, open_connections(port, 200, sent):
        assert echoed(port) == (200, b"body")
        assert rest_threads() <= before + 2  # one for all connections, and one worker


def test_a_connection_too_many_takes_the_place_of_the_one_waited_for_longest() -> None:
    with serving(max_connections=3) as port, ExitStack() as stack:
        idle, slow, _ = (
            stack.enter_context(socket.create_connection(("127.0.0.1", port), TIMEOUT_S))
            for _ in range(3)
        )
        slow.sendall(HEAD)
        assert echoed(port) == (200, b"body")
        assert read_all(idle) == b""
        with open_connections(port, 1):
            assert echoed(port) == (200, b"body")
            assert code_and_error(read_all(slow)) == (503, BUSY)


def test_a_connection_that_was_just_answered_is_not_the_one_waited_for_longest() -> None:
    with serving(max_connections=2) as port, connected(port) as first, open_connections(port, 1):
        wait_until(lambda: asked(first), "an answer")
        assert echoed(port) == (200, b"body")  # in place of the second
        assert asked(first)


def asked(connection: http.client.HTTPConnection) -> bool:
    connection.request("POST", "/", b"again")
    return connection.getresponse().read() == b"again"


def test_where_all_connections_are_busy_a_new_one_is_refused() -> None:
    echo = Echo()
    echo.gate.clear()
    with serving(echo, max_connections=1) as port, connected(port) as busy:
        busy.request("POST", "/", b"first")
        assert echo.entered.wait(TIMEOUT_S)
        with socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as peer:
            assert code_and_error(read_all(peer)) == (503, BUSY)
        echo.gate.set()
        assert busy.getresponse().read() == b"first"


def test_bodies_have_a_limit_together() -> None:
    half = HEAD + b"Content-Length: 60\r\n\r\n" + b"x" * 30
    with serving(max_bodies_bytes=100) as port, open_connections(port, 3, half) as peers:
        assert echoed(port, b"x" * 40) == (200, b"x" * 40)
        assert code_and_error(read_all(peers[0])) == (503, BUSY)
        peers[2].sendall(b"x" * 30)
        assert peers[2].recv(1000).endswith(b"x" * 60)
        assert echoed(port, b"x" * 101) == (503, json.dumps({"error": BUSY}).encode())


@pytest.mark.parametrize(("sent", "answer"), [(b"", b""), (HEAD, b"HTTP/1.1 408 ")])
def test_a_silent_connection_is_closed(sent: bytes, answer: bytes) -> None:
    with serving(silence_s=0.05) as port, open_connections(port, 1, sent) as (peer,):
        assert read_all(peer).startswith(answer)


def test_a_request_that_never_ends_is_closed() -> None:
    with serving(request_s=0.3) as port, open_connections(port, 1, HEAD) as (peer,):
        peer.settimeout(0.01)
        answer = b""
        while not answer:
            peer.sendall(b"x: y\r\n")
            try:
                answer = peer.recv(1000)
            except TimeoutError:
                pass
        assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_client_that_takes_no_answer_is_left(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "keras_mrl_serving.server")
    size = 2**25  # more than sockets hold
    with serving(silence_s=0.5) as port, open_connections(port, 1) as (peer,):
        peer.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % size + b"x" * size)
        wait_until(lambda: "the client does not take its answer" in caplog.text)
        with suppress(ConnectionError):
            assert len(read_all(peer)) < size
        assert echoed(port) == (200, b"body")


def test_a_stop_answers_what_is_under_way_and_closes_what_waits() -> None:
    echo = Echo()
    server = HttpServer("127.0.0.1", 0, echo)
    server.start()
    port = server.server_port
    with connected(port) as idle, connected(port) as busy, open_connections(port, 50, HEAD) as slow:
        idle.request("POST", "/", b"first")
        assert idle.getresponse().read() == b"first"
        echo.entered.clear()
        echo.gate.clear()
        busy.request("POST", "/", b"second")
        assert echo.entered.wait(TIMEOUT_S)
        stopping = threading.Thread(target=server.stop, args=(TIMEOUT_S,))
        stopping.start()
        assert idle.sock.recv(1) == b""  # closed, while the other one still waits
        assert {peer.recv(1) for peer in slow} == {b""}
        assert stopping.is_alive()
        echo.gate.set()
        assert busy.getresponse().read() == b"second"
        stopping.join()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port))


def test_a_stop_waits_no_longer_than_its_grace() -> None:
    echo = Echo()
    echo.gate.clear()
    server = HttpServer("127.0.0.1", 0, echo)
    server.start()
    with connected(server.server_port) as busy:
        busy.request("POST", "/", b"late")
        assert echo.entered.wait(TIMEOUT_S)
        server.stop(0)  # returns, although the gate is closed
        with pytest.raises(OSError, match="closed connection without response"):
            busy.getresponse()
    echo.gate.set()


def test_large_and_gzip_bodies_leave_the_workers_to_the_others() -> None:
    class Gated(Echo):
        def __call__(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
            return super().__call__(method, path, body) if len(body) > 9 else (200, body)

    for body, headers in (
        (bytes(2**20 + 1), {}),
        (gzip.compress(bytes(10)), {"Content-Encoding": "gzip"}),
    ):
        echo = Gated()
        echo.gate.clear()
        with serving(echo, num_threads=1) as port, connected(port) as connection:
            connection.request("POST", "/", body, headers)
            assert echo.entered.wait(TIMEOUT_S)
            assert echoed(port) == (200, b"body")
            echo.gate.set()
            assert connection.getresponse().status == 200
