"""A session that runs requests together, as TensorFlow Serving's BatchingSession does."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import grpc
import numpy as np
import tensorflow as tf
from tensorflow.core.framework.types_pb2 import DataType

from .._session import SavedModelSession
from .batching_config import BatchingOptions
from .status import StatusError, from_number, invalid_argument

# Requests put together along dimension 0, and their answers taken apart again.

Arrays = Mapping[str, np.ndarray]  # by the name of the tensor in the graph
_MAX_RANK = 6


def batch_size(feeds: Arrays) -> int:
    """How many rows a request has.

    Args:
        feeds: the inputs.

    Raises:
        StatusError: INVALID_ARGUMENT, they have no common number of rows.
    """
    if not feeds:
        raise invalid_argument("Batching Run() must have at least one input tensor")
    sizes = set()
    for _, array in sorted(feeds.items()):
        if array.ndim == 0:
            raise invalid_argument("Batching Run() input tensors must have at least one dimension")
        sizes.add(len(array))
        if len(sizes) > 1:
            raise invalid_argument(
                "Batching Run() input tensors must have equal 0th-dimension size"
            )
    return sizes.pop()


def padding_size(size: int, allowed: Sequence[int]) -> int:
    """How many rows a batch is padded by.

    Args:
        size: its rows.
        allowed: the sizes a batch may have; empty means any.
    """
    # Without a row there is none to repeat; TensorFlow Serving ends itself over it.
    return next((larger - size for larger in allowed if larger >= size), 0) if size else 0


def merge(
    tasks: Sequence[Arrays], padding: int, pad_variable_length: bool
) -> dict[str, np.ndarray]:
    """One batch of the inputs of several requests, which have the same names.

    Args:
        tasks: the inputs of each request, at least one.
        padding: how many rows to add: the first row of the last request that has one.
        pad_variable_length: whether inner shapes may differ; the shorter are filled with their
            own first element then.

    Raises:
        StatusError: FAILED_PRECONDITION or INTERNAL, the requests do not fit together.
    """
    merged = {}
    for name in sorted(tasks[0]):
        arrays = [task[name] for task in tasks]
        if pad_variable_length:
            arrays = _filled(name, arrays)
        elif any(array.shape[1:] != arrays[0].shape[1:] for array in arrays):
            raise StatusError(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"Tensors with name '{name}' from different tasks have different shapes and "
                "padding is turned off. Set pad_variable_length_inputs to true, or ensure that all "
                "tensors with the same name have equal dimensions starting with the first dim.",
            )
        _check_dtypes(arrays)
        if padding:
            last = next(array for array in reversed(arrays) if len(array))
            arrays.append(np.repeat(last[:1], padding, axis=0))
        merged[name] = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return merged


def split(outputs: Arrays, sizes: Sequence[int], padding: int) -> list[dict[str, np.ndarray]]:
    """The part of each request in the answer to a batch.

    Args:
        outputs: the answer.
        sizes: the rows of each request, in the order of the batch.
        padding: how many rows of padding follow.

    Raises:
        StatusError: FAILED_PRECONDITION, an output has no row per row.
    """
    for _, array in sorted(outputs.items()):
        if array.ndim == 0:
            raise StatusError(
                grpc.StatusCode.FAILED_PRECONDITION, "Batched output tensor has 0 dimensions"
            )
        if len(array) != sum(sizes) + padding:
            raise StatusError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "Batched output tensor's 0th dimension does not equal the sum of the 0th dimension "
                "sizes of the input tensors",
            )
    ends = np.cumsum(sizes)
    return [
        {name: array[end - size : end] for name, array in outputs.items()}
        for size, end in zip(sizes, ends, strict=True)
    ]


def _check_dtypes(arrays: Sequence[np.ndarray]) -> None:
    first = arrays[0].dtype
    for array in arrays:
        if array.dtype != first:
            raise StatusError(
                grpc.StatusCode.INTERNAL,
                "Tensor concat operation failed: INVALID_ARGUMENT: Cannot concatenate tensors that "
                f"have different data types. Got {_name(first)} and {_name(array.dtype)}.",
            )


def _name(dtype: np.dtype) -> str:
    name: str = DataType.Name(tf.as_dtype(dtype).as_datatype_enum)
    return name.removeprefix("DT_").lower()


def _filled(name: str, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    ranks = {array.ndim for array in arrays}
    if max(ranks) > _MAX_RANK:
        raise invalid_argument("Only tensors with rank from 1 to 6 can be padded.")
    if len(ranks) > 1:  # TensorFlow Serving reads past the end of its sizes here
        raise StatusError(
            grpc.StatusCode.FAILED_PRECONDITION,
            f"Tensors with name '{name}' from different tasks have different ranks",
        )
    inner = tuple(np.max([array.shape[1:] for array in arrays], axis=0, initial=0))
    return [_grown(array, (len(array), *inner)) for array in arrays]


def _grown(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if array.size == np.prod(shape, dtype=np.int64):
        return array.reshape(shape)
    if array.size < 1:
        raise invalid_argument("Got empty tensor in batch of non-empty tensors.")
    grown = np.full(shape, array.flat[0], array.dtype)
    grown[tuple(slice(size) for size in array.shape)] = array
    return grown


# A queue of requests that wait for company: which batch each joins, and when a batch is due.


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


# The threads that compute batches, and how they serve all queues in turn.

_LONGEST_WAIT_S = 3600.0  # what a file may ask for is longer than threads can wait


class BatchThreads:
    """The threads that all models of a server share; they run while there is a queue."""

    def __init__(self) -> None:
        lock = threading.Lock()
        self._due = threading.Condition(lock)
        self._idle = threading.Condition(lock)
        self._queues: deque[BatchQueue] = deque()
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()

    def add(self, queue: BatchQueue, num_threads: int) -> None:
        """Serves a queue from now on.

        Args:
            queue: the queue.
            num_threads: how many threads there are; the first queue decides.
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

    def put(self, queue: BatchQueue, task: Task) -> list[Task]:
        """Queues a task; see `BatchQueue.put`.

        Args:
            queue: a queue that was added.
            task: what is to be computed.

        Raises:
            StatusError: the queue does not take it.
        """
        with self._due:
            parts = queue.put(task)
            self._due.notify()
        return parts

    def remove(self, queues: Iterable[BatchQueue]) -> None:
        """Answers what waits in these queues and serves them no longer.

        Args:
            queues: queues that were added, to which nothing is put any more.
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
        while (found := self._next(stop)) is not None:
            queue, tasks = found
            queue.process(tasks)
            with self._due:
                queue.done()
                self._idle.notify_all()
            del found, queue, tasks  # their arrays would live until the next batch

    def _next(self, stop: threading.Event) -> tuple[BatchQueue, list[Task]] | None:
        with self._due:
            while not stop.is_set():
                for _ in range(len(self._queues)):
                    queue = self._queues[0]
                    self._queues.rotate(-1)
                    tasks = queue.take()
                    if tasks is not None:
                        # Whoever still waits looks anew: this thread kept the time of other queues.
                        self._due.notify()
                        return queue, tasks
                due = min((queue.due() for queue in self._queues), default=math.inf)
                wait_s = min(max(due - time.monotonic(), 0.0), _LONGEST_WAIT_S)
                self._due.wait(None if due == math.inf else wait_s)
            return None


_logger = logging.getLogger("keras_mrl_serving.server")
_Key = tuple[frozenset[str], frozenset[str]]


class BatchingSession:
    """Runs of the same inputs and outputs, by the names of their tensors, wait for each other.

    Args:
        session: what computes; closed with this one.
        options: sizes and times.
        threads: the threads of the server.
    """

    def __init__(
        self, session: SavedModelSession, options: BatchingOptions, threads: BatchThreads
    ) -> None:
        self.signatures = session.signatures
        self._session = session
        self._options = options
        self._threads = threads
        self._lock = threading.Lock()
        self._queues: dict[_Key, BatchQueue] = {}

    def run(
        self,
        signature_name: str,
        inputs: Mapping[str, np.ndarray],
        output_names: Sequence[str] = (),
        *,
        timeout_s: float | None = None,
    ) -> dict[str, np.ndarray]:
        """Runs one signature, perhaps together with other requests.

        Args:
            signature_name: a key of `signatures`.
            inputs: arrays by the signature's input names; strings are object arrays of bytes.
            output_names: the outputs to fetch; empty means all of them.
            timeout_s: how long the caller waits; None means without limit.

        Raises:
            KeyError: no such signature, input or output.
            StatusError: the code and the text TensorFlow Serving would send.
        """
        feeds, fetches = self._session.tensors_of(signature_name, inputs, output_names)
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        task = Task(feeds, batch_size(feeds), deadline)
        queue = self._queue((frozenset(feeds), frozenset(fetches.values())))
        answers = [part.answer.result() for part in self._threads.put(queue, task)]
        fetched = answers[0] if len(answers) == 1 else merge(answers, 0, False)
        return {name: fetched[tensor] for name, tensor in fetches.items()}

    def close(self) -> None:
        """Frees the session and its variables; call it once no run is under way."""
        self._threads.remove(self._queues.values())
        self._session.close()

    def _queue(self, key: _Key) -> BatchQueue:
        with self._lock:
            if key not in self._queues:
                self._queues[key] = BatchQueue(
                    self._options, partial(self._process, tuple(sorted(key[1])))
                )
                self._threads.add(self._queues[key], self._options.num_batch_threads)
            return self._queues[key]

    def _process(self, fetches: Sequence[str], tasks: Sequence[Task]) -> None:
        try:
            answers = self._run_batch(fetches, tasks)
        except (
            Exception
        ) as error:  # the threads are the server's, and each caller is owed an answer
            failed = _as_status(error)
            for task in tasks:  # one of its own for each: every raise writes into an exception
                task.answer.set_exception(StatusError(failed.code, failed.message))
            return
        for task, answer in zip(tasks, answers, strict=True):
            task.answer.set_result(answer)

    def _run_batch(
        self, fetches: Sequence[str], tasks: Sequence[Task]
    ) -> list[dict[str, np.ndarray]]:
        latest = max(task.deadline for task in tasks)
        left_s = latest - time.monotonic()
        if left_s <= 0:
            raise StatusError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "Run() timeout exceeded while waiting in batching queue",
            )
        sizes = [task.size for task in tasks]
        padding = padding_size(sum(sizes), self._options.allowed_batch_sizes)
        feeds = merge(
            [task.feeds for task in tasks], padding, self._options.pad_variable_length_inputs
        )
        outputs = self._session.run_tensors(
            feeds, fetches, timeout_s=None if left_s == math.inf else left_s
        )
        return split(dict(zip(fetches, outputs, strict=True)), sizes, padding)


def _as_status(error: Exception) -> StatusError:
    if isinstance(error, StatusError):
        return error
    if isinstance(error, tf.errors.OpError):
        return from_number(error.error_code, error.message)
    _logger.error("a batch failed", exc_info=error)
    return StatusError(grpc.StatusCode.UNKNOWN, str(error))
