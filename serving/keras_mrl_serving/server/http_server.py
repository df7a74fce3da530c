"""The HTTP/1.1 server under the REST surface, which no client can exhaust.

One thread reads and writes all connections, as libevent does in TensorFlow Serving, so that a
connection that sends a byte a second costs no thread. Requests that have arrived whole are answered
by a few worker threads. Whatever a client can make grow has a limit: see `HttpLimits`.
"""

import asyncio
import json
import socket
import threading
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from email.utils import formatdate

import h11

from .log import logger

_PIECE_BYTES = 2**16
_LARGE_BODY_BYTES = 2**20
_BACKLOG = 128
_LINGER_S = 1.0
# Those that libevent lets through to TensorFlow Serving.
_METHODS = ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH")
_BUSY = "The server is busy with as many connections and bodies as it takes. Ask again later."
_SLOW = "A request must arrive in time, and did not. Send it in one go."
Answer = Callable[[str, str, bytes], tuple[int, bytes]]


@dataclass(frozen=True, kw_only=True)
class HttpLimits:
    """What the clients of an `HttpServer` may take of it.

    Args:
        max_connections: the connections open at once. One more closes the one that the server has
            waited for longest; if each has a request being answered, the new one is refused.
        max_head_bytes: the bytes of a request line and its headers.
        max_body_bytes: the bytes of a body, and of what a gzip body unpacks to.
        max_bodies_bytes: the bytes of all bodies that are read or answered. A body that goes
            beyond it closes the connection that the server has waited for longest.
        silence_s: how long a client may send nothing, or take nothing of its answer.
        request_s: how long a request may take to arrive.
        num_threads: how many requests are answered at once; of large ones it is one at a time.
    """

    max_connections: int = 512
    max_head_bytes: int = 2**16
    max_body_bytes: int = 2**26
    max_bodies_bytes: int = 2**28
    silence_s: float = 50.0  # libevent's, and so TensorFlow Serving's
    request_s: float = 300.0
    num_threads: int = 16


class HttpServer:
    """Answers HTTP/1.1 requests, within limits.

    Args:
        host: the address to listen on.
        port: the port to listen on; 0 takes a free one.
        answer: from method, path and body to the HTTP code and a JSON body; it raises nothing.
        limits: what clients may take.

    Attributes:
        server_port: the port it listens on.
        limits: what clients may take.

    Raises:
        OSError: the port is taken.
    """

    def __init__(
        self, host: str, port: int, answer: Answer, limits: HttpLimits | None = None
    ) -> None:
        self.limits = limits or HttpLimits()
        self._answer = answer
        self._socket = socket.create_server((host, port), backlog=_BACKLOG)
        self.server_port: int = self._socket.getsockname()[1]
        # In the order in which the server began to wait for them.
        self._connections: dict[_Connection, None] = {}
        self._bodies_bytes = 0
        self._pool = ThreadPoolExecutor(self.limits.num_threads, thread_name_prefix="rest")
        # JSON of 64 MB may be more than a gigabyte of Python's objects.
        self._large_pool = ThreadPoolExecutor(1, thread_name_prefix="rest-large")
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        self._grace_s = 0.0
        self._thread = threading.Thread(target=self._run, name="rest", daemon=True)

    def start(self) -> None:
        """Starts to answer; connections made before wait until now."""
        self._thread.start()

    def stop(self, grace_s: float) -> None:
        """Closes the port, and the connections once their requests under way are answered.

        Args:
            grace_s: how long to wait for those answers.
        """
        self._grace_s = grace_s
        if self._thread.is_alive():
            with suppress(RuntimeError):  # another thread has stopped it meanwhile
                self._loop.call_soon_threadsafe(self._stopping.set)
            self._thread.join()
        self._loop.close()
        self._socket.close()
        for pool in (self._pool, self._large_pool):
            pool.shutdown(wait=False, cancel_futures=True)

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(
            self._connect, sock=self._socket, limit=_PIECE_BYTES, backlog=_BACKLOG
        )
        await self._stopping.wait()
        server.close()
        for connection in tuple(self._connections):
            if connection.is_waited_for:
                connection.task.cancel()
        await self._wait(self._grace_s)
        for connection in tuple(self._connections):
            connection.task.cancel()
        await self._wait(None)

    async def _wait(self, timeout_s: float | None) -> None:
        if tasks := [connection.task for connection in self._connections]:
            await asyncio.wait(tasks, timeout=timeout_s)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self, reader, writer)
        self._connections[connection] = None
        try:
            is_over = len(self._connections) > self.limits.max_connections
            if is_over and not self._make_room(connection):
                await connection.refuse(503, _BUSY)
            else:
                await connection.serve()
        except OSError:
            logger.debug("a connection broke, most often because its client left", exc_info=True)
        except asyncio.CancelledError:  # of this connection alone, by this server
            pass
        finally:
            self.count_body(connection, -len(connection.body))
            del self._connections[connection]
            connection.abort()

    def is_stopping(self) -> bool:
        """Whether no further request of a connection is answered."""
        return self._stopping.is_set()

    def waits_for(self, connection: "_Connection") -> None:
        """Notes that it is this client's turn from now on."""
        connection.is_waited_for = True
        del self._connections[connection]
        self._connections[connection] = None

    def count_body(self, connection: "_Connection", num_bytes: int) -> bool:
        """Notes that a connection holds more of a body, or less; whether it may go on."""
        self._bodies_bytes += num_bytes
        while self._bodies_bytes > self.limits.max_bodies_bytes:
            if not self._make_room(connection):
                return False
        return True

    def _make_room(self, newcomer: "_Connection") -> bool:
        """Gives up the connection waited for longest; whether there is one besides the newcomer."""
        for connection in self._connections:
            if connection.is_waited_for and connection is not newcomer:
                self._bodies_bytes -= len(connection.body)
                connection.give_up()
                return True
        return False

    async def answer(self, method: str, path: str, body: bytes, is_gzip: bool) -> tuple[int, bytes]:
        """The HTTP code and the JSON that answer a request, from a worker thread."""
        pool = self._large_pool if is_gzip or len(body) > _LARGE_BODY_BYTES else self._pool

        def work() -> tuple[int, bytes]:
            whole = _unpacked(body, self.limits.max_body_bytes) if is_gzip else body
            return self._answer(method, path, whole)

        return await self._loop.run_in_executor(pool, work)


