"""What a gRPC server has besides its services: options, a socket, TLS, health."""

import os
import ssl
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from .text_proto import TextProtoFile, empty_message

Options = tuple[tuple[str, int | str], ...]
_OPTIONS: dict[str, int | str] = {
    # TensorFlow Serving's limit, the largest that there is; Python's default is 4 MB.
    "grpc.max_receive_message_length": 2**31 - 1,
    "grpc.max_send_message_length": -1,
    # TensorFlow Serving has none of these three limits.
    "grpc.max_allowed_incoming_connections": 1000,
    "grpc.max_concurrent_streams": 100,
    "grpc.server_handshake_timeout_ms": 20_000,
    # Otherwise two servers share one port in silence, and each answers half of the requests.
    "grpc.so_reuseport": 0,
}
_MAX_SOCKET_PATH_BYTES = 107  # the size of the kernel's address, less its final zero
_HEALTHY_SERVICES = ("", "ModelService", "PredictionService")
_SSL_CONFIG = {
    "server_key": "string",
    "server_cert": "string",
    "custom_ca": "string",
    "client_verify": "bool",
}


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
        options[key] = _int_or_text(value)
    return tuple(options.items())


def _int_or_text(value: str) -> int | str:
    try:
        number = int(value)
    except ValueError:
        return value
    return number if -(2**31) <= number < 2**31 else value


def socket_address(grpc_socket_path: str) -> str:
    """The address at which a gRPC server listens on a Unix domain socket.

    Args:
        grpc_socket_path: path of the socket; gRPC removes a socket that an earlier server left.

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
    """Registers grpc.health.v1, which reports TensorFlow Serving's services as serving.

    Args:
        server: the server, not yet started.
    """
    # A blocking Watch would keep one of the server's threads for each client.
    servicer = health.HealthServicer(experimental_non_blocking=True)
    for service in _HEALTHY_SERVICES:
        servicer.set(service, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)


def server_credentials(path: str) -> grpc.ServerCredentials:
    """The credentials of a server that speaks TLS.

    Args:
        path: file with a text proto of `tensorflow.serving.SSLConfig`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such text proto, or its key and certificates cannot be used.
    """
    example = "server_key, server_cert and custom_ca hold PEM text"
    file = TextProtoFile("ssl_config_file", path, empty_message("SSLConfig", _SSL_CONFIG), example)
    config = file.read()
    if reason := _reason_against(config):
        raise file.error(reason)
    return grpc.ssl_server_credentials(
        [(config.server_key.encode(), config.server_cert.encode())],
        config.custom_ca.encode() or None,
        config.client_verify,
    )


def _reason_against(config: Any) -> str:
    """Why an SSLConfig cannot be used, or nothing; gRPC would only say it cannot bind the port."""
    if config.client_verify and not config.custom_ca:
        return "client_verify without a custom_ca to verify clients with"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        with _in_file(config.server_cert) as certificate, _in_file(config.server_key) as key:
            # An empty password: given none, OpenSSL would ask for it at the terminal.
            context.load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, ValueError) as error:
        return f"server_key and server_cert are no PEM pair: {error}"
    try:
        if config.custom_ca:
            context.load_verify_locations(cadata=config.custom_ca)
    except (ssl.SSLError, ValueError) as error:
        return f"custom_ca is no PEM certificate: {error}"
    return ""


@contextmanager
def _in_file(text: str) -> Iterator[str]:
    """The path of a file that its owner alone can read, and that is gone after the context."""
    with tempfile.NamedTemporaryFile("w", suffix=".pem") as file:
        file.write(text)
        file.flush()
        yield file.name
