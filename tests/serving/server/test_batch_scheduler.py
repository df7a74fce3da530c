"""Queues and the threads that serve them: when a batch is due, and which queue is served."""

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format

from keras_mrl_serving.server.batch_scheduler import BatchQueue, BatchScheduler, Task
from keras_mrl_serving.server.batching_config import (
    BatchingOptions,
    batching_options,
    batching_parameters,
)
from keras_mrl_serving.server.status import StatusError
from tests.helpers.disk import Clock
from tests.helpers.waiting import wait_until

FULL = "The batch scheduling queue to which this task was submitted is full; "
SPLIT = """max_batch_size {value: 10} enable_large_batch_splitting {value: true}
           max_execution_batch_size {value: 4}"""


def queue(text: str, clock: Clock | None = None, processed: list[int] | None = None) -> BatchQueue:
    """A queue that answers its tasks with nothing, and notes the size of each batch."""

    def process(tasks: Sequence[Task]) -> None:
        if processed is not None:
            processed.append(sum(task.size for task in tasks))
        for task in tasks:
            task.answer.set_result({})

    return BatchQueue(options(text), process, clock or Clock())


def options(text: str) -> BatchingOptions:
    empty: Any = batching_parameters(True, None)
    return batching_options(text_format.Parse(text, empty))


def task(size: int) -> Task:
    return Task({"x": np.arange(size)}, size, math.inf)


def sizes(tasks: Sequence[Task] | None) -> list[int] | None:
    return None if tasks is None else [task.size for task in tasks]


def test_a_batch_is_due_once_it_has_waited_long_enough() -> None:
    clock = Clock()
    waiting = queue("max_batch_size {value: 4} batch_timeout_micros {value: 5000000}", clock)
    assert (waiting.due(), waiting.take(), waiting.is_idle) == (math.inf, None, True)
    clock.now = 10.0
    waiting.put(task(1))
    clock.now = 12.0
    waiting.put(task(2))
    assert (waiting.due(), waiting.take(), waiting.is_idle) == (15.0, None, False)
    clock.now = 15.0
    assert sizes(waiting.take()) == [1, 2]
    assert not waiting.is_idle
    waiting.done()
    assert waiting.is_idle
    waiting.put(task(1))
    assert waiting.due() == 20.0  # counted from its own first task


def test_a_batch_is_due_at_once_if_it_is_full_or_followed_or_the_queue_closed() -> None:
    text = "max_batch_size {value: 4} batch_timeout_micros {value: 5000000}"
    full, followed, closed = queue(text), queue(text), queue(text)
    full.put(task(1))
    full.put(task(3))
    assert sizes(full.take()) == [1, 3]
    followed.put(task(3))
    followed.put(task(2))
    assert sizes(followed.take()) == [3]
    assert followed.take() is None
    closed.put(task(1))
    assert closed.take() is None
    closed.close()
    assert sizes(closed.take()) == [1]


def test_a_large_task_fills_batches_from_the_open_one_on() -> None:
    split = queue(SPLIT)
    split.put(task(3))
    parts = split.put(task(10))
    assert sizes(parts) == [1, 4, 4, 1]
    np.testing.assert_array_equal(
        np.concatenate([part.feeds["x"] for part in parts]), np.arange(10)
    )
    assert [sizes(split.take()) for _ in range(4)] == [[3, 1], [4], [4], [1]]