class _RefusalError(Exception):
    """A request that is answered with an error, and ends its connection."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Connection:
    """One connection: its requests, one after another.

    Attributes:
        task: what serves it.
        is_waited_for: whether it is the client's turn: to send a request, or to take an answer.
        body: what has arrived of a request's body, until it is answered.
    """

    def __init__(
        self, server: HttpServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("A connection is made in a task of an event loop.")
        self.task = task
        self.is_waited_for = True
        self.body = bytearray()
        self._server = server
        self._limits = server.limits
        self._reader = reader
        self._writer = writer
        self._http = h11.Connection(
            h11.SERVER, max_incomplete_event_size=self._limits.max_head_bytes
        )
        self._has_begun = False  # to send a request
        self._is_head = False
        self._is_given_up = False

    async def serve(self) -> None:
        """Answers request after request, until one of the two sides has enough."""
        try:
            while await self._answer_next():
                pass
        except _RefusalError as refusal:
            await self.refuse(refusal.code, str(refusal))
        except h11.RemoteProtocolError as error:
            await self.refuse(error.error_status_hint, _reason(error, self._limits))
        except TimeoutError:
            if self._has_begun:
                await self.refuse(408, _SLOW)
        except asyncio.CancelledError:
            if self._is_given_up and self._has_begun:
                self._write_refusal(503, _BUSY)
            raise

    def give_up(self) -> None:
        """Ends it, so that another one has room; a request that has begun gets an answer."""
        self.is_waited_for, self._is_given_up = False, True
        self.body.clear()
        self.task.cancel()

    def abort(self) -> None:
        """Closes the socket, whatever the client still has to take."""
        if self._writer.transport.get_write_buffer_size():
            self._writer.transport.abort()
        self._writer.close()

    async def refuse(self, code: int, message: str) -> None:
        """Answers with an error, and takes what the client is still sending for a moment.

        A socket that is closed with bytes unread would take the answer back.
        """
        self._write_refusal(code, message)
        with suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                self._writer.write_eof()
                while await self._reader.read(_PIECE_BYTES):
                    pass

    async def _answer_next(self) -> bool:
        """Answers one request; whether another one may follow."""
        self._server.waits_for(self)
        self._has_begun = bool(self._http.trailing_data[0])
        async with asyncio.timeout(self._limits.request_s):
            request = await self._next_event()
            if not isinstance(request, h11.Request):
                return False
            self._check_head(request)
            while isinstance(event := await self._next_event(), h11.Data):
                self._add_to_body(event.data)
        self.is_waited_for = False
        method, path = request.method.decode(), request.target.decode()
        code, answer = await self._server.answer(
            method, path, bytes(self.body), "gzip" in _header(request, b"content-encoding").lower()
        )
        self._server.count_body(self, -len(self.body))
        self.body.clear()
        self._server.waits_for(self)
        await self._send(code, answer)
        if self._http.our_state is not h11.DONE or self._server.is_stopping():
            return False
        self._http.start_next_cycle()
        return True

    async def _next_event(self) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            if self._http.they_are_waiting_for_100_continue:
                ready = h11.InformationalResponse(status_code=100, headers=[])
                self._writer.write(self._http.send(ready) or b"")
            async with asyncio.timeout(self._limits.silence_s):
                data = await self._reader.read(_PIECE_BYTES)
            if not data and self._has_begun:
                raise ConnectionError("the client left within a request")
            self._http.receive_data(data)
            self._has_begun = True
        return event

    def _check_head(self, request: h11.Request) -> None:
        self._is_head = request.method == b"HEAD"
        if request.method.decode() not in _METHODS:
            raise _RefusalError(501, f"Unsupported method ({request.method.decode()!r})")
        length = _header(request, b"content-length")
        if length and _header(request, b"transfer-encoding"):
            # Of two readers, each might believe another one.
            raise _RefusalError(
                400,
                "A body must have a length or come in chunks. Received: both. Leave one out.",
            )
        if length:
            self._check_size(int(length))

    def _add_to_body(self, data: bytes) -> None:
        self._check_size(len(self.body) + len(data))
        self.body += data
        if not self._server.count_body(self, len(data)):
            raise _RefusalError(503, _BUSY)

    def _check_size(self, size: int) -> None:
        if size > self._limits.max_body_bytes:
            raise _RefusalError(
                413,
                f"A body must have at most {self._limits.max_body_bytes} bytes. Received: {size} "
                "or more. Send fewer rows in a request, or ask over gRPC.",
            )

    async def _send(self, code: int, body: bytes) -> None:
        data = memoryview(self._answered(code, body))
        try:
            for start in range(0, len(data), _PIECE_BYTES):
                self._writer.write(data[start : start + _PIECE_BYTES])
                async with asyncio.timeout(self._limits.silence_s):
                    await self._writer.drain()
        except TimeoutError as error:
            raise ConnectionError("the client does not take its answer") from error

    def _write_refusal(self, code: int, message: str) -> None:
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self._writer.write(self._answered(code, error_body(message), is_last=True))

    def _answered(self, code: int, body: bytes, is_last: bool = False) -> bytes:
        """The bytes of an answer."""
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Date", formatdate(usegmt=True)),
        ]
        if is_last or self._server.is_stopping():
            headers.append(("Connection", "close"))
        events: list[h11.Event] = [h11.Response(status_code=code, headers=headers)]
        if not self._is_head:
            events.append(h11.Data(data=body))
        return b"".join(self._http.send(event) or b"" for event in (*events, h11.EndOfMessage()))


def error_body(message: str) -> bytes:
    """The JSON of an error, as TensorFlow Serving writes it."""
    return json.dumps({"error": message}).encode()


def _header(request: h11.Request, name: bytes) -> str:
    return b", ".join(value for key, value in request.headers if key == name).decode("latin-1")


def _reason(error: h11.RemoteProtocolError, limits: HttpLimits) -> str:
    if error.error_status_hint == 431:
        return (
            f"The head of a request must have at most {limits.max_head_bytes} bytes. Received: "
            "more. Send the rest as the body."
        )
    return f"A request must be HTTP/1.1. Received: {error}. Ask by an HTTP library."


def _unpacked(body: bytes, max_bytes: int) -> bytes:
    """What a gzip body holds; one that does not unpack, or to too much, counts as empty."""
    gzip = zlib.decompressobj(wbits=31)
    try:
        unpacked = gzip.decompress(body, max_bytes)
    except zlib.error:
        return b""
    return unpacked if gzip.eof else b""
