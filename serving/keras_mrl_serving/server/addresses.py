"""Whether the addresses of a server are free: asked without TensorFlow, which loads slowly."""

import socket


def check_free(host: str, flag: str, port: int) -> None:
    """Raise unless a port can be bound.

    Args:
        host: The address to listen on.
        flag: The argument that gave the port.
        port: The port; 0 is always free.

    Raises:
        OSError: If it is taken, or its address is none of this machine.
    """
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        raise not_free(host, flag, port) from error


def not_free(host: str, flag: str, port: int) -> OSError:
    """Return the error about an address that cannot be bound."""
    return OSError(
        f"The address must be free. Received: host={host!r}, {flag}={port}, "
        f"which cannot be bound. Choose another port, or {flag}=0 for any free one."
    )
