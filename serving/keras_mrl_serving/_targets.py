"""Where a client's servers are: targets as one address of gRPC, and the proxy on the way there.

gRPC takes a proxy from the environment, and reads it in its own way: only in lower case, a name in
`no_proxy` only as the end of a host, and a list of addresses as if it were one host. So the proxy
is decided here, by the names that the caller gave; gRPC is told whether to look for one.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")

_LAST_PORT = 2**16 - 1
_REPLICAS_BEHIND_DNS = 3
# Schemes of gRPC whose addresses are checked by gRPC alone. `dns:` is checked here.
_EXAMPLE_OF_SCHEME = {
    "unix": "unix:/run/models.sock",
    "unix-abstract": "unix-abstract:models",
    "vsock": "vsock:2:8500",
    "ipv4": "ipv4:10.0.0.1:8500",
    "ipv6": "ipv6:[2001:db8::1]:8500",
    "xds": "xds:///models",
}
_SCHEMES = tuple(f"{scheme}:" for scheme in _EXAMPLE_OF_SCHEME)


def check_transport(transport: T, method: str) -> T:
    """Return `transport`.

    Raises:
        ValueError: If it lacks the method, and so is not a transport.
    """
    if not hasattr(transport, method):
        raise _target_error(transport)
    return transport


def count_replicas(targets: object) -> int:
    """Return how many servers may take turns: one per target, or a few behind a `dns:` name."""
    if isinstance(targets, str):
        return _REPLICAS_BEHIND_DNS if targets.startswith("dns:") else 1
    return len(targets) if isinstance(targets, Sequence) else 1


def channel_address(targets: str | Sequence[str]) -> str:
    """Return the one address gRPC takes, for one target or several, "host:port" each.

    The hosts of several targets are looked up here, once. To follow changes behind a name, give
    `dns:///name:port` as the only target: gRPC looks it up again.

    Raises:
        ValueError: If there is no target, a target has no port, or its host has no address.
    """
    if isinstance(targets, str | bytes | bytearray | memoryview):
        return _check_target(targets)
    if not targets:
        raise ValueError(
            "A client needs a target. Received: an empty list. Give for example 'localhost:8500'."
        )
    if len(targets) == 1:
        return _check_target(targets[0])
    addresses_by_family = [_look_up(_check_target(target)) for target in targets]
    for family, scheme in ((socket.AF_INET, "ipv4"), (socket.AF_INET6, "ipv6")):
        if all(family in addresses for addresses in addresses_by_family):
            unique = dict.fromkeys(addresses[family] for addresses in addresses_by_family)
            return f"{scheme}:" + ",".join(unique)
    raise ValueError(
        "Targets of one list must all have addresses of IPv4, or all of IPv6. "
        f"Received: {', '.join(targets)}. Give a client to each kind, or one 'dns:///name:port'."
    )


def is_one_address(address: str) -> bool:
    """Whether an address of gRPC is one machine for certain: no name, and no list."""
    host = _host_and_port(address.removeprefix("ipv4:").removeprefix("ipv6:"))[0].strip("[]")
    return "," not in address and (address.startswith("unix") or _is_loopback(host) or _is_ip(host))


def _check_target(target: object) -> str:
    if not isinstance(target, str):
        raise _target_error(target)
    if "@" in target and "://" not in target and not target.startswith(_SCHEMES):
        raise ValueError(
            "A target is 'host:port', without a name or a password. Received: one with '@'. "
            "Give what the server asks for as Options(metadata={'authorization': ...})."
        )
    if not target.isprintable():
        raise ValueError(
            "A target is written in characters that print. "
            f"Received: {target.rpartition('@')[2]!r}. Give for example 'localhost:8500'."
        )
    if "," in target and not target.startswith(("ipv4:", "ipv6:")):
        raise ValueError(
            f"A target is one address. Received: {target!r}. "
            f"Give several as a list: {target.split(',')}."
        )
    if target.startswith(_SCHEMES):
        scheme, _, rest = target.partition(":")
        addresses = rest.split(",") if scheme in ("ipv4", "ipv6") else [rest]
        if not all(address.strip("/ ") for address in addresses):
            raise ValueError(
                f"A target of {scheme}: names an address. "
                f"Received: {target!r}. Give for example {_EXAMPLE_OF_SCHEME[scheme]!r}."
            )
        return target
    if "://" in target and not target.startswith("dns:"):
        raise _url_error(target)
    host, port = _host_and_port(target)
    if ":" in host and not host.startswith("["):
        bracketed = f"[{host}]:{port}" if _is_ip(host) else f"[{target}]:8500"
        raise ValueError(
            f"An IPv6 address stands in brackets. Received: {target!r}. Give {bracketed!r}."
        )
    if host and port.isascii() and port.isdecimal() and 0 < int(port) <= _LAST_PORT:
        return target
    example = target if not host or target.endswith("]") else target.removesuffix(f":{port}")
    if example[:1] in ("", ":"):
        example = "localhost"
    raise ValueError(
        f"A target must be 'host:port'. Received: {target!r}. "
        f"Give the server's gRPC port, for example {example}:8500."
    )


def _host_and_port(target: str) -> tuple[str, str]:
    """Return the host of a target, without what `dns:` puts before it, and its port."""
    name = target.rpartition("/")[2].removeprefix("dns:") if target.startswith("dns:") else target
    host, _, port = name.rpartition(":")
    return host, port


def _url_error(target: str) -> ValueError:
    scheme, _, rest = target.partition("://")
    # Without a user, a password, which may hold any character, a path and a query.
    place = rest.rpartition("@")[2].partition("/")[0].partition("?")[0]
    host, colon, port = place.rpartition(":")
    if not colon or port.endswith("]"):
        host, port = place, ""
    tls = ", and Options(tls=Tls())" if scheme.lower() in ("https", "grpcs") else ""
    grpc_port = "8500" if port in ("", "8501") else port  # 8501 is TensorFlow Serving's for REST
    return ValueError(
        f"A target is 'host:port', not a URL. Received: '{scheme}://{place}'. "
        f"Give the server's gRPC port, '{host or 'localhost'}:{grpc_port}'{tls}."
    )


def _is_ip(host: str) -> bool:
    with suppress(ValueError):
        ipaddress.ip_address(host)
        return True
    return False


def _target_error(received: object) -> ValueError:
    return ValueError(
        "A target is 'host:port', a list of them, or a transport. "
        f"Received: {type(received).__name__}. Give for example 'localhost:8500'."
    )


def _look_up(target: str) -> dict[int, str]:
    """Return the first address of the target's host in each family, IPv4 and IPv6."""
    host, _, port = target.rpartition(":")
    try:
        entries = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(
            "Every target of a list must be a host with an address. "
            f"Received: {target!r} ({error.strerror}). Correct it, or give one 'dns:///name:port'."
        ) from error
    formats = {socket.AF_INET: "{}:{}", socket.AF_INET6: "[{}]:{}"}
    return {
        family: formats[family].format(*address[:2])
        for family, _, _, _, address in reversed(entries)  # the first one wins
        if family in formats
    }


