"""Peers that mean harm to a server: what they send to its gRPC port and to its REST port."""

import gzip
import json
import random
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, CONTINUATION = 0, 1, 3, 4, 6, 9
END_STREAM, END_HEADERS = 1, 4
GRPC_PREDICT = "/tensorflow.serving.PredictionService/Predict"
REST_PREDICT = "/v1/models/default:predict"
TIMEOUT_S = 60.0


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A frame of HTTP/2."""
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload


def header(name: str, value: str) -> bytes:
    """A header in HPACK, literally; neither has more than 126 bytes."""
    texts = (text.encode() for text in (name, value))
    return b"\x00" + b"".join(bytes((len(text),)) + text for text in texts)


CALL = b"".join(
    header(name, value)
    for name, value in (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", GRPC_PREDICT),
        (":authority", "x"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    )
)
GREETING = PREFACE + frame(SETTINGS, 0, 0)
STREAMS = range(1, 2**31, 2)


def rapid_reset(count: int) -> Iterator[bytes]:
    """Calls that are taken back at once."""
    yield GREETING
    for stream in STREAMS[:count]:
        yield frame(HEADERS, END_HEADERS, stream, CALL)
        yield frame(RST_STREAM, 0, stream, struct.pack("!I", 8))


def heads_alone(count: int) -> Iterator[bytes]:
    """Calls whose message never comes."""
    yield GREETING
    for stream in STREAMS[:count]:
        yield frame(HEADERS, END_HEADERS, stream, CALL)


def no_window(count: int) -> Iterator[bytes]:
    """Calls by a client that lets no byte of an answer through."""
    yield PREFACE + frame(SETTINGS, 0, 0, struct.pack("!HI", 4, 0))
    for stream in STREAMS[:count]:
        yield frame(HEADERS, END_HEADERS, stream, CALL)
        yield frame(DATA, END_STREAM, stream, bytes(5))


def pings(count: int) -> Iterator[bytes]:
    """Pings."""
    yield GREETING
    yield from [frame(PING, 0, 0, bytes(8))] * count


def settings(count: int) -> Iterator[bytes]:
    """Settings, each of which must be acknowledged."""
    yield GREETING
    yield from [frame(SETTINGS, 0, 0, struct.pack("!HI", 3, 100))] * count


def endless_headers(count: int) -> Iterator[bytes]:
    """A head that goes on and on."""
    yield GREETING + frame(HEADERS, 0, 1, CALL)
    yield from [frame(CONTINUATION, 0, 1, header("x" * 60, "y" * 120))] * count


def long_message(count: int) -> Iterator[bytes]:
    """A message that announces 2 GiB and sends little."""
    yield GREETING + frame(HEADERS, END_HEADERS, 1, CALL)
    yield frame(DATA, 0, 1, b"\0" + struct.pack("!I", 2**31 - 1))
    yield from [frame(DATA, 0, 1, bytes(1000))] * min(count, 60)


HTTP2: dict[str, Callable[[int], Iterator[bytes]]] = {
    "rapid reset": rapid_reset,
    "heads alone": heads_alone,
    "no window": no_window,
    "pings": pings,
    "settings": settings,
    "endless headers": endless_headers,
    "long message": long_message,
}


def post(body: bytes, *headers: str) -> bytes:
    """A predict request over HTTP/1.1."""
    head = (f"POST {REST_PREDICT} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers)
    return "\r\n".join((*head, "", "")).encode() + body


CHUNKED = f"POST {REST_PREDICT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
SOME = json.dumps({"instances": [[1.0, 2.0, 3.0, 4.0]]}).encode()
HTTP1: dict[str, bytes] = {
    "deep nesting": post(b'{"instances": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep objects": post(b'{"a":' * 100_000),
    "huge number": post(b'{"instances": [[' + b"9" * 100_000 + b"]]}"),
    "huge exponent": post(b'{"instances": [[1e999999999]]}'),
    "many keys": post(json.dumps({str(i): 0 for i in range(100_000)}).encode()),
    "long string": post(b'{"signature_name": "' + b"x" * 10**6 + b'"}'),
    "wrong type": post(b'{"instances": [' + b'{"a": "' + b"x" * 10**6 + b'"}]}'),
    "no base64": post(b'{"signature_name":"echo","inputs":{"b64":"' + b"!" * 10**6 + b'"}}'),
    "gzip bomb": post(gzip.compress(bytes(2**28)), "Content-Encoding: gzip"),
    "no gzip": post(b"x" * 1000, "Content-Encoding: gzip"),
    "two lengths": post(SOME, "Content-Length: 3"),
    "length and chunks": post(SOME, "Transfer-Encoding: chunked"),
    "negative length": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    "long length": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n",
    "large body": b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n",
    "no size": f"{CHUNKED}\r\n-5\r\n".encode(),
    "large chunk": f"{CHUNKED}\r\n{'f' * 15}\r\n".encode() + bytes(1000),
    "many chunks": f"{CHUNKED}\r\n".encode() + b"1\r\n \r\n" * 10_000,
    "long trailer": f"{CHUNKED}\r\n0\r\n".encode() + b"x: y\r\n" * 100_000,
    "many headers": b"GET / HTTP/1.1\r\nHost: x\r\n" + b"x: y\r\n" * 100_000,
    "long header": b"GET / HTTP/1.1\r\nHost: x\r\nx: " + b"y" * 10**6,
    "long line": b"GET /" + b"y" * 10**6,
    "no method": b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n",
    "escapes": b"GET /\x1b[2J HTTP/1.1\r\nHost: x\r\n\r\n",
    "no version": b"GET /\r\n\r\n",
    "HTTP/2": GREETING,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "pipelined": post(SOME) * 200,
    "nothing": b"",
}


def mutated(rng: random.Random, data: bytes, repeats: Sequence[int] = (2, 10)) -> bytes:
    """The bytes, of which some are flipped, cut out, put in or repeated so often."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        start = rng.randrange(len(changed) + 1)
        end = min(len(changed), start + rng.choice((1, 1, 2, 8)))
        piece = rng.choice(
            (
                b"",
                rng.randbytes(end - start),
                bytes(changed[start:end]) * rng.choice(repeats),
                bytes((rng.choice((0x00, 0x01, 0x7F, 0x80, 0xFF)),)),
                bytes(byte ^ 1 << rng.randrange(8) for byte in changed[start:end]),
            )
        )
        changed[start:end] = piece
    return bytes(changed)