@pytest.mark.parametrize(
    ("text", "accepted", "size", "refusal"),
    [
        (
            "max_batch_size {value: 32}",
            [32],
            33,
            "INVALID_ARGUMENT: Task size 33 is larger than maximum input batch size 32",
        ),
        (
            SPLIT,
            [10],
            11,
            "INVALID_ARGUMENT: Task size 11 is larger than maximum input batch size 10",
        ),
        (
            "max_batch_size {value: 2} max_enqueued_batches {value: 2}",
            [1, 2],
            1,
            f"UNAVAILABLE: {FULL}currently 2 batches enqueued and max_enqueued_batches is 2",
        ),
        (
            f"{SPLIT} max_enqueued_batches {{value: 2}}",
            [3],
            6,
            f"UNAVAILABLE: {FULL}task size is 6 but scheduling capacity is only 5 "
            "(num_enqueued_batches=1, max_enqueued_batches=2, open_batch_size=3, "
            "max_execution_batch_size=4)",
        ),
    ],
)
def test_33_and_34_a_task_that_is_too_large_or_a_queue_that_is_full(
    text: str, accepted: list[int], size: int, refusal: str
) -> None:
    full = queue(text)
    for accepted_size in accepted:
        full.put(task(accepted_size))
    with pytest.raises(StatusError) as caught:
        full.put(task(size))
    assert f"{caught.value.code.name}: {caught.value.message}" == refusal


def test_queues_are_served_in_turn() -> None:
    """One thread, held by a first batch while the others wait."""
    entered, gate = threading.Event(), threading.Event()
    order: list[str] = []

    def named(name: str) -> BatchQueue:
        def process(tasks: Sequence[Task]) -> None:
            entered.set()
            assert gate.wait(60)
            order.append(name)
            for task in tasks:
                task.answer.set_result({})

        return BatchQueue(options("max_batch_size {value: 1}"), process)

    scheduler = BatchScheduler()
    busy, rare = named("busy"), named("rare")
    scheduler.add(busy, 1)
    scheduler.add(rare, 1)
    scheduler.put(busy, task(1))
    assert entered.wait(60)
    for waiting in (busy, busy, rare):
        scheduler.put(waiting, task(1))
    gate.set()
    scheduler.remove([busy, rare])
    assert order == ["busy", "rare", "busy", "busy"]


def test_a_batch_becomes_due_while_another_thread_is_busy() -> None:
    entered, gate = threading.Event(), threading.Event()

    def blocking(tasks: Sequence[Task]) -> None:
        entered.set()
        assert gate.wait(60)
        for task in tasks:
            task.answer.set_result({})

    text = "max_batch_size {value: 2} batch_timeout_micros {value: 50000}"
    scheduler, processed = BatchScheduler(), list[int]()
    quick = BatchQueue(options(text), blocking)
    slow = BatchQueue(options(text), lambda tasks: processed.append(len(tasks)))
    scheduler.add(slow, 2)
    scheduler.add(quick, 2)
    scheduler.put(slow, task(1))
    scheduler.put(quick, task(2))
    assert entered.wait(60)
    wait_until(lambda: processed == [1], "the batch of the slow queue")
    gate.set()
    scheduler.remove([slow, quick])


def num_threads() -> int:
    return sum(thread.name == "batching" for thread in threading.enumerate())


def test_the_threads_run_while_there_is_a_queue() -> None:
    scheduler, before = BatchScheduler(), num_threads()
    for _ in range(2):
        first, second = queue("max_batch_size {value: 1}"), queue("max_batch_size {value: 1}")
        assert num_threads() == before
        scheduler.add(first, 3)
        scheduler.add(second, 5)  # the first queue has decided
        assert num_threads() == before + 3
        scheduler.remove([first])
        assert num_threads() == before + 3
        (part,) = scheduler.put(second, task(1))
        assert part.answer.result(60) == {}
        scheduler.remove([second])
        assert num_threads() == before


@pytest.mark.parametrize("num_tasks", [1, 5])
def test_a_queue_that_is_removed_answers_its_tasks(num_tasks: int) -> None:
    processed: list[int] = []
    scheduler = BatchScheduler()
    patient = queue(
        "max_batch_size {value: 2} batch_timeout_micros {value: 3600000000}", processed=processed
    )
    scheduler.add(patient, 1)
    parts = [scheduler.put(patient, task(1))[0] for _ in range(num_tasks)]
    scheduler.remove([patient])
    assert all(part.answer.done() for part in parts)
    assert sum(processed) == num_tasks
