"""The message of each gRPC call: read within limits of time, and refused if it is none.

A handler of gRPC's Python server holds a thread from the head of a call on, also while its message
is still to come. A client that sends heads alone would take all threads.
"""

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from .status import STOPPED

_CHECK_INTERVAL_S = 0.5
_QUIET_S = 0.05  # a call that is under way on the wire has come by then


class CallThreads(ThreadPoolExecutor):
    """The threads of a gRPC server; it counts the calls under way, and those without a thread.

    Args:
        max_num: how many threads there are at most.
        clock: the time in seconds.
    """

    def __init__(self, max_num: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(max_num, thread_name_prefix="grpc")
        self._clock = clock
        self._changed = threading.Condition()
        self._num_queued = 0
        self._num_under_way = 0
        self._last_call_at = -math.inf

    @property
    def num_queued(self) -> int:
        """How many calls wait for a thread."""
        return self._num_queued

    @property
    def num_under_way(self) -> int:
        """How many calls have come and are not answered."""
        return self._num_under_way

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queues a call."""
        with self._changed:
            self._num_queued += 1
            self._num_under_way += 1
            self._last_call_at = self._clock()
        return super().submit(self._start, fn, *args, **kwargs)

    def wait_until_quiet(self, timeout_s: float) -> bool:
        """Waits until no call is under way, and none has come for a moment; whether that is so.

        Args:
            timeout_s: how long to wait.
        """
        until = self._clock() + timeout_s
        with self._changed:
            while True:
                now = self._clock()
                quiet_s = self._last_call_at + _QUIET_S - now
                if not self._num_under_way and quiet_s <= 0:
                    return True
                if now >= until:
                    return False
                self._changed.wait(until - now if self._num_under_way else quiet_s)

    def _start(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._changed:
            self._num_queued -= 1
        try:
            return fn(*args, **kwargs)
        finally:
            with self._changed:
                self._num_under_way -= 1
                self._changed.notify_all()


class MessageReader(grpc.ServerInterceptor):
    """Reads the one message of a call, from within its handler.

    gRPC's Python server would wait for it without limit. It would also refuse one that is no
    message of the method with the code and the text of this class, but would keep the state of the
    call for ever: 15 KB each.

    Args:
        num_queued: how many calls wait for a thread.
        max_wait_s: how long a message may take.
        max_wait_while_queued_s: how long it may take while other calls wait for a thread.
        clock: the time in seconds.
    """

    def __init__(
        self,
        num_queued: Callable[[], int],
        *,
        max_wait_s: float = 50.0,
        max_wait_while_queued_s: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_queued = num_queued
        self._max_wait_s = max_wait_s
        self._max_wait_while_queued_s = max_wait_while_queued_s
        self._clock = clock
        self._lock = threading.Lock()
        self._since: dict[grpc.ServicerContext, float] = {}  # of the calls without their message
        self._stopping = threading.Event()
        self._refuses = False

    def start(self) -> None:
        """Starts the thread that gives up calls."""
        threading.Thread(target=self._run, name="grpc messages", daemon=True).start()

    def stop(self) -> None:
        """Ends that thread."""
        self._stopping.set()

    def refuse_calls(self) -> None:
        """Answers the calls that come from now on with UNAVAILABLE."""
        self._refuses = True

    def give_up(self) -> None:
        """Cancels the calls whose message takes too long."""
        max_s = self._max_wait_while_queued_s if self._num_queued() else self._max_wait_s
        with self._lock:
            latest = self._clock() - max_s
            late = [context for context, since in self._since.items() if since <= latest]
        for context in late:
            context.cancel()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Any],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler of a call; if one message answers one message, it reads by itself."""
        if self._refuses:
            return grpc.stream_unary_rpc_method_handler(_refuse)
        handler: Any = continuation(handler_call_details)
        if handler is None or handler.request_streaming or handler.response_streaming:
            return handler

        def answer(messages: Iterator[bytes], context: grpc.ServicerContext) -> Any:
            data = self._read(messages, context)
            if data is None:
                context.abort(
                    grpc.StatusCode.UNIMPLEMENTED,
                    f'"{handler_call_details.method}" requires exactly one request message.',
                )
            try:
                request = handler.request_deserializer(data)
            except DecodeError:
                context.abort(grpc.StatusCode.INTERNAL, "Exception deserializing request!")
            return handler.unary_unary(request, context)

        # To the client a stream of one message is no different from the message alone.
        return grpc.stream_unary_rpc_method_handler(answer, None, handler.response_serializer)

    def _read(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes | None:
        with self._lock:
            self._since[context] = self._clock()
        try:
            return next(messages, None)
        finally:
            with self._lock:
                del self._since[context]

    def _run(self) -> None:
        while not self._stopping.wait(_CHECK_INTERVAL_S):
            self.give_up()


def _refuse(_messages: Iterator[bytes], context: grpc.ServicerContext) -> None:
    context.abort(grpc.StatusCode.UNAVAILABLE, STOPPED)
