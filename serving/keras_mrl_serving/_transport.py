"""The transports of both clients: they carry envelopes over gRPC, and say what its errors mean.

A transport adds four things to gRPC: one address made from several targets (`_targets.py`), a new
channel where the old one is silent (`_connection.py`), retries, and the tables that turn every gRPC
status into an exception (`errors.py`) and the causes that gRPC names into advice (`_causes.py`).

Retries are for UNAVAILABLE, and for CANCELLED by a server that is being stopped, within the
deadline of the call. They are not left to gRPC, which would try again what cannot get better, such
as a certificate of another host, and does not say how often it tried.
Calls that cannot have reached a server are sent again by gRPC besides.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import threading
import time
from collections.abc import Sequence
from typing import Any

import grpc
from grpc import StatusCode

from ._causes import TLS_REMEDY, find_cause, peer_that_hung_up, speaks_tls
from ._connection import Attempt, Connection, Connections, Silence, open_channel, readiness
from ._targets import Proxy, channel_address, count_replicas, find_proxy
from ._wire import decode, encode
from .calls import Envelope, Reply
from .errors import (
    DeadlineError,
    KerasMrlError,
    MessageTooLargeError,
    ServerUnavailableError,
    VersionNotFoundError,
    call_error,
    error_class,
)
from .options import Options

_BATCH_TOO_LARGE = re.compile(r"is larger than maximum input batch size (\d+)")
_OWN_DEADLINE = "deadline exceeded"  # as gRPC says it; servers use other words


def translate_error(
    error: grpc.RpcError,
    envelope: Envelope,
    target: str,
    *,
    attempts: int = 1,
    is_connected: bool = True,
    proxy: Proxy | None = None,
    is_tls: bool = False,
) -> KerasMrlError:
    """Return our exception for gRPC's, with all that is known about the call that failed.

    Args:
        error: What gRPC raised.
        envelope: The call.
        target: Address of the server.
        attempts: How often the call was sent.
        is_connected: Whether there was a connection when it failed.
        proxy: The proxy on the way to the target.
        is_tls: Whether TLS is spoken at the target, and the client has none.
    """
    status, details = _status(error)
    kind = error_class(status.name, details)
    remedy = None
    if batch := _BATCH_TOO_LARGE.search(details):
        remedy = f"Set Options(max_batch_size={batch[1]})."
    if kind is MessageTooLargeError and "metadata size" in details:
        remedy = (
            "Shorten what Options(metadata=...) sends: a gRPC server takes 8 KiB of metadata "
            "unless its grpc.max_metadata_size says more."
        )
    if kind is VersionNotFoundError and envelope.version is None:
        remedy = "Give a label that the server's model config sets, or none for the newest version."
    if _is_own_deadline(error):
        details = _SILENT if is_connected else _NOT_CONNECTED
        remedy = _SILENT_REMEDY if is_connected else _NOT_CONNECTED_REMEDY
    is_lasting = is_tls
    if kind is ServerUnavailableError and (cause := find_cause(details)):
        is_lasting |= cause.is_lasting
        remedy = TLS_REMEDY if is_tls else cause.remedy
    if status is StatusCode.CANCELLED or _STOPPED.search(details):
        remedy = _STOPPED_REMEDY
    after = f" after {attempts} attempts" if attempts > 1 else ""
    received = f"{status.name}{after}"
    if proxy is not None and not proxy.is_asked and is_connected:
        proxy = None
    if proxy is not None and kind in (ServerUnavailableError, DeadlineError):
        details, remedy = proxy.explain(details, remedy or "")
    translated = call_error(kind, envelope, target, received, details=details, remedy=remedy)
    translated.attempts = attempts
    if is_lasting:
        translated.is_lasting = True
    return translated


_STOPPED = re.compile("server was stopped|Cancelling all calls")
_STOPPED_REMEDY = "Once a server runs there again, calling again goes on."
_SILENT = "connected, but no answer came"
_NOT_CONNECTED = "no connection was made"
_SILENT_REMEDY = (
    "Send fewer rows at once, or raise Options(timeout_s=...). Where a network forgets connections "
    "that are idle, set Options(keepalive_s=...) to what the server allows."
)
_NOT_CONNECTED_REMEDY = (
    "See whether a server runs there and can be reached from here, or raise Options(timeout_s=...)."
)


def _status(error: grpc.RpcError) -> tuple[StatusCode, str]:
    call: Any = error  # the errors of grpc and grpc.aio share two methods, and no class
    status = call.code() if hasattr(error, "code") else StatusCode.UNKNOWN
    details = (call.details() if hasattr(error, "details") else None) or str(error)
    return status, details


def _is_own_deadline(error: grpc.RpcError) -> bool:
    """Whether the client's deadline passed; a server's own has a text of the server."""
    status, details = _status(error)
    return status is StatusCode.DEADLINE_EXCEEDED and details.lower() == _OWN_DEADLINE


class _Route:
    """Where a transport sends its calls, and how.

    Args:
        targets: One address, or several that serve the same models.
        options: Settings of the client.
        kind: Class of the interceptors.
    """

    def __init__(self, targets: str | Sequence[str], options: Options, kind: type[Any]) -> None:
        self._address = channel_address(targets)
        self.target = targets if isinstance(targets, str) else ",".join(targets)
        self.options = options
        self._interceptors = _check_interceptors(options, kind)
        self.proxy: Proxy | None = None
        self._replicas = count_replicas(targets)
        if options.proxy:
            self.proxy = find_proxy(targets)

    def connect(self) -> Connection:
        """Return a new connection of `grpc`."""
        channel = self._open(grpc)
        intercepted = grpc.intercept_channel(channel, *self._interceptors)
        return Connection(intercepted, self._silence(), readiness(channel))

    def connect_aio(self) -> Connection:
        """Return a new connection of `grpc.aio`."""
        channel = self._open(grpc.aio, self._interceptors)
        return Connection(channel, self._silence(), readiness(channel))

    def _silence(self) -> Silence:
        return Silence(self._replicas, self.options.timeout_s)

    def _open(self, module: Any, *interceptors: list[Any]) -> Any:
        proxied = self.proxy is not None and self.proxy.is_asked
        return open_channel(module, self._address, self.options, *interceptors, proxied=proxied)


class _Tries:
    """How often a call was sent, and whether it is sent again."""

    def __init__(self, envelope: Envelope, route: _Route) -> None:
        self._envelope = envelope
        self._route = route
        self._deadline_s = time.monotonic() + min(envelope.remaining_s, _LONGEST_TIMEOUT_S)
        self._count = 0
        self._looks_for_tls = route.options.tls is None
        self.headers = route.options.headers()

    def begin(self) -> float:
        """Return the seconds that the next try may take."""
        self._count += 1
        return max(0.0, self._deadline_s - time.monotonic())

    def peer_in_doubt(self, error: grpc.RpcError) -> tuple[str, int] | None:
        """Return the peer that hung up and may ask for TLS, the first time that it does."""
        proxy = self._route.proxy
        if not self._looks_for_tls or (proxy is not None and proxy.is_asked):
            return None
        peer = peer_that_hung_up(_status(error)[1])
        self._looks_for_tls = peer is None
        return peer

    def wait_s(self, error: grpc.RpcError, attempt: Attempt, is_tls: bool) -> float:
        """Return the seconds to wait before the call is sent again.

        Args:
            error: What gRPC raised.
            attempt: The attempt that failed.
            is_tls: Whether TLS is spoken at the target, and the client has none.

        Raises:
            KerasMrlError: If it is not.
        """
        is_connected = attempt.connection.look()
        if not _is_own_deadline(error):
            attempt.is_answered = True
        elif is_connected:
            attempt.is_answered = False
        if not is_tls and self._is_worth_another(error):
            options, doubled = self._route.options, 2 ** (self._count - 1)
            wait_s = min(options.first_backoff_s * doubled, options.max_backoff_s)
            wait_s *= random.uniform(0.8, 1.2)  # so that clients do not return in step
            if time.monotonic() + wait_s < self._deadline_s:
                return float(wait_s)
        proxy = self._route.proxy
        has_secret = proxy is not None and proxy.is_asked and not proxy.address
        raise translate_error(
            error,
            self._envelope,
            self._route.target,
            attempts=self._count,
            is_connected=is_connected,
            proxy=proxy,
            is_tls=is_tls,
            # Its frames in gRPC hold the call, and the channel.
        ) from (None if has_secret else error.with_traceback(None))

    def _is_worth_another(self, error: grpc.RpcError) -> bool:
        status, details = _status(error)
        cause = find_cause(details)
        is_lasting = cause is not None and cause.is_lasting
        is_last = self._count >= self._route.options.max_attempts
        is_unavailable = status in (StatusCode.UNAVAILABLE, StatusCode.CANCELLED)
        return is_unavailable and not is_lasting and not is_last


_LONGEST_TIMEOUT_S = 1e9  # a deadline after 2262 overflows and ends the call at once


class GrpcTransport:
    """Sends envelopes over gRPC; any number of threads may share it.

    Args:
        targets: One address, or several that serve the same models.
        options: Settings of the client.

    Raises:
        ValueError: If an address cannot be one, or an interceptor is not of `grpc`.
    """

    def __init__(self, targets: str | Sequence[str], options: Options) -> None:
        self._route = _Route(targets, options, grpc.UnaryUnaryClientInterceptor)
        self._open()

    @property
    def target(self) -> str:
        """Address of the server, as errors name it."""
        return self._route.target

    @property
    def connections(self) -> int:
        """How often a connection was made, the first and one that is lost now included.

        One of several replicas that is lost is not counted while others are connected.
        """
        return self._connections.made

    def send(self, envelope: Envelope) -> Reply[Any]:
        """Return the reply; raise a `KerasMrlError`."""
        if os.getpid() != self._pid:
            self._open_after_fork()
        method, message = encode(envelope)
        tries = _Tries(envelope, self._route)
        while not self._closed.is_set():
            attempt = self._connections.begin()
            try:
                response = attempt.connection.stubs[method](
                    message, timeout=tries.begin(), metadata=tries.headers
                )
            except (grpc.RpcError, ValueError) as error:
                if self._closed.is_set():  # by another thread, while this call was under way
                    raise _closed_error(self.target) from error
                if not isinstance(error, grpc.RpcError):
                    raise
                peer = tries.peer_in_doubt(error)
                wait_s = tries.wait_s(error, attempt, peer is not None and speaks_tls(peer))
            else:
                attempt.succeed()
                return decode(envelope, response, self.target)
            finally:
                if over := self._connections.end(attempt):
                    over.close()
            self._closed.wait(wait_s)
        raise _closed_error(self.target)

    def close(self) -> None:
        """Close the channel."""
        self._closed.set()
        for channel in self._connections.close():
            channel.close()

    def _open(self) -> None:
        self._closed = threading.Event()
        self._connections = Connections(self._route.connect)
        self._pid = os.getpid()

    def _open_after_fork(self) -> None:
        """Open a channel in a forked child; gRPC has closed the one of its parent.

        Locks of the parent may be held here for ever, so nothing of it is used or freed.
        """
        with _FORKING:
            if os.getpid() != self._pid:
                _OF_PARENTS.append(self._connections)
                was_closed = self._closed.is_set()
                self._open()
                if was_closed:
                    self.close()


_FORKING = threading.Lock()  # free in every child
_OF_PARENTS: list[Connections] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_FORKING.acquire,
        after_in_parent=_FORKING.release,
        after_in_child=_FORKING.release,
    )


class AioTransport:
    """Sends envelopes over `grpc.aio`, from the event loop that sends first.

    Args:
        targets: One address, or several that serve the same models.
        options: Settings of the client.

    Raises:
        ValueError: If an address cannot be one, or an interceptor is not of `grpc.aio`.
    """

    def __init__(self, targets: str | Sequence[str], options: Options) -> None:
        self._route = _Route(targets, options, grpc.aio.ClientInterceptor)
        self._pid = os.getpid()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connections: Connections | None = None

    @property
    def target(self) -> str:
        """Address of the server, as errors name it."""
        return self._route.target

    @property
    def connections(self) -> int:
        """How often a connection was made, the first and one that is lost now included.

        One of several replicas that is lost is not counted while others are connected.
        """
        return 1 if self._connections is None else self._connections.made  # it is yet to be made

    async def send_async(self, envelope: Envelope) -> Reply[Any]:
        """Return the reply; raise a `KerasMrlError`."""
        self._check_place()
        method, message = encode(envelope)
        tries = _Tries(envelope, self._route)
        while not self._closed:
            connections = self._open()
            attempt = connections.begin()
            try:
                response = await attempt.connection.stubs[method](
                    message, timeout=tries.begin(), metadata=tries.headers
                )
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if self._closed and task is not None and not task.cancelling():
                    raise _closed_error(self.target) from error
                raise
            except grpc.RpcError as error:
                if self._closed:  # by another task, while this call was under way
                    raise _closed_error(self.target) from error
                peer = tries.peer_in_doubt(error)
                is_tls = peer is not None and await asyncio.to_thread(speaks_tls, peer)
                wait_s = tries.wait_s(error, attempt, is_tls)
            except grpc.aio.UsageError as error:  # of a channel closed before the call began
                raise _closed_error(self.target) from error
            else:
                attempt.succeed()
                return decode(envelope, response, self.target)
            finally:
                if over := connections.end(attempt):
                    await over.close()
            await asyncio.sleep(wait_s)
        raise _closed_error(self.target)

    async def close_async(self) -> None:
        """Close the channel."""
        self._closed = True
        if self._connections is not None and asyncio.get_running_loop() is self._loop:
            for channel in self._connections.close():
                await channel.close()

    def _check_place(self) -> None:
        """Raise in another process or loop than that of the first call."""
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
        if self._loop is not None and asyncio.get_running_loop() is not self._loop:
            raise _unusable_error(
                "An AsyncClient lives in the event loop that it first asked from. "
                f"Received: a call from another loop, to {self.target}. Make one client per loop: "
                "`async with AsyncClient(...)` inside the function given to asyncio.run.",
                self.target,
            )

    def _open(self) -> Connections:
        """Return the connections, opened in the first loop."""
        if self._connections is None:
            self._loop = asyncio.get_running_loop()
            self._connections = Connections(self._route.connect_aio)
        return self._connections


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
