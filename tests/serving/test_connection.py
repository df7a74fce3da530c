"""A connection that is silent for three deadlines is given up; a slow one is not."""

import asyncio
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest

from keras_mrl_serving._connection import (
    Connection,
    Connections,
    Silence,
    channel_arguments,
    readiness,
)
from keras_mrl_serving._transport import AioTransport, GrpcTransport
from keras_mrl_serving.aio import AsyncClient
from keras_mrl_serving.calls import Call, Envelope
from keras_mrl_serving.client import Client
from keras_mrl_serving.errors import DeadlineError, ServerUnavailableError
from keras_mrl_serving.options import Options
from tests.helpers.faulty_server import (
    FaultyServer,
    connect_to_all,
    deadlines_until,
    open_client,
    rows,
)
from tests.helpers.proxies import Relay
from tests.helpers.waiting import wait_until

SOAK = bool(os.environ.get("KERAS_MRL_SOAK"))
BOTH = pytest.mark.parametrize("kind", [Client, AsyncClient])


# The rule, without a clock.


def late(silence: Silence, start_s: float, end_s: float) -> bool:
    return silence.unanswered(start_s, end_s)


def test_three_deadlines_without_an_answer_are_too_many() -> None:
    silence = Silence(replicas=1, timeout_s=1.0)
    assert [late(silence, start, start + 1) for start in (0, 1, 60)] == [False, False, True]


def test_any_answer_of_a_single_server_begins_the_count_anew() -> None:
    silence = Silence(replicas=1, timeout_s=1.0)
    for start in range(0, 100, 3):
        assert not late(silence, start, start + 1)
        assert not late(silence, start + 1, start + 2)
        silence.answered(start + 2.5)


def test_a_call_that_began_before_the_last_answer_proves_nothing() -> None:
    silence = Silence(replicas=1, timeout_s=1.0)
    silence.answered(0.5)
    assert [late(silence, 0, 1) for _ in range(10)] == [False] * 10


def test_deadlines_that_overlap_are_one() -> None:
    silence = Silence(replicas=1, timeout_s=1.0)
    for second in range(2):
        assert not any(late(silence, second + n / 100, second + 1 + n / 100) for n in range(50))
    assert late(silence, 3, 4)


def test_a_call_with_little_time_left_proves_nothing() -> None:
    silence = Silence(replicas=1, timeout_s=1.0)
    assert not any(late(silence, second, second + 0.49) for second in range(100))
    assert not any(late(silence, second, second + 0.5) for second in range(200, 202))
    assert late(silence, 202, 202.5)


def deadlines_until_given_up(callers: int, replicas: int, is_late: Callable[[int], bool]) -> int:
    """Let callers ask replicas in turn, each call again as soon as one ends; at most 100 s.

    A call that is late ends after a second, any other at once. A late one blocks its caller, so
    each second begins with as many calls as it takes until all callers wait.
    """
    silence, turn = Silence(replicas, 1.0), 0
    for second in range(100):
        waiting = 0
        while waiting < callers and turn < 50 * callers * (second + 1):
            if is_late(turn):
                waiting += 1
            else:
                silence.answered(second)
            turn += 1
        if any([silence.unanswered(second, second + 1) for _ in range(waiting)]):
            return second + 1
    return 100


@pytest.mark.parametrize("replicas", [2, 3, 10])
@pytest.mark.parametrize("callers", [1, 8, 16, 200])
def test_one_silent_replica_of_several_is_found_in_three_deadlines(
    callers: int, replicas: int
) -> None:
    assert deadlines_until_given_up(callers, replicas, lambda turn: turn % replicas == 0) == 3


@pytest.mark.parametrize("replicas", [2, 3])
@pytest.mark.parametrize("callers", [1, 16])
def test_replicas_that_are_late_now_and_then_are_not_given_up(callers: int, replicas: int) -> None:
    draw = random.Random(0)
    assert deadlines_until_given_up(callers, replicas, lambda _: draw.random() < 0.01) == 100


class FakeChannel:
    """A channel of no network."""

    def unary_unary(self, *_: object, **__: object) -> None:
        return None


def test_a_connection_that_is_given_up_closes_with_its_last_call() -> None:
    now = [0.0]
    ready = [True]
    opened: list[FakeChannel] = []

    def open_connection() -> Connection:
        opened.append(FakeChannel())
        return Connection(opened[-1], Silence(1, 1.0), lambda: ready[0])

    connections = Connections(open_connection, lambda: now[0])

    def pass_deadline() -> Any:
        attempt = connections.begin()
        now[0] += 1
        attempt.is_answered = False
        return connections.end(attempt)

    under_way = connections.begin()
    assert [pass_deadline() for _ in range(3)] == [None] * 3
    assert connections.made == 2
    first, second = opened
    under_way.succeed()
    assert connections.end(under_way) is first
    assert [pass_deadline() for _ in range(3)] == [None, None, second]  # no call is under way
    assert connections.made == 3
    for ready[0], made in ((True, 3), (False, 4), (False, 4), (True, 4), (False, 5)):
        assert connections.made == made
    connections.begin().succeed()  # it was connected meanwhile, and is no more
    assert connections.made == 6


