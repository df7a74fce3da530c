"""What a gRPC channel is opened with, blocking or not."""

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

from ._wire import decode, encode, stubs
from .calls import Envelope, Reply
from .errors import (
    AccessDeniedError,
    DeadlineError,
    InvalidInputError,
    KerasMrlError,
    MessageTooLargeError,
    ModelNotFoundError,
    ServerError,
    ServerUnavailableError,
    SignatureNotFoundError,
    VersionNotFoundError,
    failed,
)
from .options import Options

# The one table from gRPC status and text to this package's errors.

_NO_LABEL = "Unrecognized servable version label"
_BATCH_TOO_LARGE = re.compile(r"is larger than maximum input batch size (\d+)")


def leaf_of(code: grpc.StatusCode, details: str) -> type[KerasMrlError]:
    """The table: which error a gRPC status and its text stand for.

    Examples:
        >>> leaf_of(grpc.StatusCode.NOT_FOUND, "Servable not found for request: Specific(m, 7)")
        <class 'keras_mrl_serving.errors.VersionNotFoundError'>
    """
    if code is grpc.StatusCode.NOT_FOUND and "Specific(" in details:
        return VersionNotFoundError
    if code is grpc.StatusCode.INVALID_ARGUMENT and details.startswith(_NO_LABEL):
        return VersionNotFoundError
    if code is grpc.StatusCode.FAILED_PRECONDITION and "Serving signature key" in details:
        return SignatureNotFoundError
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in details:
        return MessageTooLargeError
    return {
        grpc.StatusCode.UNAVAILABLE: ServerUnavailableError,
        grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
        grpc.StatusCode.NOT_FOUND: ModelNotFoundError,
        grpc.StatusCode.INVALID_ARGUMENT: InvalidInputError,
        grpc.StatusCode.UNAUTHENTICATED: AccessDeniedError,
        grpc.StatusCode.PERMISSION_DENIED: AccessDeniedError,
    }.get(code, ServerError)


def translate(
    error: grpc.RpcError, envelope: Envelope, target: str, options: Options, took_s: float
) -> KerasMrlError:
    """Return our error for gRPC's, with everything known about the call that failed.

    Args:
        error: What gRPC raised.
        envelope: What was sent.
        target: Where it was sent.
        options: How it was sent.
        took_s: Seconds from sending to the error.
    """
    said: Any = error  # grpc and grpc.aio share these two methods and no class
    code = said.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    details = (said.details() if hasattr(error, "details") else None) or str(error)
    leaf = leaf_of(code, details)
    batch = _BATCH_TOO_LARGE.search(details)
    remedy = f"Set Options(max_batch_size={batch[1]})." if batch else None
    if leaf is VersionNotFoundError and envelope.version is None:
        remedy = "Give a label that the server's model config sets, or none for the newest version."
    attempts = _attempts(options, took_s) if leaf is ServerUnavailableError else None
    sent = f" after {attempts} attempts" if attempts and attempts > 1 else ""
    received = f"{code.name}{sent}"
    translated = failed(leaf, envelope, target, received, details=details, remedy=remedy)
    translated.attempts = attempts
    return translated


def _attempts(options: Options, took_s: float) -> int | None:
    """How often an UNAVAILABLE call was sent; None if it cannot have been so often as allowed.

    gRPC does not say. It gives up after the last attempt, or before one that would come after the
    deadline; the waits between attempts are known to a fifth.
    """
    waits = [options.first_backoff_s * 2**n for n in range(options.max_attempts - 1)]
    least_s = 0.8 * sum(min(wait, options.max_backoff_s) for wait in waits)
    return int(options.max_attempts) if took_s >= least_s else None


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


def channel_arguments(options: Options) -> list[tuple[str, Any]]:
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


def channel_credentials(options: Options) -> grpc.ChannelCredentials | None:
    """Return what TLS needs, or None for a channel in the clear."""
    tls = options.tls
    if tls is None:
        return None
    return grpc.ssl_channel_credentials(
        tls.root_certificates, tls.private_key, tls.certificate_chain
    )


def channel_compression(options: Options) -> grpc.Compression:
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


# A blocking transport over gRPC.


