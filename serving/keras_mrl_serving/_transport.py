"""One gRPC channel, blocking or for asyncio, and what its errors mean.

A transport carries envelopes. It adds three things to gRPC: the channel's settings made from
`Options`, one address made from several targets, and the table below, which turns every gRPC
status into an exception of `errors.py`.

Retries are gRPC's own, for UNAVAILABLE alone. gRPC knows when a call cannot have reached the
server, keeps all attempts within one deadline, and waits a random while between them. It does not
say how often it tried: `KerasMrlError.attempts` is estimated from the time the call took, and is
wrong where the server forbids retries.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import grpc
from grpc import StatusCode

from ._wire import decode, encode, stubs
from .calls import Envelope, Reply
from .errors import (
    KerasMrlError,
    ServerUnavailableError,
    VersionNotFoundError,
    call_error,
    error_class,
)
from .options import Options

T = TypeVar("T")

_BATCH_TOO_LARGE = re.compile(r"is larger than maximum input batch size (\d+)")


def translate_error(
    error: grpc.RpcError, envelope: Envelope, target: str, options: Options, took_s: float
) -> KerasMrlError:
    """Return our exception for gRPC's, with all that is known about the call that failed.

    Args:
        error: What gRPC raised.
        envelope: The call.
        target: Address of the server.
        options: Settings of the client.
        took_s: Seconds from sending the call to the error.
    """
    call: Any = error  # the errors of grpc and grpc.aio share two methods, and no class
    status = call.code() if hasattr(error, "code") else StatusCode.UNKNOWN
    details = (call.details() if hasattr(error, "details") else None) or str(error)
    kind = error_class(status.name, details)
    remedy = None
    if batch := _BATCH_TOO_LARGE.search(details):
        remedy = f"Set Options(max_batch_size={batch[1]})."
    if kind is VersionNotFoundError and envelope.version is None:
        remedy = "Give a label that the server's model config sets, or none for the newest version."
    attempts = _estimate_attempts(options, took_s) if kind is ServerUnavailableError else None
    after = f" after {attempts} attempts" if attempts and attempts > 1 else ""
    received = f"{status.name}{after}"
    translated = call_error(kind, envelope, target, received, details=details, remedy=remedy)
    translated.attempts = attempts
    return translated


def _estimate_attempts(options: Options, took_s: float) -> int | None:
    """Return how often an UNAVAILABLE call was sent; None if it may have been sent less often.

    gRPC gives up after the last attempt that is allowed, or earlier if the next one would come
    after the deadline. So a call that took as long as all the waits was sent as often as allowed.
    Each wait may be a fifth shorter than its setting.
    """
    waits_s = [options.first_backoff_s * 2**n for n in range(options.max_attempts - 1)]
    shortest_s = 0.8 * sum(min(wait_s, options.max_backoff_s) for wait_s in waits_s)
    return int(options.max_attempts) if took_s >= shortest_s else None


class GrpcTransport:
    """Sends envelopes over one gRPC channel; any number of threads may share it.

    Args:
        targets: One address, or several that serve the same models.
        options: Settings of the client.

    Raises:
        ValueError: If an address cannot be one, or an interceptor is not of `grpc`.
    """

    def __init__(self, targets: str | Sequence[str], options: Options) -> None:
        self._address = channel_address(targets)
        self._interceptors = _check_interceptors(options, grpc.UnaryUnaryClientInterceptor)
        self.target = targets if isinstance(targets, str) else ",".join(targets)
        self._options = options
        self._closed = False
        self._opening = threading.Lock()
        self._open()

    def send(self, envelope: Envelope) -> Reply[Any]:
        """Return the reply; raise a `KerasMrlError`."""
        if self._closed:
            raise _closed_error(self.target)
        if os.getpid() != self._pid:
            self._open_after_fork()
        method, message = encode(envelope)
        start = time.monotonic()
        try:
            response = self._stubs[method](
                message, timeout=_call_timeout_s(envelope), metadata=self._options.headers()
            )
        except (grpc.RpcError, ValueError) as error:
            if self._closed:  # by another thread, while this call was under way
                raise _closed_error(self.target) from error
            if isinstance(error, ValueError):
                raise
            took_s = time.monotonic() - start
            raise translate_error(error, envelope, self.target, self._options, took_s) from error
        return decode(envelope, response, self.target)

    def close(self) -> None:
        """Close the channel."""
        self._closed = True
        self._channel.close()

    def _open(self) -> None:
        channel = _open_channel(grpc, self._address, self._options)
        self._channel = grpc.intercept_channel(channel, *self._interceptors)
        self._stubs = stubs(self._channel)
        self._pid = os.getpid()

    def _open_after_fork(self) -> None:
        """Open a channel in a forked child; gRPC has closed the one of its parent."""
        with self._opening:
            if os.getpid() != self._pid:
                self._open()


class AioTransport:
    """Sends envelopes over one channel of `grpc.aio`, opened in the loop that sends first.

    Args:
        targets: One address, or several that serve the same models.
        options: Settings of the client.

    Raises:
        ValueError: If an address cannot be one, or an interceptor is not of `grpc.aio`.
    """

    def __init__(self, targets: str | Sequence[str], options: Options) -> None:
        self._address = channel_address(targets)
        self._interceptors = _check_interceptors(options, grpc.aio.ClientInterceptor)
        self.target = targets if isinstance(targets, str) else ",".join(targets)
        self._options = options
        self._pid = os.getpid()
        self._channel: grpc.aio.Channel | None = None
        self._stubs: dict[str, Any] = {}
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def send_async(self, envelope: Envelope) -> Reply[Any]:
        """Return the reply; raise a `KerasMrlError`."""
        self._open_or_refuse()
        method, message = encode(envelope)
        start = time.monotonic()
        try:
            response = await self._stubs[method](
                message, timeout=_call_timeout_s(envelope), metadata=self._options.headers()
            )
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                raise _closed_error(self.target) from error
            raise
        except grpc.RpcError as error:
            if self._closed:  # by another task, while this call was under way
                raise _closed_error(self.target) from error
            took_s = time.monotonic() - start
            raise translate_error(error, envelope, self.target, self._options, took_s) from error
        except grpc.aio.UsageError as error:  # raised for a channel closed before the call began
            raise _closed_error(self.target) from error
        return decode(envelope, response, self.target)

    async def close_async(self) -> None:
        """Close the channel."""
        self._closed = True
        if self._channel is not None and asyncio.get_running_loop() is self._loop:
            await self._channel.close()

    def _open_or_refuse(self) -> None:
        """Open the channel in the first loop; raise in another process or loop, or when closed."""
        if os.getpid() != self._pid:
            raise _unusable_error(
                "An AsyncClient lives in the process that made it. "
                f"Received: a call in a process forked from it, to {self.target}. Make the client "
                "after the fork, or start processes with multiprocessing's 'spawn' or "
                "'forkserver'.",
                self.target,
            )
        if self._closed:
            raise _closed_error(self.target)
        loop = asyncio.get_running_loop()
        if self._channel is None:
            self._loop = loop
            self._channel = _open_channel(
                grpc.aio, self._address, self._options, self._interceptors
            )
            self._stubs = stubs(self._channel)
        if loop is not self._loop:
            raise _unusable_error(
                "An AsyncClient lives in the event loop that it first asked from. "
                f"Received: a call from another loop, to {self.target}. Make one client per loop: "
                "`async with AsyncClient(...)` inside the function given to asyncio.run.",
                self.target,
            )


def _closed_error(target: str) -> KerasMrlError:
    return _unusable_error(
        "A client asks until it is closed. "
        f"Received: a call to {target} after close(). Make another Client.",
        target,
    )


def _unusable_error(text: str, target: str) -> KerasMrlError:
    error = KerasMrlError(text)
    error.target = target
    return error


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


_REPLICAS_BEHIND_DNS = 3


def channel_address(targets: str | Sequence[str]) -> str:
    """Return the one address gRPC takes, for one target or several, "host:port" each.

    The hosts of several targets are looked up here, once. To follow changes behind a name, give
    `dns:///name:port` as the only target: gRPC looks it up again.

    Raises:
        ValueError: If there is no target, a target has no port, or its host has no address.
    """
    if isinstance(targets, str):
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


_LAST_PORT = 2**16 - 1


def _check_target(target: object) -> str:
    if not isinstance(target, str):
        raise _target_error(target)
    if "," in target and not target.startswith(("ipv4:", "ipv6:")):
        raise ValueError(
            f"A target is one address. Received: {target!r}. "
            f"Give several as a list: {target.split(',')}."
        )
    has_scheme = ":///" in target or target.startswith(("unix:", "ipv4:", "ipv6:", "dns:", "xds:"))
    _, _, port = target.rpartition(":")
    if has_scheme or (port.isdecimal() and int(port) <= _LAST_PORT):
        return target
    raise ValueError(
        f"A target must be 'host:port'. Received: {target!r}. "
        f"Give the server's gRPC port, for example {target.rstrip(':') or 'localhost'}:8500."
    )


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


def _check_interceptors(options: Options, kind: type[Any]) -> list[Any]:
    """Return the interceptors of `options`; raise if one is not of the kind the client needs."""
    for interceptor in options.interceptors:
        if not isinstance(interceptor, kind):
            raise ValueError(
                f"An interceptor must be a {kind.__module__.partition('._')[0]}.{kind.__name__}. "
                f"Received: {type(interceptor).__name__}. "
                "Give a Client those of grpc, and an AsyncClient those of grpc.aio."
            )
    return list(options.interceptors)


def _open_channel(module: Any, address: str, options: Options, *interceptors: list[Any]) -> Any:
    """Return a channel of `grpc` or of `grpc.aio`, which differ in their interceptors alone."""
    compression = grpc.Compression.Gzip if options.compress else grpc.Compression.NoCompression
    settings = (channel_arguments(options), compression, *interceptors)
    tls = options.tls
    if tls is None:
        return module.insecure_channel(address, *settings)
    credentials = grpc.ssl_channel_credentials(
        tls.root_certificates, tls.private_key, tls.certificate_chain
    )
    return module.secure_channel(address, credentials, *settings)


_LONGEST_KEEPALIVE_S = 1e6
_LONGEST_RECONNECT_MS = 5000  # by default two minutes, in which a restarted server is not found


def channel_arguments(options: Options) -> list[tuple[str, Any]]:
    """Return gRPC's settings for the options of a client."""
    limit = -1 if options.max_message_bytes is None else int(options.max_message_bytes)
    retries = {
        "maxAttempts": int(options.max_attempts),
        "initialBackoff": _duration(options.first_backoff_s),
        "maxBackoff": _duration(options.max_backoff_s),
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    every_method: dict[str, Any] = {"name": [{}]}
    if options.max_attempts > 1:
        every_method["retryPolicy"] = retries
    service = {"loadBalancingConfig": [{"round_robin": {}}], "methodConfig": [every_method]}
    arguments: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", limit),
        ("grpc.max_send_message_length", limit),
        ("grpc.service_config", json.dumps(service)),
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.initial_reconnect_backoff_ms", int(min(100, options.first_backoff_s * 1000)) or 1),
        ("grpc.max_reconnect_backoff_ms", _LONGEST_RECONNECT_MS),
        ("grpc.per_rpc_retry_buffer_size", 2**31 - 1),  # by default, above 256 KiB none is retried
    ]
    if options.keepalive_s is not None:
        keepalive_ms = int(1000 * min(options.keepalive_s, _LONGEST_KEEPALIVE_S)) or 1
        arguments += [
            ("grpc.keepalive_time_ms", keepalive_ms),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),  # by default, two and no more
        ]
    if options.tls is not None and options.tls.server_name is not None:
        arguments.append(("grpc.ssl_target_name_override", options.tls.server_name))
    return arguments


def _duration(seconds: float) -> str:
    """Return seconds as the JSON of gRPC's service config, within the range that gRPC reads."""
    return f"{min(max(seconds, 0.001), 86400):.3f}s"


_LONGEST_TIMEOUT_S = 1e9


def _call_timeout_s(envelope: Envelope) -> float:
    """Return the timeout of one call: a deadline after 2262 overflows and ends the call at once."""
    return min(envelope.remaining_s, _LONGEST_TIMEOUT_S)
