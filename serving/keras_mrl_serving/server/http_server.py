"""The HTTP side of the REST surface: connections, bodies, and an end that drops no answer."""

import logging
import socket
import threading
import time
import zlib
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from typing import Any

from .rest import error_body

_logger = logging.getLogger("keras_mrl_serving.server")
_PIECE_BYTES = 2**20
_LINE_BYTES = 2**16
_MOST_UNPACKED_BYTES = 2**28  # a body of kilobytes may unpack to gigabytes
Answer = Callable[[str, str, bytes], tuple[int, bytes]]


class HttpServer(ThreadingHTTPServer):
    """Answers HTTP/1.1 requests, each connection in a thread of its own.

    Args:
        host: the address to listen on.
        port: the port to listen on; 0 takes a free one.
        answer: from method, path and body to the HTTP code and a JSON body.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: str, port: int, answer: Answer) -> None:
        self.answer = answer
        self._open: set[socket.socket] = set()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        super().__init__((host, port), _Handler)

    def start(self) -> None:
        """Begins to answer; until then connections wait."""
        self._thread.start()

    def stop(self, grace_s: float) -> None:
        """Closes the port and the connections, once the requests under way are answered.

        Args:
            grace_s: how long to wait for them.
        """
        if self._thread.is_alive():
            self.shutdown()
        self.server_close()
        deadline = time.monotonic() + grace_s
        with self._changed:
            for connection in self._open:
                try:  # no further request comes in, and the answer still goes out
                    connection.shutdown(socket.SHUT_RD)
                except OSError:  # the other side was faster
                    pass
            self._changed.wait_for(lambda: not self._open, deadline - time.monotonic())

    def process_request(self, request: Any, client_address: Any) -> None:
        """Notes the connection down before its thread starts."""
        with self._changed:
            self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Closes a connection whose thread is done."""
        super().shutdown_request(request)
        with self._changed:
            self._open.discard(request)
            self._changed.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke, most often because the client left."""
        del request
        _logger.debug("connection of %s", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # it would hold the body back for 40 ms after the head
    server: HttpServer

    def _handle(self) -> None:
        try:
            body = self._body()
        except ValueError as error:
            self.send_error(400, str(error))
            return
        self._send(*self.server.answer(self.command, self.path, body))

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _handle
    do_HEAD = do_OPTIONS = do_TRACE = do_CONNECT = _handle

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class calls for a request it cannot read; the connection ends with it."""
        del explain
        self.close_connection = True
        self._send(code, error_body(message or HTTPStatus(code).phrase))

    def log_message(self, format: str, *args: Any) -> None:
        """One line per request, for those who look for it."""
        _logger.debug(format, *args)

    def _send(self, code: int, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _body(self) -> bytes:
        coding = self.headers.get("Transfer-Encoding", "identity").strip().lower()
        if coding == "chunked":
            return self._plain(_read_chunks(self.rfile))
        # Of two lengths that differ one is wrong, and what is left would pass for a request.
        text = ", ".join(dict.fromkeys(self.headers.get_all("Content-Length", ["0"]))).strip()
        if coding != "identity" or not (text.isascii() and text.isdigit() and len(text) < 20):
            raise ValueError(
                "A body must have a length or come in chunks. Received: "
                f"Transfer-Encoding={coding!r}, Content-Length={text!r}. Send Content-Length."
            )
        return self._plain(_read(self.rfile, int(text)))

    def _plain(self, body: bytes) -> bytes:
        """The body, unpacked if it says that it is packed; what does not unpack counts as empty."""
        if self.headers.get("Content-Encoding", "").strip().lower() != "gzip":
            return body
        unpacking = zlib.decompressobj(wbits=31)  # gzip's own frame
        try:
            unpacked = unpacking.decompress(body, _MOST_UNPACKED_BYTES)
        except zlib.error:
            return b""
        return unpacked if unpacking.eof else b""


def _read_chunks(file: BufferedIOBase) -> bytes:
    body = bytearray()
    while size := _chunk_size(file.readline(_LINE_BYTES)):
        body += _read(file, size)
        file.readline(_LINE_BYTES)
    while file.readline(_LINE_BYTES).strip():  # the trailer
        pass
    return bytes(body)


def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    try:
        if not digits.isalnum():
            raise ValueError
        return int(digits, 16)
    except ValueError as error:
        raise ValueError(
            "Each chunk must begin with its size, a hexadecimal number. "
            f"Received: {line[:40]!r}. Send Content-Length instead."
        ) from error


def _read(file: BufferedIOBase, size: int) -> bytes:
    """Reads in pieces, so that a length nobody sends reserves no memory."""
    body = bytearray()
    while len(body) < size:
        piece = file.read(min(size - len(body), _PIECE_BYTES))
        if not piece:
            raise ConnectionError(f"{size} bytes announced, {len(body)} received")
        body += piece
    return bytes(body)
