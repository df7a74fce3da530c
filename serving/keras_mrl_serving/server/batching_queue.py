"""A queue of requests that wait for company: which batch each joins, and when a batch is due."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import grpc
import numpy as np

from .batching_config import BatchingOptions
from .batching_merge import Arrays
from .status import StatusError, invalid_argument


@dataclass(eq=False)
class Task:
    """A request, or a part of one, and the answer it waits for.

    Args:
        feeds: its inputs.
        size: its rows.
        deadline: when nobody waits any longer, in `time.monotonic`'s seconds.
    """

    feeds: Arrays
    size: int
    deadline: float
    answer: Future[dict[str, np.ndarray]] = field(default_factory=Future)

    def split(self, sizes: Sequence[int]) -> list["Task"]:
        """Tasks of these sizes, whose answers in a row are this one's.

        Args:
            sizes: how many rows each has; their sum is all of them.
        """
        parts, start = [], 0
        for size in sizes:
            rows = slice(start, start + size)
            feeds = {name: array[rows] for name, array in self.feeds.items()}
            parts.append(Task(feeds, size, self.deadline))
            start += size
        return parts


@dataclass(eq=False)
class _Batch:
    tasks: list[Task] = field(default_factory=list)
    size: int = 0
    started: float = math.inf

    def add(self, task: Task) -> None:
        if not self.tasks:
            self.started = time.monotonic()
        self.tasks.append(task)
        self.size += task.size


class BatchQueue:
    """The batches of one set of inputs and outputs. Not thread-safe: `BatchThreads` is.

    Args:
        options: sizes and times.
        process: answers every task of a batch; it raises nothing.
    """

    def __init__(self, options: BatchingOptions, process: Callable[[Sequence[Task]], None]) -> None:
        self.process = process
        self._options = options
        self._batches = deque([_Batch()])  # the last one is open, and may be empty
        self._closed = False
        self._under_way = 0

    def put(self, task: Task) -> list[Task]:
        """Queues a task; returns the parts it was split into, itself where it was not.

        Args:
            task: what is to be computed.

        Raises:
            StatusError: INVALID_ARGUMENT, it is too large; UNAVAILABLE, the queue is full.
        """
        options, limit = self._options, self._options.max_execution_batch_size
        if task.size > options.max_batch_size:
            raise invalid_argument(
                f"Task size {task.size} is larger than maximum input batch size "
                f"{options.max_batch_size}"
            )
        room = limit - self._batches[-1].size
        self._check_room(task.size, room)
        parts = [task]
        if task.size > room and options.enable_large_batch_splitting:
            whole, rest = divmod(task.size - room, limit)
            parts = task.split([size for size in (room, *[limit] * whole, rest) if size])
        for part in parts:
            if self._batches[-1].size + part.size > limit:
                self._batches.append(_Batch())
            self._batches[-1].add(part)
        return parts

    def take(self) -> list[Task] | None:
        """The tasks of the next batch that is due, or None."""
        if len(self._batches) == 1 and self.due() <= time.monotonic():
            self._batches.append(_Batch())
        if len(self._batches) == 1:
            return None
        self._under_way += 1
        return self._batches.popleft().tasks

    def done(self) -> None:
        """Says that a batch that was taken is answered."""
        self._under_way -= 1

    def due(self) -> float:
        """When a batch is to be taken; infinite where none waits."""
        batch = self._batches[0]
        if not batch.tasks:
            return math.inf
        if (
            len(self._batches) > 1
            or self._closed
            or batch.size >= self._options.max_execution_batch_size
        ):
            return -math.inf
        return batch.started + self._options.batch_timeout_s

    def close(self) -> None:
        """Lets nothing wait any longer."""
        self._closed = True

    @property
    def is_idle(self) -> bool:
        """Whether every task is answered."""
        return self._under_way == 0 and not self._batches[0].tasks

    def _check_room(self, size: int, room: int) -> None:
        limit, most = self._options.max_execution_batch_size, self._options.max_enqueued_batches
        enqueued = len(self._batches)
        full = "The batch scheduling queue to which this task was submitted is full; "
        if self._options.enable_large_batch_splitting:
            capacity = (most - enqueued) * limit + room
            if size > capacity:
                raise StatusError(
                    grpc.StatusCode.UNAVAILABLE,
                    f"{full}task size is {size} but scheduling capacity is only {capacity} "
                    f"(num_enqueued_batches={enqueued}, max_enqueued_batches={most}, "
                    f"open_batch_size={limit - room}, max_execution_batch_size={limit})",
                )
        elif size > room and enqueued >= most:
            raise StatusError(
                grpc.StatusCode.UNAVAILABLE,
                f"{full}currently {enqueued} batches enqueued and max_enqueued_batches is {most}",
            )