def grpc_bytes(rng: random.Random) -> bytes:
    """Bytes that are not, or not quite, HTTP/2."""
    if rng.random() < 0.3:
        return rng.choice((b"", GREETING)) + rng.randbytes(rng.choice((1, 9, 100, 3000)))
    storm = rng.choice(list(HTTP2.values()))
    return mutated(rng, b"".join(storm(rng.choice((1, 3)))))


def rest_bytes(rng: random.Random) -> bytes:
    """Bytes that are not, or not quite, HTTP/1.1."""
    if rng.random() < 0.3:
        start = rng.choice((b"", b"GET /v1/models/default HTTP/1.1\r\n"))
        return start + rng.randbytes(rng.choice((1, 9, 100, 3000)))
    return mutated(rng, rng.choice([post(SOME), *(d for d in HTTP1.values() if len(d) < 3000)]))


def send(port: int, data: bytes | Iterator[bytes]) -> bytes:
    """Sends bytes, and reads to the end of the connection, whoever ends it."""
    received = bytearray()
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), TIMEOUT_S) as peer:
        with suppress(OSError):  # a server may hang up before it has read everything
            for piece in (data,) if isinstance(data, bytes) else data:
                peer.sendall(piece)
            peer.shutdown(socket.SHUT_WR)
        while piece := peer.recv(2**16):
            received += piece
    return bytes(received)


@contextmanager
def open_connections(port: int, count: int, data: bytes = b"") -> Iterator[list[socket.socket]]:
    """Connections that send some bytes and no more, for as long as the context lasts."""
    with ExitStack() as stack:
        peers = []
        for _ in range(count):
            peer = stack.enter_context(socket.create_connection(("127.0.0.1", port), TIMEOUT_S))
            with suppress(OSError):
                peer.sendall(data)
            peers.append(peer)
        yield peers
