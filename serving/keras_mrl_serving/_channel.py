"""What a gRPC channel is opened with, blocking or not."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from typing import Any, TypeVar

import grpc

from .errors import KerasMrlError
from .options import Options

T = TypeVar("T")

_LONGEST_S = 1e9  # a deadline past 2262 overflows within gRPC, which then gives up at once
_LAST_PORT = 2**16 - 1
_BEHIND_DNS = 3
_LONGEST_KEEPALIVE_S = 1e6
_LONGEST_RECONNECT_MS = 5000  # gRPC's own two minutes would leave a restarted server unfound


def address(targets: str | Sequence[str]) -> str:
    """Return the one address gRPC takes for one target or several, "host:port" each.

    Several are looked up here and once: what changes behind a name is found only by a single
    `dns:///name:port`, which gRPC looks up again.

    Raises:
        ValueError: If there is none, one has no port, or its host has no address.
    """
    if isinstance(targets, str):
        return _checked(targets)
    if not targets:
        raise ValueError(
            "A client needs a target. Received: an empty list. Give for example 'localhost:8500'."
        )
    if len(targets) == 1:
        return _checked(targets[0])
    found = [_look_up(_checked(target)) for target in targets]
    for family, scheme in ((socket.AF_INET, "ipv4"), (socket.AF_INET6, "ipv6")):
        if all(family in addresses for addresses in found):
            return f"{scheme}:" + ",".join(dict.fromkeys(a[family] for a in found))
    raise ValueError(
        "Targets of one list must all have addresses of IPv4, or all of IPv6. "
        f"Received: {', '.join(targets)}. Give a client to each kind, or one 'dns:///name:port'."
    )


def replicas(targets: object) -> int:
    """Return how many servers may take turns: as many as are named, or a few behind `dns:`."""
    if isinstance(targets, str):
        return _BEHIND_DNS if targets.startswith("dns:") else 1
    return len(targets) if isinstance(targets, Sequence) else 1


def arguments(options: Options) -> list[tuple[str, Any]]:
    """Return the channel arguments for `options`."""
    limit = -1 if options.max_message_bytes is None else int(options.max_message_bytes)
    retries = {
        "maxAttempts": int(options.max_attempts),
        "initialBackoff": _wait(options.first_backoff_s),
        "maxBackoff": _wait(options.max_backoff_s),
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    every_method: dict[str, Any] = {"name": [{}]}
    if options.max_attempts > 1:
        every_method["retryPolicy"] = retries
    service = {"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": [every_method]}
    given: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", limit),
        ("grpc.service_config", json.dumps(service)),
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.initial_reconnect_backoff_ms", int(min(100, options.first_backoff_s * 1000)) or 1),
        ("grpc.max_reconnect_backoff_ms", _LONGEST_RECONNECT_MS),
        ("grpc.per_rpc_retry_buffer_size", 2**31 - 1),  # by default, above 256 KiB none is retried
    ]
    if options.keepalive_s is not None:
        given += [
            (
                "grpc.keepalive_time_ms",
                int(1000 * min(options.keepalive_s, _LONGEST_KEEPALIVE_S)) or 1,
            ),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),  # by default, two and no more
        ]
    if options.tls is not None and options.tls.server_name is not None:
        given.append(("grpc.ssl_target_name_override", options.tls.server_name))
    return given


def credentials(options: Options) -> grpc.ChannelCredentials | None:
    """Return what TLS needs, or None for a channel in the clear."""
    tls = options.tls
    if tls is None:
        return None
    return grpc.ssl_channel_credentials(
        tls.root_certificates, tls.private_key, tls.certificate_chain
    )


def compression(options: Options) -> grpc.Compression:
    """Return how requests are compressed."""
    return grpc.Compression.Gzip if options.compress else grpc.Compression.NoCompression


def deadline(remaining_s: float) -> float:
    """Return the timeout of one call, which gRPC must be able to count."""
    return min(remaining_s, _LONGEST_S)


def _no_target(received: object) -> ValueError:
    return ValueError(
        "A target is 'host:port', a list of them, or a transport. "
        f"Received: {type(received).__name__}. Give for example 'localhost:8500'."
    )


def _wait(seconds: float) -> str:
    return f"{min(max(seconds, 0.001), 86400):.3f}s"  # what gRPC can read


def _checked(target: object) -> str:
    if not isinstance(target, str):
        raise _no_target(target)
    if "," in target and not target.startswith(("ipv4:", "ipv6:")):
        raise ValueError(
            f"A target is one address. Received: {target!r}. "
            f"Give several as a list: {target.split(',')}."
        )
    with_scheme = ":///" in target or target.startswith(("unix:", "ipv4:", "ipv6:", "dns:", "xds:"))
    _, _, port = target.rpartition(":")
    if with_scheme or (port.isdecimal() and int(port) <= _LAST_PORT):
        return target
    raise ValueError(
        f"A target must be 'host:port'. Received: {target!r}. "
        f"Give the server's gRPC port, for example {target.rstrip(':') or 'localhost'}:8500."
    )


def _look_up(target: str) -> dict[int, str]:
    host, _, port = target.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(
            "Every target of a list must be a host with an address. "
            f"Received: {target!r} ({error.strerror}). Correct it, or give one 'dns:///name:port'."
        ) from error
    where = {socket.AF_INET: "{}:{}", socket.AF_INET6: "[{}]:{}"}
    return {f: where[f].format(*a[:2]) for f, _, _, _, a in reversed(found) if f in where}


def checked_transport(transport: T, method: str) -> T:
    """Return a transport.

    Raises:
        ValueError: If it has no such method, and so is none.
    """
    if not hasattr(transport, method):
        raise _no_target(transport)
    return transport


def checked_interceptors(options: Options, kind: type[Any]) -> list[Any]:
    """Return the interceptors of `options`.

    Raises:
        ValueError: If one is not of the kind that this client's calls can go through.
    """
    for interceptor in options.interceptors:
        if not isinstance(interceptor, kind):
            raise ValueError(
                f"An interceptor must be a {kind.__module__.partition('._')[0]}.{kind.__name__}. "
                f"Received: {type(interceptor).__name__}. "
                "Give a Client those of grpc, and an AsyncClient those of grpc.aio."
            )
    return list(options.interceptors)


def forked(target: str) -> KerasMrlError:
    """Return the error of an `AsyncClient` made before a fork and used after it."""
    return _outlived(
        "An AsyncClient lives in the process that made it. "
        f"Received: a call in a process forked from it, to {target}. Make the client after the "
        "fork, or start processes with multiprocessing's 'spawn' or 'forkserver'.",
        target,
    )


def of_another_loop(target: str) -> KerasMrlError:
    """Return the error of an `AsyncClient` used from two event loops."""
    return _outlived(
        "An AsyncClient lives in the event loop that it first asked from. "
        f"Received: a call from another loop, to {target}. Make one client per loop: "
        "`async with AsyncClient(...)` inside the function given to asyncio.run.",
        target,
    )


def closed(target: str) -> KerasMrlError:
    """Return the error of a client that was closed."""
    return _outlived(
        "A client asks until it is closed. "
        f"Received: a call to {target} after close(). Make another Client.",
        target,
    )


def _outlived(text: str, target: str) -> KerasMrlError:
    error = KerasMrlError(text)
    error.target = target
    return error