def test_once_closed_no_channel_is_opened() -> None:
    """A call may pass its deadline after `close`: what it opened would stay open."""
    now = [0.0]
    opened: list[FakeChannel] = []

    def open_connection() -> Connection:
        opened.append(FakeChannel())
        return Connection(opened[-1], Silence(1, 1.0), lambda: True)

    connections = Connections(open_connection, lambda: now[0])
    attempts = []
    for _ in range(3):
        attempts.append(connections.begin())
        now[0] += 1
    assert connections.close() == opened
    for start_s, attempt in enumerate(attempts):
        now[0] = start_s + 1
        attempt.is_answered = False
        assert connections.end(attempt) is None
    assert len(opened) == 1


def test_channels_have_connections_of_their_own_and_do_not_wait_long_for_them() -> None:
    arguments = dict(channel_arguments(Options()))
    assert arguments["grpc.use_local_subchannel_pool"] == 1
    # Of a server that is back within five seconds, whether its attempt hung or was refused.
    assert arguments["grpc.min_reconnect_backoff_ms"] <= 4000
    assert 1.2 * arguments["grpc.max_reconnect_backoff_ms"] <= 4000


@pytest.mark.parametrize(
    ("timeout_s", "unacknowledged_ms"), [(0.1, 3000), (2.0, 6000), (10.0, 20000), (1e300, 20000)]
)
def test_tcp_gives_up_what_nobody_acknowledges(timeout_s: float, unacknowledged_ms: int) -> None:
    arguments = dict(channel_arguments(Options(timeout_s=timeout_s)))
    assert arguments["grpc.keepalive_timeout_ms"] == unacknowledged_ms
    assert arguments["grpc.keepalive_time_ms"] == 24 * 3600 * 1000  # no ping before


# Real ones.


def is_answered(client: Any) -> bool:
    try:
        assert client.embed(rows(2), 2)[:, 0].tolist() == [1, 2]
    except (DeadlineError, ServerUnavailableError):
        return False
    return True


def unanswered(client: Any, calls: int) -> int:
    """How many of so many calls get no answer."""
    return sum(not is_answered(client) for _ in range(calls))


def times_three_late(answered: list[bool]) -> int:
    """How often three calls in a row were late; on a busy machine a living server is, too."""
    return "".join("ya"[each] for each in answered).count("yyy")


@pytest.mark.soak
@pytest.mark.parametrize(
    ("kind", "callers"),
    [(Client, 1), (Client, 8), (Client, 16), (AsyncClient, 1), (AsyncClient, 200)],
)
def test_a_silent_replica_is_asked_no_more(kind: type[Any], callers: int) -> None:
    if callers > 8 and not SOAK:
        pytest.skip("many callers: `make soak` runs it")
    options = Options(timeout_s=1.0 if callers <= 8 else 5.0)
    with (
        FaultyServer() as one,
        FaultyServer() as other,
        Relay(one.port) as relay,
        open_client(kind, [relay.target, other.target], options) as client,
    ):
        connect_to_all(client, one, other)
        relay.go_silent()
        late = deadlines_until(lambda: relay.ended > 0, client, callers)
        assert all(1 <= count < 100 for count in late)
        before = len(other.requests), len(one.requests)
        unanswered(client, 30)  # 0, but on a busy machine
        wait_until(lambda: len(other.requests) == before[0] + 30)
        assert len(one.requests) == before[1]


@pytest.mark.parametrize(
    "timeout_s",
    [0.5, pytest.param(1.0, marks=pytest.mark.soak), pytest.param(10.0, marks=pytest.mark.soak)],
)
@BOTH
def test_a_server_that_is_back_is_found(kind: type[Any], timeout_s: float) -> None:
    if timeout_s > 0.5 and not SOAK:
        pytest.skip("long deadlines: `make soak` runs it")
    with (
        FaultyServer() as server,
        Relay(server.port) as relay,
        open_client(kind, relay.target, Options(timeout_s=timeout_s)) as client,
    ):
        wait_until(lambda: is_answered(client))
        relay.go_silent()
        assert unanswered(client, 4) == 4  # the fourth opens a new connection
        wait_until(lambda: relay.connections >= 2)
        relay.come_back()
        wait_until(lambda: is_answered(client))
        # Not the attempt that hangs, but the next, which begins four seconds after it at most.
        assert len(relay.written) == 2
        wait_until(lambda: relay.ended == relay.connections - 1)


