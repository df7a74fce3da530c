"""Proxies between a client and a server: one that can go silent, and one for CONNECT."""

import base64
import socket
import threading
from contextlib import suppress
from typing import Self


class _Proxy:
    """Accepts connections at a port of this machine, each in a thread.

    Attributes:
        target: Address of the port.
        connections: How many connections were made so far.
    """

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.connections = 0

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # it is closed already
            self._listener.shutdown(socket.SHUT_RDWR)
        self.hang_up()
        for thread in self._threads:
            thread.join()
        for each in (self._listener, *self._open):
            each.close()

    def hang_up(self) -> None:
        """Close every connection."""
        for each in self._open:
            with suppress(OSError):  # it is closed already
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(client)
            self._start(self._serve, client)

    def _start(self, function: object, *arguments: object) -> None:
        self._threads.append(threading.Thread(target=function, args=arguments))  # type: ignore[arg-type]
        self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        raise NotImplementedError

    def _join(self, client: socket.socket, port: int, written: bytearray) -> None:
        """Connect the client with a port; nothing passes once `_is_silent`."""
        server = socket.create_connection(("127.0.0.1", port))
        self._open.append(server)
        self._start(self._copy, server, client, bytearray())
        self._copy(client, server, written)

    def _copy(self, source: socket.socket, sink: socket.socket, copy: bytearray) -> None:
        try:
            while data := source.recv(1 << 16):
                if not self._is_silent(source, sink):
                    copy += data
                    sink.sendall(data)
            if not self._is_silent(source, sink):
                sink.shutdown(socket.SHUT_WR)
        except OSError:  # the other side is gone
            return

    def _is_silent(self, *_: socket.socket) -> bool:
        return False


class Relay(_Proxy):
    """Forwards bytes, until it goes silent: connections stay open, and nothing passes.

    Args:
        port: Port of the server.

    Attributes:
        ended: How many connections the clients have closed.
        written: The bytes that clients have written, by connection.
    """

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port
        self._silent = False
        self._lost: set[socket.socket] = set()
        self.ended = 0
        self.written: list[bytearray] = []

    def go_silent(self) -> None:
        """Lose every connection, and those that are made from now on."""
        self._silent = True
        self._lost.update(self._open)

    def come_back(self) -> None:
        """Serve connections that are made from now on; those that were lost stay so."""
        self._silent = False

    def _serve(self, client: socket.socket) -> None:
        if self._silent:
            self._lost.add(client)
            self._copy(client, client, bytearray())
        else:
            self.written.append(bytearray())
            self._join(client, self._port, self.written[-1])
        self.ended += 1

    def _is_silent(self, *ends: socket.socket) -> bool:
        return not self._lost.isdisjoint(ends)


class ConnectProxy(_Proxy):
    """Answers CONNECT, and then forwards to one port, whatever was asked for.

    Args:
        port: Port of the server.
        status: What it answers, such as "200 OK"; "" answers nothing.

    Attributes:
        asked: Host and port of each CONNECT.
        credentials: Name and password of each CONNECT.
    """

    def __init__(self, port: int, status: str = "200 OK") -> None:
        super().__init__()
        self._port = port
        self._status = status
        self.asked: list[str] = []
        self.credentials: list[str] = []

    def _serve(self, client: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            data = client.recv(1)
            if not data:
                return
            head += data
        first, *lines = head.decode().split("\r\n")
        self.asked.append(first.split()[1])
        headers = dict(line.split(": ", 1) for line in lines if line)
        basic = headers.get("Proxy-Authorization", "").removeprefix("Basic ")
        self.credentials.append(base64.b64decode(basic).decode())
        if self._status:
            client.sendall(f"HTTP/1.1 {self._status}\r\n\r\n".encode())
        if self._status.startswith("200"):
            self._join(client, self._port, bytearray())
        else:
            client.recv(1)  # until the client hangs up
