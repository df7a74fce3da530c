"""The addresses of a server, and what is said of one that cannot be had."""

import grpc

from .http_server import Answer, HttpServer
from .transport import socket_address


def bind(
    server: grpc.Server, host: str, port: int, credentials: grpc.ServerCredentials | None
) -> int:
    """Binds the gRPC port and returns its number.

    Args:
        server: the server, not yet started.
        host: the address to listen on.
        port: the port to listen on; 0 takes a free one.
        credentials: what TLS needs; None means without.

    Raises:
        OSError: the port is taken.
    """
    try:
        return _add(server, f"{host}:{port}", credentials)
    except RuntimeError as error:
        raise _not_free(host, f"port={port}") from error


def bind_socket(server: grpc.Server, path: str, credentials: grpc.ServerCredentials | None) -> None:
    """Has a gRPC server listen on a Unix domain socket too.

    Args:
        server: the server, not yet started.
        path: path of the socket.
        credentials: what TLS needs; None means without.

    Raises:
        OSError: no socket can be made there.
    """
    address = socket_address(path)
    try:
        _add(server, address, credentials)
    except RuntimeError as error:
        raise OSError(
            "grpc_socket_path must be a path in a folder that can be written. Received: "
            f"grpc_socket_path={path!r}, which cannot be bound. Choose another path."
        ) from error


def bind_http(host: str, port: int, answer: Answer) -> HttpServer:
    """The server of the REST port, bound but not started.

    Args:
        host: the address to listen on.
        port: the port to listen on; 0 takes a free one.
        answer: from method, path and body to the HTTP code and a JSON body.

    Raises:
        OSError: the port is taken.
    """
    try:
        return HttpServer(host, port, answer)
    except (OSError, OverflowError) as error:
        raise _not_free(host, f"rest_api_port={port}") from error


def _add(server: grpc.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    if credentials is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, credentials)


def _not_free(host: str, port: str) -> OSError:
    return OSError(
        f"The address must be free. Received: host={host!r}, {port}, "
        f"which cannot be bound. Choose another port, or {port.partition('=')[0]}=0 for any "
        "free one."
    )
