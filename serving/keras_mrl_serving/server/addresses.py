"""Whether the addresses of a server are free: asked without TensorFlow, which loads slowly."""

import socket


def check_free(host: str, flag: str, port: int) -> None:
    """Checks that a port can be bound.

    Args:
        host: the address to listen on.
        flag: the argument that gave the port.
        port: the port; 0 is always free.

    Raises:
        OSError: it is taken, or its address is none of this machine.
    """
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        raise not_free(host, flag, port) from error


def not_free(host: str, flag: str, port: int) -> OSError:
    """The error about an address that cannot be bound."""
    return OSError(
        f"The address must be free. Received: host={host!r}, {flag}={port}, "
        f"which cannot be bound. Choose another port, or {flag}=0 for any free one."
    )