# Proxies.


@dataclass(frozen=True)
class Proxy:
    """A proxy that gRPC asks for a connection.

    Args:
        variable: The variable of the environment that names it.
        address: Its host and port, without user and password; empty where a part of the URL may
            belong to either.
        is_asked: Whether gRPC takes it: it asks proxies of http:// alone.
    """

    variable: str
    address: str
    is_asked: bool = True

    def explain(self, details: str, remedy: str) -> tuple[str, str]:
        """Return gRPC's words about a failure and the remedy, with this proxy in both."""
        if not self.is_asked:
            place = f"asked directly: {self.variable} is not taken"
            more = (
                f"gRPC asks proxies of http:// alone: give {self.variable} as http://HOST:PORT, or "
                "Options(proxy=False) to go without."
            )
        elif not self.address:  # gRPC's words may repeat a part of the password
            details, place = "no connection was made", f"through the proxy of {self.variable}"
            remedy = ""
            more = (
                f"Write {self.variable} as http://NAME:PASSWORD@HOST:PORT, with characters such as "
                f"/, ? and # of the password as %2F, %3F and %23. {_NO_PROXY_REMEDY}"
            )
        else:
            place, more = f"through the proxy {self.address} of {self.variable}", _NO_PROXY_REMEDY
        return f"{details.rstrip('.')} ({place})", f"{remedy} {more}".strip()


_NO_PROXY_REMEDY = (
    "To go without the proxy, name the target in no_proxy, or give Options(proxy=False)."
)


def find_proxy(
    targets: str | Sequence[str], environment: Mapping[str, str] = os.environ
) -> Proxy | None:
    """Return the proxy that is named for a target, None if the target is asked directly.

    Loopback, sockets of this machine, several targets, and what `no_proxy` names are asked
    directly. `no_proxy` holds ends of names, addresses, networks or "*", with commas between.
    """
    variable = next(
        (v for v in ("grpc_proxy", "https_proxy", "http_proxy") if v in environment), ""
    )
    url = environment.get(variable, "")
    target = targets if isinstance(targets, str) else targets[0]
    if not url or target.startswith(("unix", "vsock:", "xds:")):
        return None
    if "," in target or (not isinstance(targets, str) and len(targets) > 1):
        return None  # gRPC would ask the proxy for the list as if it were one host
    host, port = _host_and_port(target.removeprefix("ipv4:").removeprefix("ipv6:"))
    host = host.strip("[]").lower()
    exempting = ("no_grpc_proxy", "no_proxy", "NO_PROXY")
    names = next((environment[each] for each in exempting if environment.get(each)), "")
    if _is_loopback(host) or any(_is_named(host, port, name) for name in names.split(",")):
        return None
    address = _split_url(url)
    return Proxy(variable, address or "", is_asked=address is not None)


def _split_url(url: str) -> str | None:
    """Return host and port of a proxy's URL, None for a URL that gRPC does not take for one.

    Empty where they may be a part of a password that holds "/", "?" or "#".
    """
    with suppress(ValueError):
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            return None
        host_and_port = parts.netloc.rpartition("@")[2]
        port = host_and_port.rpartition("]")[2].partition(":")[2]
        is_cut = "@" in parts.path + parts.query + parts.fragment
        return "" if is_cut or (port and not port.isdecimal()) else host_and_port
    return None


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost" or host.endswith(".localhost")


def _is_named(host: str, port: str, name: str) -> bool:
    """Whether a name of `no_proxy` means this host."""
    name = name.strip().lower()
    if name == "*":
        return True
    with suppress(ValueError):
        return ipaddress.ip_address(host) in ipaddress.ip_network(name, strict=False)
    end = name.removeprefix("*").lstrip(".")
    return bool(end) and (host.endswith(end) or f"{host}:{port}".endswith(end))
