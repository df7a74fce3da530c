"""TLS on the gRPC port, from the file that TensorFlow Serving takes as --ssl_config_file."""

import os
import re
import ssl
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

# What the gRPC server is told besides its services: channel arguments, a socket, its health.

Options = tuple[tuple[str, int | str], ...]
_OPTIONS: dict[str, int | str] = {
    # TensorFlow Serving limits no message; Python's default is 4 MB.
    "grpc.max_receive_message_length": -1,
    "grpc.max_send_message_length": -1,
    # With it two servers share one port in silence, and each answers half of the requests.
    "grpc.so_reuseport": 0,
}
_HEALTHY = ("", "ModelService", "PredictionService")
_MAX_SOCKET_PATH_BYTES = 107  # what the kernel's address holds, less its final zero


def server_options(grpc_channel_arguments: str = "") -> Options:
    """The options of the gRPC server.

    Args:
        grpc_channel_arguments: `key=value,key=value`; a value that reads as an integer is one.

    Raises:
        ValueError: the text is not of that form.
    """
    options = dict(_OPTIONS)
    for argument in grpc_channel_arguments.split(",") if grpc_channel_arguments else []:
        key, equals, value = argument.partition("=")
        if not key or not equals:
            raise ValueError(
                "grpc_channel_arguments must be key=value pairs with commas between. Received: "
                f"{argument!r} in grpc_channel_arguments={grpc_channel_arguments!r}. "
                "Write them as in grpc.max_connection_age_ms=60000,grpc.so_reuseport=1."
            )
        options[key] = _number(value)
    return tuple(options.items())


def socket_address(grpc_socket_path: str) -> str:
    """The address at which a gRPC server listens on a Unix domain socket.

    Args:
        grpc_socket_path: path of the socket; gRPC removes one that a former server left.

    Raises:
        OSError: no socket can be made there.
    """
    length = len(os.fsencode(grpc_socket_path))
    if length > _MAX_SOCKET_PATH_BYTES:
        raise OSError(
            f"grpc_socket_path must be at most {_MAX_SOCKET_PATH_BYTES} bytes. Received: "
            f"grpc_socket_path={grpc_socket_path!r}, {length} bytes. Choose a shorter one, under "
            "/tmp for example."
        )
    if os.path.exists(grpc_socket_path) and not stat.S_ISSOCK(os.stat(grpc_socket_path).st_mode):
        raise OSError(
            f"grpc_socket_path must be free. Received: grpc_socket_path={grpc_socket_path!r}, "
            "where something stands that is no socket. Remove it, or choose another path."
        )
    return f"unix:{grpc_socket_path}"


def add_health(server: grpc.Server) -> None:
    """Registers grpc.health.v1, which says of TensorFlow Serving's services that they serve.

    Args:
        server: the server, not yet started.
    """
    # Otherwise each Watch would keep one of the server's threads.
    servicer = health.HealthServicer(experimental_non_blocking=True)
    for service in _HEALTHY:
        servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)


def _number(value: str) -> int | str:
    try:
        number = int(value)
    except ValueError:
        return value
    return number if -(2**31) <= number < 2**31 else value


_REMEDY = "Correct the file: server_key, server_cert and custom_ca hold PEM text."
# C++ reads a quoted string over several lines, as people paste PEM; Python wants them escaped.
_COMMENT_OR_STRING = re.compile(r"""#[^\n]*|"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'""", re.DOTALL)


def server_credentials(path: str) -> grpc.ServerCredentials:
    """The credentials of a server.

    Args:
        path: file with a text proto of `tensorflow.serving.SSLConfig`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such text, or its key and certificates cannot be used.
    """
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise OSError(
            f"ssl_config_file must be a file that can be read. Received: ssl_config_file={path!r} "
            f"({error.strerror}). Correct the path."
        ) from error
    except UnicodeDecodeError as error:
        raise _unusable(path, "it is no UTF-8 text") from error
    try:
        config = text_format.Parse(_COMMENT_OR_STRING.sub(_on_one_line, text), _ssl_config())
    except text_format.ParseError as error:
        raise _unusable(path, str(error).rstrip(".")) from error
    _check_pem(path, config)
    return grpc.ssl_server_credentials(
        [(config.server_key.encode(), config.server_cert.encode())],
        config.custom_ca.encode() or None,
        config.client_verify,
    )


def _ssl_config() -> Any:
    """An empty SSLConfig; `tensorflow-serving-api` ships without this one message."""
    file = descriptor_pb2.FileDescriptorProto(
        name="keras_mrl_serving/ssl_config.proto", package="tensorflow.serving", syntax="proto3"
    )
    message = file.message_type.add(name="SSLConfig")
    kinds = descriptor_pb2.FieldDescriptorProto
    for name in ("server_key", "server_cert", "custom_ca"):
        message.field.add(name=name, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    message.field.add(name="client_verify", type=kinds.TYPE_BOOL, label=kinds.LABEL_OPTIONAL)
    for number, field in enumerate(message.field, start=1):
        field.number = number
    pool = descriptor_pool.DescriptorPool()  # its own, lest the package ships it one day
    pool.Add(file)
    found = pool.FindMessageTypeByName("tensorflow.serving.SSLConfig")
    return message_factory.GetMessageClass(found)()


def _on_one_line(match: re.Match[str]) -> str:
    found = match[0]
    return found if found.startswith("#") else found.replace("\r", "").replace("\n", "\\n")


def _check_pem(path: str, config: Any) -> None:
    """Tries key and certificates out: gRPC says of bad ones only that it cannot bind the port."""
    if config.client_verify and not config.custom_ca:
        raise _unusable(path, "client_verify without a custom_ca to verify clients with")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        with _in_file(config.server_cert) as certificate, _in_file(config.server_key) as key:
            context.load_cert_chain(
                certificate, key, password=""
            )  # an encrypted key fails, unasked
    except (ssl.SSLError, ValueError) as error:
        reason = f"server_key and server_cert are no PEM pair: {error}"
        raise _unusable(path, reason) from error
    try:
        if config.custom_ca:
            context.load_verify_locations(cadata=config.custom_ca)
    except (ssl.SSLError, ValueError) as error:
        raise _unusable(path, f"custom_ca is no PEM certificate: {error}") from error


@contextmanager
def _in_file(text: str) -> Iterator[str]:
    """The path of a file, which only its owner reads, for as long as the context lasts."""
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
        file.write(text)
        file.flush()
        yield file.name


def _unusable(path: str, reason: str) -> ValueError:
    return ValueError(
        "ssl_config_file must be a text proto of tensorflow.serving.SSLConfig. "
        f"Received: ssl_config_file={path!r}, {reason}. {_REMEDY}"
    )


# Requests that are no message of their method.

_UNREADABLE = object()


class RefusesUnreadable(grpc.ServerInterceptor):
    """Refuses a request that cannot be read from within its handler.

    Left to it, gRPC's Python server refuses with the same code and text, and keeps the state of
    the call for ever: 15 KB for each.
    """

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Any],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler of a call, with another reader where one message is answered by one."""
        handler: Any = continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.response_streaming:
            return handler

        def read(data: bytes) -> Any:
            try:
                return handler.request_deserializer(data)
            except DecodeError:
                return _UNREADABLE

        def answer(request: Any, context: grpc.ServicerContext) -> Any:
            if request is _UNREADABLE:
                context.abort(grpc.StatusCode.INTERNAL, "Exception deserializing request!")
            return handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(answer, read, handler.response_serializer)
