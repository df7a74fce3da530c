"""Where requests wait for company: queues that form batches, and the threads that compute them.

As with TensorFlow Serving's SharedBatchScheduler, each set of inputs and outputs of a model has a
queue of its own, and all models of a server share the threads, which serve the queues in turn. The
last batch of a queue is open to further requests. It is due once it is full, or has waited long
enough.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import grpc
import numpy as np

from .batching_config import BatchingOptions
from .status import StatusError, invalid_argument

Arrays = Mapping[str, np.ndarray]  # by the name of the tensor in the graph
_LONGEST_WAIT_S = 3600.0  # a file may name a timeout that is longer than threads can wait


@dataclass(eq=False)
class Task:
    """A request, or a part of one, and the future of its answer.

    Args:
        feeds: its inputs.
        size: its rows.
        deadline: when its caller stops waiting, on the scheduler's clock.
    """

    feeds: Arrays
    size: int
    deadline: float
    answer: Future[dict[str, np.ndarray]] = field(default_factory=Future)

    def split(self, sizes: Sequence[int]) -> list["Task"]:
        """Tasks of these sizes, whose answers end to end are the answer of this one.

        Args:
            sizes: the rows of each; their sum is `size`.
        """
        parts, start = [], 0
        for size in sizes:
            rows = slice(start, start + size)
            feeds = {name: array[rows] for name, array in self.feeds.items()}
            parts.append(Task(feeds, size, self.deadline))
            start += size
        return parts


class BatchScheduler:
    """The queues of all models of a server, and the threads that run while there is a queue.

    Args:
        clock: the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        lock = threading.Lock()
        self._due = threading.Condition(lock)
        self._idle = threading.Condition(lock)
        self._queues: deque[BatchQueue] = deque()
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()

    def add(self, queue: "BatchQueue", num_threads: int) -> None:
        """Serves a queue from now on.

        Args:
            queue: the queue.
            num_threads: how many threads to start, if none run yet.
        """
        with self._due:
            self._queues.append(queue)
            if not self._threads:
                self._stop = threading.Event()
                self._threads = [
                    threading.Thread(
                        target=self._work, args=(self._stop,), name="batching", daemon=True
                    )
                    for _ in range(num_threads)
                ]
                for thread in self._threads:
                    thread.start()

    def put(self, queue: "BatchQueue", task: Task) -> list[Task]:
        """Queues a task; see `BatchQueue.put`.

        Args:
            queue: a queue that was added.
            task: the task.

        Raises:
            StatusError: the queue does not take it.
        """
        with self._due:
            parts = queue.put(task)
            self._due.notify()
        return parts

    def remove(self, queues: Iterable["BatchQueue"]) -> None:
        """Answers the tasks that wait in these queues, and serves them no longer.

        Args:
            queues: queues that were added, into which nothing is put any more.
        """
        removed, threads = list(queues), []
        with self._due:
            for queue in removed:
                queue.close()
            self._due.notify_all()
            self._idle.wait_for(lambda: all(queue.is_idle for queue in removed))
            for queue in removed:
                self._queues.remove(queue)
            if not self._queues:
                threads, self._threads = self._threads, []
                self._stop.set()
                self._due.notify_all()
        for thread in threads:
            thread.join()

    def _work(self, stop: threading.Event) -> None:
        while (batch := self._next_batch(stop)) is not None:
            queue, tasks = batch
            queue.process(tasks)
            with self._due:
                queue.done()
                self._idle.notify_all()
            del batch, queue, tasks  # their arrays would live until the next batch

    def _next_batch(self, stop: threading.Event) -> tuple["BatchQueue", list[Task]] | None:
        with self._due:
            while not stop.is_set():
                for _ in range(len(self._queues)):
                    queue = self._queues[0]
                    self._queues.rotate(-1)
                    tasks = queue.take()
                    if tasks is not None:
                        # Wake another worker: this one was timing the other queues, and is now
                        # busy with this batch.
                        self._due.notify()
                        return queue, tasks
                due = min((queue.due() for queue in self._queues), default=math.inf)
                wait_s = min(max(due - self.clock(), 0.0), _LONGEST_WAIT_S)
                self._due.wait(None if due == math.inf else wait_s)
            return None


class BatchQueue:
    """The batches of one set of inputs and outputs. Not thread-safe: `BatchScheduler` is.

    Args:
        options: sizes and times.
        process: answers every task of a batch; it raises nothing.
        clock: the time in seconds.
    """

    def __init__(
        self,
        options: BatchingOptions,
        process: Callable[[Sequence[Task]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.process = process
        self._options = options
        self._clock = clock
        self._batches = deque([_Batch()])  # the last one is open, and may be empty
        self._is_closed = False
        self._num_processing = 0

    def put(self, task: Task) -> list[Task]:
        """Queues a task, and returns the parts it was split into: mostly itself alone.

        Args:
            task: the task.

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
        self._check_capacity(task.size, room)
        parts = [task]
        if task.size > room and options.enable_large_batch_splitting:
            whole, rest = divmod(task.size - room, limit)
            parts = task.split([size for size in (room, *[limit] * whole, rest) if size])
        for part in parts:
            if self._batches[-1].size + part.size > limit:
                self._batches.append(_Batch())
            batch = self._batches[-1]
            if not batch.tasks:
                batch.started = self._clock()
            batch.tasks.append(part)
            batch.size += part.size
        return parts

    def take(self) -> list[Task] | None:
        """Takes out the batch that is due and returns its tasks; None if none is due."""
        if self.due() > self._clock():
            return None
        if len(self._batches) == 1:
            self._batches.append(_Batch())
        self._num_processing += 1
        return self._batches.popleft().tasks

    def done(self) -> None:
        """Notes that a batch that was taken is answered."""
        self._num_processing -= 1

    def due(self) -> float:
        """When the first batch is due; infinity if the queue is empty."""
        batch = self._batches[0]
        if not batch.tasks:
            return math.inf
        is_full = batch.size >= self._options.max_execution_batch_size
        if is_full or len(self._batches) > 1 or self._is_closed:
            return -math.inf
        return batch.started + self._options.batch_timeout_s

    def close(self) -> None:
        """Makes every batch due at once."""
        self._is_closed = True

    @property
    def is_idle(self) -> bool:
        """Whether every task is answered."""
        return self._num_processing == 0 and not self._batches[0].tasks

    def _check_capacity(self, size: int, room: int) -> None:
        limit, most = self._options.max_execution_batch_size, self._options.max_enqueued_batches
        enqueued = len(self._batches)
        capacity = (most - enqueued) * limit + room
        if self._options.enable_large_batch_splitting:
            is_full = size > capacity
            reason = (
                f"task size is {size} but scheduling capacity is only {capacity} "
                f"(num_enqueued_batches={enqueued}, max_enqueued_batches={most}, "
                f"open_batch_size={limit - room}, max_execution_batch_size={limit})"
            )
        else:
            is_full = size > room and enqueued >= most
            reason = f"currently {enqueued} batches enqueued and max_enqueued_batches is {most}"
        if is_full:
            raise StatusError(
                grpc.StatusCode.UNAVAILABLE,
                f"The batch scheduling queue to which this task was submitted is full; {reason}",
            )


@dataclass(eq=False)
class _Batch:
    tasks: list[Task] = field(default_factory=list)
    size: int = 0
    started: float = math.inf
