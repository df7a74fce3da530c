"""One gRPC channel as the options say, and when it is given up for a new one.

A peer can vanish without a word: a node is lost, a NAT forgets a connection. TCP keeps what is
sent for minutes, and every call on that connection passes its deadline. gRPC finds out by pings,
but TensorFlow Serving hangs up on clients that ping. So deadlines are counted here: a connection
on which nothing came back during three of them is given up, and a new channel is opened.

A channel has connections to all replicas, and does not tell which of them a call went to. They take
turns, so of N replicas a silent one gets every Nth call. Answers therefore end the count only where
more than 2N of them came to each late call: then no replica is silent, and all are late now and
then. Behind a `dns:` name three replicas are assumed, so one silent server of up to six is noticed.
A single slow server keeps its connection as long as one of three answers is in time.

The new channel gets connections of its own: by default gRPC shares them between the equal channels
of a process, the dead ones too. It counts as connected to a peer only when the peer has spoken, so
replicas that stay silent are passed over.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc

from ._targets import is_one_address
from ._wire import stubs
from .options import LARGEST_ANSWER_BYTES, Options

SILENT_DEADLINES = 3
_TIMES_ROUND = 2


class Silence:
    """Counts the deadlines that passed without a byte. It has no clock and no network.

    Deadlines that overlap are one: many calls that are late at once are no proof. Nor is a call
    that had less than half of the timeout.

    Args:
        replicas: How many servers take turns.
        timeout_s: Timeout of the client.

    Examples:
        >>> silence = Silence(replicas=1, timeout_s=1.0)
        >>> for start_s in range(3):
        ...     silence.unanswered(start_s, start_s + 1)
        False
        False
        True
    """

    def __init__(self, replicas: int, timeout_s: float) -> None:
        self._answers_a_late_one = _TIMES_ROUND * replicas if replicas > 1 else 0
        self._shortest_s = timeout_s / 2
        self._deadlines = self._late = self._answered = 0
        self._since_s = float("-inf")  # deadlines of calls that began earlier do not count

    def answered(self, now_s: float) -> None:
        """Note that a server answered a call, be it with an error."""
        if not self._answers_a_late_one:
            self._since_s = now_s
        if self._deadlines:
            self._answered += 1
            if self._answered > self._answers_a_late_one * self._late:
                self._deadlines = self._late = self._answered = 0

    def unanswered(self, start_s: float, now_s: float) -> bool:
        """Note that a deadline passed without an answer; return whether it was one too many."""
        if now_s - start_s < self._shortest_s:
            return False
        self._late += 1
        if start_s >= self._since_s:
            self._deadlines, self._since_s = self._deadlines + 1, now_s
        return self._deadlines >= SILENT_DEADLINES


class Connection:
    """A channel and the calls under way on it.

    Args:
        channel: A channel of `grpc` or of `grpc.aio`, or one of `grpc` with interceptors.
        silence: What counts the deadlines that pass on it.
        is_ready: Tells whether a server can be asked at once.

    Attributes:
        stubs: The function of each method.
        calls: How many calls are under way.
        times_lost: How often it was connected, and a call met it unconnected.
        was_ready: Whether it was connected at the last look, or has answered since.
    """

    def __init__(self, channel: Any, silence: Silence, is_ready: Callable[[], bool]) -> None:
        self.channel = channel
        self.silence = silence
        self.is_ready = is_ready
        self.stubs = stubs(channel)
        self.calls = 0
        self.times_lost = 0
        self.was_ready = False

    def look(self) -> bool:
        """Return whether it is connected, and note where it is no more."""
        is_ready = self.is_ready()
        self.times_lost += self.was_ready and not is_ready
        self.was_ready = is_ready
        return is_ready


class Attempt:
    """One sending of a call.

    Args:
        connection: What it is sent on.
        start_s: The time at which it begins.

    Attributes:
        is_answered: Whether a server answered; None where its end proves nothing.
    """

    def __init__(self, connection: Connection, start_s: float) -> None:
        self.connection = connection
        self.start_s = start_s
        self.is_answered: bool | None = None

    def succeed(self) -> None:
        """Note that the answer is here."""
        self.is_answered = self.connection.was_ready = True


class Connections:
    """The connection that calls are sent on now, and those given up that still have calls.

    Any number of threads may share it.

    Args:
        open_connection: Opens a new one.
        clock: Returns the time in seconds; only differences count.
    """

    def __init__(
        self,
        open_connection: Callable[[], Connection],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open = open_connection
        self._clock = clock
        self._lock = threading.Lock()
        self._is_closed = False
        self._made_before = 0
        self._given_up: set[Connection] = set()
        self._current = open_connection()

    @property
    def made(self) -> int:
        """How often a connection was made, the first and one that is lost now included."""
        self._current.look()
        return self._made_before + 1 + self._current.times_lost

    def close(self) -> list[Any]:
        """Open no more channels; return those that are open, to be closed."""
        with self._lock:
            self._is_closed = True
            return [each.channel for each in (self._current, *self._given_up)]

    def begin(self) -> Attempt:
        """Return an attempt on the current connection."""
        with self._lock:
            self._current.look()
            self._current.calls += 1
            return Attempt(self._current, self._clock())

    def end(self, attempt: Attempt) -> Any:
        """Note the end of an attempt; return a channel that is now to be closed, or None."""
        connection, silence, now_s = attempt.connection, attempt.connection.silence, self._clock()
        with self._lock:
            connection.calls -= 1
            if attempt.is_answered:
                silence.answered(now_s)
            elif attempt.is_answered is False and silence.unanswered(attempt.start_s, now_s):
                self._give_up(connection)
            if connection is self._current or connection.calls:
                return None
            self._given_up.discard(connection)
            return connection.channel

    def _give_up(self, connection: Connection) -> None:
        if connection is self._current and not self._is_closed:
            self._made_before = self.made
            self._given_up.add(connection)
            self._current = self._open()


# The channel.


def open_channel(
    module: Any, address: str, options: Options, *interceptors: list[Any], proxied: bool
) -> Any:
    """Return a channel of `grpc` or of `grpc.aio`, which differ in their interceptors alone."""
    compression = grpc.Compression.Gzip if options.compress else grpc.Compression.NoCompression
    # To one address, a connection that is lost is made anew by the next call, which counts it.
    policy = "pick_first" if is_one_address(address) else "round_robin"
    service: dict[str, Any] = {"loadBalancingConfig": [{policy: {}}]}
    arguments = [
        *channel_arguments(options),
        ("grpc.service_config", json.dumps(service)),
        ("grpc.service_config_disable_resolution", 1),
        ("grpc.enable_http_proxy", int(proxied)),
    ]
    settings = (arguments, compression, *interceptors)
    tls = options.tls
    if tls is None:
        return module.insecure_channel(address, *settings)
    credentials = grpc.ssl_channel_credentials(
        tls.root_certificates, tls.private_key, tls.certificate_chain
    )
    return module.secure_channel(address, credentials, *settings)


def readiness(channel: Any) -> Callable[[], bool]:
    """Return a function that tells whether a channel is connected.

    A channel of `grpc` tells it in public only by a thread that looks five times a second, and that
    closing then waits for. What that thread looks at is asked here; without it, connected is
    assumed.
    """
    if isinstance(channel, grpc.aio.Channel):
        return lambda: channel.get_state() is grpc.ChannelConnectivity.READY
    state_of = getattr(getattr(channel, "_channel", None), "check_connectivity_state", None)
    if state_of is None:
        return lambda: True
    ready = grpc.ChannelConnectivity.READY.value[0]

    def is_ready() -> bool:
        try:
            return bool(state_of(False) == ready)
        except ValueError:  # it is closed
            return False

    return is_ready


_LONGEST_KEEPALIVE_S = 1e6
# Of a server that is back, within five seconds: an attempt to connect ends after its first, and
# the wait between two, which differs from its setting by up to a fifth, after the second. By
# default an attempt may hang for 20 s, and a wait take two minutes.
_LONGEST_CONNECTING_MS = 4000
_LONGEST_RECONNECT_MS = 3300
# TCP gives up a connection whose peer acknowledges nothing for so long. gRPC sets it (Linux alone)
# only where it would ping, too: once a day is a ping that no server minds.
_SHORTEST_UNACKNOWLEDGED_S, _LONGEST_UNACKNOWLEDGED_S = 3.0, 20.0
_ONE_DAY_MS = 24 * 3600 * 1000


def channel_arguments(options: Options) -> list[tuple[str, Any]]:
    """Return gRPC's settings for the options of a client."""
    limit = -1 if options.max_message_bytes is None else int(options.max_message_bytes)
    answer_limit = int(options.max_message_bytes or LARGEST_ANSWER_BYTES)
    unacknowledged_s = min(SILENT_DEADLINES * options.timeout_s, _LONGEST_UNACKNOWLEDGED_S)
    arguments: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", answer_limit),
        ("grpc.max_send_message_length", limit),
        ("grpc.use_local_subchannel_pool", 1),  # by default a new channel gets old connections
        ("grpc.initial_reconnect_backoff_ms", int(min(100, options.first_backoff_s * 1000)) or 1),
        ("grpc.min_reconnect_backoff_ms", _LONGEST_CONNECTING_MS),
        ("grpc.max_reconnect_backoff_ms", _LONGEST_RECONNECT_MS),
        (
            "grpc.keepalive_timeout_ms",
            int(1000 * max(unacknowledged_s, _SHORTEST_UNACKNOWLEDGED_S)),
        ),
    ]
    if options.keepalive_s is None:
        arguments.append(("grpc.keepalive_time_ms", _ONE_DAY_MS))
    else:
        keepalive_ms = int(1000 * min(options.keepalive_s, _LONGEST_KEEPALIVE_S)) or 1
        arguments += [
            ("grpc.keepalive_time_ms", keepalive_ms),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.max_pings_without_data", 0),  # by default, two and no more
        ]
    if options.tls is not None and options.tls.server_name is not None:
        arguments.append(("grpc.ssl_target_name_override", options.tls.server_name))
    return arguments