class GrpcTransport:
    """Sends envelopes over one gRPC channel; any number of threads may share it.

    Args:
        targets: One address, or several that serve the same models.
        options: How to connect and send.

    Raises:
        ValueError: If an address is none, or an interceptor is not one of `grpc`.
    """

    def __init__(self, targets: str | Sequence[str], options: Options) -> None:
        self._address = address(targets)
        self._interceptors = checked_interceptors(options, grpc.UnaryUnaryClientInterceptor)
        self.target = targets if isinstance(targets, str) else ",".join(targets)
        self._options = options
        self._closed = False
        self._opening = threading.Lock()
        self._open()

    def send(self, envelope: Envelope) -> Reply[Any]:
        """Return the reply; raise a `KerasMrlError`."""
        if self._closed:
            raise closed(self.target)
        if os.getpid() != self._pid:
            self._open_after_fork()
        method, message = encode(envelope)
        began = time.monotonic()
        try:
            response = self._stubs[method](
                message,
                timeout=deadline(envelope.remaining_s),
                metadata=self._options.headers(),
            )
        except (grpc.RpcError, ValueError) as error:
            if self._closed:  # by another thread, in mid-call
                raise closed(self.target) from error
            if isinstance(error, ValueError):
                raise
            took_s = time.monotonic() - began
            raise translate(error, envelope, self.target, self._options, took_s) from error
        return decode(envelope, response, self.target)

    def close(self) -> None:
        """Close the channel."""
        self._closed = True
        self._channel.close()

    def _open(self) -> None:
        options = self._options
        arguments, compression = channel_arguments(options), channel_compression(options)
        credentials = channel_credentials(options)
        if credentials is None:
            channel = grpc.insecure_channel(self._address, arguments, compression)
        else:
            channel = grpc.secure_channel(self._address, credentials, arguments, compression)
        self._channel = grpc.intercept_channel(channel, *self._interceptors)
        self._stubs = stubs(self._channel)
        self._pid = os.getpid()

    def _open_after_fork(self) -> None:
        """Give a forked child a channel of its own; gRPC closes the one it inherited."""
        with self._opening:
            if os.getpid() != self._pid:
                self._open()


# A transport over gRPC for asyncio.


class AioTransport:
    """Sends envelopes over one channel of `grpc.aio`, opened in the loop that sends first.

    Args:
        targets: One address, or several that serve the same models.
        options: How to connect and send.

    Raises:
        ValueError: If an address is none, or an interceptor is not one of `grpc.aio`.
    """

    def __init__(self, targets: str | Sequence[str], options: Options) -> None:
        self._address = address(targets)
        self.target = targets if isinstance(targets, str) else ",".join(targets)
        self._options = options
        self._pid = os.getpid()
        self._interceptors = checked_interceptors(options, grpc.aio.ClientInterceptor)
        self._channel: grpc.aio.Channel | None = None
        self._stubs: dict[str, Any] = {}
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def send_async(self, envelope: Envelope) -> Reply[Any]:
        """Return the reply; raise a `KerasMrlError`."""
        if os.getpid() != self._pid:
            raise forked(self.target)
        if self._closed:
            raise closed(self.target)
        loop = asyncio.get_running_loop()
        if self._channel is None:
            self._open(loop)
        if loop is not self._loop:
            raise of_another_loop(self.target)
        method, message = encode(envelope)
        began = time.monotonic()
        try:
            response = await self._stubs[method](
                message,
                timeout=deadline(envelope.remaining_s),
                metadata=self._options.headers(),
            )
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if self._closed and task is not None and not task.cancelling():
                raise closed(self.target) from error
            raise
        except grpc.RpcError as error:
            if self._closed:  # by another task, in mid-call
                raise closed(self.target) from error
            took_s = time.monotonic() - began
            raise translate(error, envelope, self.target, self._options, took_s) from error
        except grpc.aio.UsageError as error:  # grpc's word for a channel closed meanwhile
            raise closed(self.target) from error
        return decode(envelope, response, self.target)

    async def close_async(self) -> None:
        """Close the channel."""
        self._closed = True
        if self._channel is not None and asyncio.get_running_loop() is self._loop:
            await self._channel.close()

    def _open(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        options = self._options
        arguments, compression = channel_arguments(options), channel_compression(options)
        credentials = channel_credentials(options)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(
                self._address, arguments, compression, self._interceptors
            )
        else:
            self._channel = grpc.aio.secure_channel(
                self._address, credentials, arguments, compression, self._interceptors
            )
        self._stubs = stubs(self._channel)
