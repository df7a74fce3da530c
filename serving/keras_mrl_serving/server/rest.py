"""The REST surface: which path asks for what, and the HTTP code and JSON of each answer.

It runs on the standard library's HTTP server, which is one dependency fewer: the REST port of a
development server is for looking around.
"""

import json
import logging
import re
import socket
import threading
import zlib
from collections.abc import Callable, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from typing import Any
from urllib.parse import unquote

import grpc
from google.protobuf.json_format import MessageToDict
from tensorflow_serving.apis.get_model_metadata_pb2 import GetModelMetadataRequest, SignatureDefMap
from tensorflow_serving.apis.get_model_status_pb2 import GetModelStatusRequest
from tensorflow_serving.apis.model_pb2 import ModelSpec
from tensorflow_serving.apis.predict_pb2 import PredictRequest

from .models import Models
from .requests import get_model_metadata, get_model_status, predict, serving
from .rest_json import parse_body, read_inputs, write_columns, write_rows
from .status import StatusError, invalid_argument, unimplemented
from .tensors import decode, encode

_logger = logging.getLogger("keras_mrl_serving.server")
_MODEL = r"(?:/([^/:]+))"
_VERSION = r"(?:/versions/(\d+)|/labels/([^/:]+))?"
_FLAGS = re.IGNORECASE | re.ASCII
_POST = re.compile(rf"/v1/models{_MODEL}{_VERSION}:(classify|regress|predict)", _FLAGS)
_GET = re.compile(rf"/v1/models{_MODEL}?{_VERSION}(?:/(metadata))?", _FLAGS)
_PIECE_BYTES = 2**20
_LINE_BYTES = 2**16
_HTTP_CODES = {
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.UNAUTHENTICATED: 401,
}
Answer = Callable[[str, str, bytes], tuple[int, bytes]]


def answer(
    models: Models, timeout_s: float | None, method: str, path: str, body: bytes
) -> tuple[int, bytes]:
    """The HTTP code and the JSON that answer a request; it raises nothing.

    Args:
        models: the models of the server.
        timeout_s: how long a model may compute; None means without limit.
        method: the HTTP method, in capitals.
        path: the path and query of the request, still quoted.
        body: the body, empty where there is none.
    """
    try:
        return 200, _answer(models, timeout_s, method, path, body)
    except StatusError as error:
        return _HTTP_CODES.get(error.code, 500), _error_body(error.message)
    except Exception:  # whatever goes wrong, the caller waits for an answer
        _logger.exception("%s %s", method, path)
        return 500, _error_body("The server met an error of its own; its log tells more.")


def _answer(models: Models, timeout_s: float | None, method: str, path: str, body: bytes) -> bytes:
    malformed = invalid_argument(f"Malformed request: {method} {path}")
    if not path.lower().startswith("/v1/"):  # no handler of TensorFlow Serving takes these
        raise StatusError(grpc.StatusCode.NOT_FOUND, malformed.message)
    if method == "POST" and (match := _POST.fullmatch(path)):
        spec = _model_spec(*match.group(1, 2, 3))
        if match[4] == "predict":
            return _predict(models, timeout_s, spec, body)
        if match[4] in ("classify", "regress"):
            raise unimplemented(
                "The development server answers predict calls only. "
                f"Received: {method} {path}. Ask {path.rpartition(':')[0]}:predict, or run "
                "tensorflow/serving on the same files."
            )
        raise malformed  # the verb counts in small letters only
    if method == "GET" and (match := _GET.fullmatch(path)):
        if match[1] is None:
            raise invalid_argument("Missing model name in request.")
        spec = _model_spec(*match.group(1, 2, 3))
        return _metadata(models, spec) if match[4] == "metadata" else _status(models, spec)
    raise malformed


def _model_spec(name: str, version: str | None, label: str | None) -> Any:
    spec = ModelSpec(name=unquote(name))
    if version is not None:
        digits = version.lstrip("0") or "0"
        if len(digits) > 19 or int(digits) >= 2**63:
            raise invalid_argument(f"Failed to convert version: {version} to numeric.")
        spec.version.value = int(digits)
    if label is not None:
        spec.version_label = unquote(label)
    return spec


def _predict(models: Models, timeout_s: float | None, spec: Any, body: bytes) -> bytes:
    document = parse_body(body)
    request = PredictRequest(model_spec=spec)
    request.model_spec.signature_name = document.get("signature_name", "")
    declared = _declared_inputs(models, request.model_spec)
    for name, array in read_inputs(document, declared).items():
        encode(array, request.inputs[name])
    response = predict(models, request, timeout_s)
    outputs = {name: decode(proto) for name, proto in response.outputs.items()}
    return write_rows(outputs) if "instances" in document else write_columns(outputs)


