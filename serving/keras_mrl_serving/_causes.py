"""Why a server is unavailable, as gRPC's words tell, and what to do about each cause."""

from __future__ import annotations

import re
import socket
import ssl
from dataclasses import dataclass
from urllib.parse import unquote

from .errors import NO_SERVER_REMEDY


@dataclass(frozen=True)
class Cause:
    """Why a server is unavailable, as gRPC's words tell.

    Args:
        pattern: Pattern in the words.
        remedy: What to do.
        is_lasting: Whether another attempt would fail in the same way.
    """

    pattern: str
    remedy: str
    is_lasting: bool = True


_HUNG_UP = "last error: .*(Socket closed|Connection reset by peer)"
TLS_REMEDY = (
    "TLS is spoken at this port: give Options(tls=Tls(root_certificates=...)). If the server asks "
    "who its clients are, add private_key=... and certificate_chain=...."
)

# The first that fits.
_CAUSES = (
    Cause(
        "HTTP proxy returned response code 407",
        "Give the proxy a name and a password in its variable: http://NAME:PASSWORD@HOST:PORT.",
    ),
    Cause(
        "HTTP proxy returned response code (4|501)", "Let the proxy allow CONNECT to the target."
    ),
    Cause(
        "HTTP proxy returned response code",
        "See whether a server runs at the target, and whether the proxy reaches it.",
        is_lasting=False,
    ),
    Cause(
        "WRONG_VERSION_NUMBER|HTTP_REQUEST",
        "No TLS is spoken at this port: leave out Options(tls=...), or give a port with TLS.",
    ),
    Cause(
        "CERTIFICATE_VERIFY_FAILED: certificate (has expired|is not yet valid)",
        "The server's certificate is out of date: renew it, or set the clock of this machine.",
    ),
    Cause(
        "CERTIFICATE_VERIFY_FAILED",
        "Give the authority that signed the server's certificate: "
        "Options(tls=Tls(root_certificates=...)).",
    ),
    Cause(
        "Hostname Verification Check failed",
        "The server's certificate bears another name than the target: give it by "
        "Options(tls=Tls(server_name=...)).",
    ),
    Cause(
        "CERTIFICATE_REQUIRED|BAD_CERTIFICATE|UNKNOWN_CA",
        "The server asks who its clients are: give a certificate that it knows, "
        "Options(tls=Tls(private_key=..., certificate_chain=...)).",
    ),
    Cause(
        r"Expected SETTINGS frame as the first frame, got frame type 0\b",  # an alert of TLS
        TLS_REMEDY,
    ),
    Cause(
        "Expected SETTINGS frame as the first frame|http1.x server",
        "No gRPC is spoken at this port. TensorFlow Serving has one port for gRPC (8500) and "
        "another for REST (8501): give that of gRPC.",
    ),
    Cause(
        _HUNG_UP,
        "The server hung up before it spoke gRPC. If it asks for TLS, give "
        "Options(tls=Tls(root_certificates=...)); if for a certificate of its clients, add "
        "private_key=... and certificate_chain=....",
        is_lasting=False,
    ),
    Cause(
        "last error: .*timed out before receiving SETTINGS",
        "The port takes connections and says nothing: see whether the server hangs, or give its "
        "gRPC port.",
        is_lasting=False,
    ),
    Cause(
        r"last error: .*ipv6:(\[::1\]|%5B::1%5D):\d+: Failed to connect",
        f"{NO_SERVER_REMEDY} If the target is localhost, 127.0.0.1 was tried too: give that, to "
        "see its own error.",
        is_lasting=False,
    ),
    Cause(
        "errors resolving|DNS resolution failed",
        "Give a host that has an address here.",
        is_lasting=False,
    ),
)


def find_cause(details: str) -> Cause | None:
    """Return why a server is unavailable; None if gRPC's words do not tell.

    Examples:
        >>> find_cause("last error: UNKNOWN: ipv4:127.0.0.1:1: Connection refused") is None
        True
    """
    if not re.match(_NOT_CONNECTED, details):  # a server's own words
        return None
    return next((cause for cause in _CAUSES if re.search(cause.pattern, details)), None)


def peer_that_hung_up(details: str) -> tuple[str, int] | None:
    """Return the host and the port of a server that hung up before it spoke; None without one.

    Examples:
        >>> peer_that_hung_up("failed to connect to all addresses; last error: UNAVAILABLE: "
        ...     "ipv6:%5B::1%5D:8500: Socket closed")
        ('::1', 8500)
    """
    if not re.match(_NOT_CONNECTED, details) or not re.search(_HUNG_UP, details):
        return None
    peer = re.search(r"last error: .*ipv[46]:(\S+):(\d+): ", details)
    return None if peer is None else (unquote(peer[1]).strip("[]"), int(peer[2]))


def speaks_tls(peer: tuple[str, int]) -> bool:
    """Return whether TLS is spoken at a host and a port, as a handshake tells within a second.

    A server that asks for TLS hangs up on clients without it, and so does one that is about to
    start, or a load balancer whose server is gone: to these a call is worth another attempt.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent
    try:
        with socket.create_connection(peer, 1.0) as plain, context.wrap_socket(plain):
            return True
    except ssl.SSLError as error:
        return "ALERT" in (error.reason or "")
    except OSError:
        return False


_NOT_CONNECTED = (
    "failed to connect to all addresses|connections to all backends failing"
    "|errors resolving|DNS resolution failed"
)
