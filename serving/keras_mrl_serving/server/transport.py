"""What the gRPC server is told besides its services: channel arguments, a socket, its health."""

import os
import stat

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

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