def _declared_inputs(models: Models, spec: Any) -> Mapping[str, Any]:
    name = spec.signature_name or "serving_default"
    with serving(models, spec) as (_, session):
        if name not in session.signatures:
            raise invalid_argument(f'Serving signature name: "{name}" not found in signature def')
        inputs: Mapping[str, Any] = session.signatures[name].inputs
    if not inputs:
        name = spec.signature_name or "DEFAULT"
        raise invalid_argument(f"Failed to get input map for signature: {name}")
    return inputs


def _status(models: Models, spec: Any) -> bytes:
    response = get_model_status(models, GetModelStatusRequest(model_spec=spec))
    return _json(MessageToDict(response, always_print_fields_with_no_presence=True))


def _metadata(models: Models, spec: Any) -> bytes:
    request = GetModelMetadataRequest(model_spec=spec, metadata_field=["signature_def"])
    response = get_model_metadata(models, request)
    signatures = SignatureDefMap()
    response.metadata["signature_def"].Unpack(signatures)
    model_spec, signature_def = (
        MessageToDict(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        for message in (response.model_spec, signatures)
    )
    return _json({"model_spec": model_spec, "metadata": {"signature_def": signature_def}})


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=1).encode() + b"\n"


class HttpServer(ThreadingHTTPServer):
    """Answers HTTP/1.1 requests, each connection in a thread of its own.

    Args:
        host: the address to listen on.
        port: the port to listen on; 0 takes a free one.
        answer: from method, path and body to the HTTP code and a JSON body.
        max_unpacked_bytes: the most bytes that a gzip body may unpack to; a body of kilobytes could
            become gigabytes.

    Raises:
        OSError: the port is taken.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self, host: str, port: int, answer: Answer, *, max_unpacked_bytes: int = 2**28
    ) -> None:
        self.answer = answer
        self.max_unpacked_bytes = max_unpacked_bytes
        self._open: set[socket.socket] = set()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        super().__init__((host, port), _Handler)

    def start(self) -> None:
        """Starts to answer; connections made before wait until now."""
        self._thread.start()

    def stop(self, grace_s: float) -> None:
        """Closes the port, and the connections once their requests under way are answered.

        Args:
            grace_s: how long to wait for those answers.
        """
        if self._thread.is_alive():
            self.shutdown()
        self.server_close()
        with self._changed:
            for connection in self._open:
                try:  # no further request comes in, but the answer still goes out
                    connection.shutdown(socket.SHUT_RD)
                except OSError:  # the client has closed it already
                    pass
            self._changed.wait_for(lambda: not self._open, grace_s)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Registers the connection before its thread starts."""
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
        """Logs a connection that broke, most often because the client left."""
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
        """Answers a request that the base class cannot read, and ends the connection."""
        del explain
        self.close_connection = True
        self._send(code, _error_body(message or HTTPStatus(code).phrase))

    def log_message(self, format: str, *args: Any) -> None:
        """Logs one line a request, at the level of debugging."""
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
            return self._unpacked(_read_chunks(self.rfile))
        # If two lengths differ, a client could have the rest of its body read as another request.
        text = ", ".join(dict.fromkeys(self.headers.get_all("Content-Length", ["0"]))).strip()
        if coding != "identity" or not (text.isascii() and text.isdigit() and len(text) < 20):
            raise ValueError(
                "A body must have a length or come in chunks. Received: "
                f"Transfer-Encoding={coding!r}, Content-Length={text!r}. Send Content-Length."
            )
        return self._unpacked(_read(self.rfile, int(text)))

    def _unpacked(self, body: bytes) -> bytes:
        """The body, unpacked if its header says gzip; one that does not unpack counts as empty."""
        if self.headers.get("Content-Encoding", "").strip().lower() != "gzip":
            return body
        gzip = zlib.decompressobj(wbits=31)
        try:
            unpacked = gzip.decompress(body, self.server.max_unpacked_bytes)
        except zlib.error:
            return b""
        return unpacked if gzip.eof else b""


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
    """Reads in pieces: a body that announces more than it sends must reserve no memory."""
    body = bytearray()
    while len(body) < size:
        piece = file.read(min(size - len(body), _PIECE_BYTES))
        if not piece:
            raise ConnectionError(f"{size} bytes announced, {len(body)} received")
        body += piece
    return bytes(body)


def _error_body(message: str) -> bytes:
    return json.dumps({"error": message}).encode()
