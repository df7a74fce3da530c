"""The messages of gRPC calls: those that do not come, and those that are none."""

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from keras_mrl_serving.server.grpc_messages import CallThreads, MessageReader
from keras_mrl_serving.server.grpc_options import add_health
from tests.helpers.waiting import wait_until

TIMEOUT_S = 60.0
CHECK = "/grpc.health.v1.Health/Check"


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Server:
    """A server with two threads and the health service alone."""

    def __init__(self, channel: grpc.Channel, threads: CallThreads, reader: MessageReader) -> None:
        self.channel = channel
        self.threads = threads
        self.reader = reader

    def slow_call(self, sent: threading.Event) -> Any:
        """A call whose message does not come before the event."""

        def messages() -> Iterator[bytes]:
            assert sent.wait(TIMEOUT_S)
            yield b""

        call: Any = self.channel.stream_unary(CHECK)
        return call.future(messages(), timeout=TIMEOUT_S)

    def check(self) -> Any:
        stub = health_pb2_grpc.HealthStub(self.channel)
        return stub.Check.future(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)


@contextmanager
def serving(clock: Clock) -> Iterator[Server]:
    threads = CallThreads(2)
    reader = MessageReader(
        lambda: threads.num_queued, max_wait_s=50, max_wait_while_queued_s=1, clock=clock
    )
    server = grpc.server(threads, interceptors=[reader])
    add_health(server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Server(channel, threads, reader)
    server.stop(None).wait()
    threads.shutdown()


def gives_up(server: Server, call: Any) -> Callable[[], bool]:
    def is_over() -> bool:
        server.reader.give_up()
        return bool(call.done())

    return is_over


def test_a_message_that_does_not_come_is_given_up() -> None:
    clock, sent = Clock(), threading.Event()
    with serving(clock) as server:
        slow = server.slow_call(sent)
        assert server.check().result().status == 1  # so the slow call was taken first
        clock.now = 49
        server.reader.give_up()
        assert server.check().result().status == 1
        assert not slow.done()
        clock.now = 51
        wait_until(gives_up(server, slow))
        assert slow.code() is grpc.StatusCode.CANCELLED
        sent.set()


def test_calls_without_a_message_give_way_to_those_that_wait_for_a_thread() -> None:
    clock, sent = Clock(), threading.Event()
    with serving(clock) as server:
        slow = [server.slow_call(sent) for _ in range(6)]
        wait_until(lambda: server.threads.num_queued == 4)
        honest = server.check()
        wait_until(lambda: server.threads.num_queued == 5)

        def is_answered() -> bool:
            clock.now += 2
            server.reader.give_up()
            return bool(honest.done())

        wait_until(is_answered)
        assert honest.result().status == 1
        sent.set()
        assert sum(call.code() is grpc.StatusCode.CANCELLED for call in slow) >= 5


def test_a_slow_message_is_answered_all_the_same() -> None:
    clock, sent = Clock(), threading.Event()
    with serving(clock) as server:
        slow = server.slow_call(sent)
        clock.now = 40
        server.reader.give_up()
        sent.set()
        assert health_pb2.HealthCheckResponse.FromString(slow.result()).status == 1


def test_a_call_that_ends_without_a_message() -> None:
    with serving(Clock()) as server:
        call: Any = server.channel.stream_unary(CHECK)
        with pytest.raises(grpc.RpcError) as caught:
            call(iter(()), timeout=TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert caught.value.details() == f'"{CHECK}" requires exactly one request message.'


def test_a_request_that_is_no_message_leaves_nothing_behind() -> None:
    with serving(Clock()) as server:
        send: Any = server.channel.unary_unary(CHECK)
        gc.collect()
        gc.freeze()  # so that only new objects are looked through
        try:
            for _ in range(50):
                with pytest.raises(grpc.RpcError) as caught:
                    send(b"\xff", timeout=TIMEOUT_S)
                assert caught.value.code() is grpc.StatusCode.INTERNAL
                assert caught.value.details() == "Exception deserializing request!"
            gc.collect()
            states = [s for s in gc.get_objects() if type(s).__name__ == "_RPCState"]
        finally:
            gc.unfreeze()
        assert len(states) < 10
        assert server.check().result().status == 1