@BOTH
def test_a_slow_server_keeps_its_connection(kind: type[Any]) -> None:
    timeout_s = 1.0 if SOAK else 0.4

    def answer_late(*_: object) -> None:
        time.sleep(0.9 * timeout_s)

    with (
        FaultyServer() as server,
        Relay(server.port) as relay,
        open_client(kind, relay.target, Options(timeout_s=timeout_s)) as client,
    ):
        wait_until(lambda: is_answered(client))
        server.before = answer_late
        answered = [is_answered(client) for _ in range(60 if SOAK else 6)]
        assert relay.connections <= 1 + times_three_late(answered)


@BOTH
def test_a_server_that_is_late_twice_of_three_times_keeps_its_connection(kind: type[Any]) -> None:
    release = threading.Event()
    with (
        FaultyServer() as server,
        Relay(server.port) as relay,
        open_client(kind, relay.target, Options(timeout_s=0.3)) as client,
    ):
        try:
            wait_until(lambda: is_answered(client))
            answered: list[bool] = []
            for _ in range(20 if SOAK else 3):
                server.before = lambda *_: release.wait()
                answered += [is_answered(client) for _ in range(2)]
                server.before = lambda *_: None
                answered.append(is_answered(client))
        finally:
            release.set()
        assert relay.connections <= 1 + times_three_late(answered)


@BOTH
def test_connections_given_up_leave_nothing_behind(kind: type[Any]) -> None:
    with (
        FaultyServer() as server,
        Relay(server.port) as relay,
        open_client(kind, relay.target, Options(timeout_s=0.2)) as client,
    ):
        wait_until(lambda: is_answered(client))
        threads = ours()
        for _ in range(20 if SOAK else 2):
            before = relay.connections
            relay.go_silent()
            assert unanswered(client, 3) == 3
            relay.come_back()
            wait_until(lambda: is_answered(client))
            assert relay.connections > before
            wait_until(lambda: relay.connections == relay.ended + 1)
        assert ours() == threads


def ours() -> set[str]:
    """The threads that are neither a server's nor a proxy's."""
    names = {thread.name for thread in threading.enumerate()}
    return {name for name in names if not name.startswith(("Thread-", "ThreadPool"))}


@BOTH
def test_a_deadline_says_whether_there_was_a_connection(kind: type[Any]) -> None:
    with FaultyServer() as server, Relay(server.port) as relay:
        with open_client(kind, relay.target, Options(timeout_s=0.3)) as client:
            wait_until(lambda: is_answered(client))
            relay.go_silent()
            with pytest.raises(DeadlineError) as caught:
                client.describe()
        with open_client(kind, relay.target, Options(timeout_s=0.3)) as client:
            with pytest.raises(DeadlineError) as never:
                client.describe()
    call = (
        "An answer must come within the timeout. Received: DEADLINE_EXCEEDED from "
        f"{relay.target} for model 'default', signature 'describe', timeout 0.3 s: "
    )
    assert str(caught.value) == (
        f"{call}connected, but no answer came. Send fewer rows at once, or raise "
        "Options(timeout_s=...). Where a network forgets connections that are idle, set "
        "Options(keepalive_s=...) to what the server allows."
    )
    assert str(never.value) == (
        f"{call}no connection was made. See whether a server runs there and can be reached from "
        "here, or raise Options(timeout_s=...)."
    )


@contextmanager
def sending(kind: type[Any], target: str) -> Iterator[tuple[Any, Callable[[], Any]]]:
    """A transport, and a function that asks through it for the manifest."""
    key = Call("describe", {"key": np.zeros(1, np.int32)})
    envelope = Envelope("default", None, key, 10.0, 10.0)
    if kind is Client:
        transport = GrpcTransport(target, Options())
        yield transport, lambda: transport.send(envelope)
        transport.close()
        return
    with asyncio.Runner() as runner:
        waiting = AioTransport(target, Options())
        yield waiting, lambda: runner.run(waiting.send_async(envelope))
        runner.run(waiting.close_async())


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@BOTH
def test_a_connection_that_is_lost_is_counted_and_made_anew_by_the_next_call(
    kind: type[Any], host: str
) -> None:
    """So none that was made meanwhile, perhaps to another server, escapes the count."""
    with FaultyServer() as server, Relay(server.port) as relay:
        target = relay.target.replace("127.0.0.1", host)
        with sending(kind, target) as (transport, ask):
            for made in (1, 2, 3):
                for _ in range(3):
                    ask()
                    assert transport.connections == relay.connections == made
                relay.hang_up()
                wait_until(lambda: transport.connections > relay.connections)
                time.sleep(0.3)  # in which a client of its own accord would come again
                assert relay.connections == made


def test_grpc_tells_whether_a_channel_is_connected() -> None:
    """What `readiness` asks is no public name of gRPC: without it, connected is assumed."""
    with FaultyServer() as server, grpc.insecure_channel(server.target) as channel:
        is_ready = readiness(channel)
        assert not is_ready()
        grpc.channel_ready_future(channel).result(60)
        assert is_ready()
    assert not is_ready()
    assert readiness(object())()
