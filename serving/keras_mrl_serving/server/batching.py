"""A session that runs requests together, as TensorFlow Serving's BatchingSession does.

The inputs of a batch are put together along dimension 0 and padded to an allowed size; each request
gets its own rows of the outputs.
"""

import math
import threading
from collections.abc import Mapping, Sequence
from functools import partial

import grpc
import numpy as np
import tensorflow as tf
from tensorflow.core.framework.types_pb2 import DataType

from .._session import SavedModelSession
from .batch_scheduler import Arrays, BatchQueue, BatchScheduler, Task
from .batching_config import BatchingOptions
from .log import logger
from .status import StatusError, failed_precondition, from_number, invalid_argument

_MAX_RANK = 6


class BatchingSession:
    """Runs together the requests that feed and fetch the same tensors.

    Args:
        session: computes the batches; closed with this one.
        options: sizes and times.
        scheduler: the queues and threads of the server.
    """

    def __init__(
        self, session: SavedModelSession, options: BatchingOptions, scheduler: BatchScheduler
    ) -> None:
        self.signatures = session.signatures
        self._session = session
        self._options = options
        self._scheduler = scheduler
        self._lock = threading.Lock()
        # By the tensors they feed and those they fetch.
        self._queues: dict[tuple[frozenset[str], frozenset[str]], BatchQueue] = {}

    def run(
        self,
        signature_name: str,
        inputs: Mapping[str, np.ndarray],
        output_names: Sequence[str] = (),
        *,
        timeout_s: float | None = None,
    ) -> dict[str, np.ndarray]:
        """Runs one signature, perhaps together with other requests; see `SavedModelSession.run`.

        Raises:
            KeyError: no such signature, input or output.
            StatusError: the code and the text TensorFlow Serving would send.
        """
        feeds, fetches = self._session.tensors_of(signature_name, inputs, output_names)
        deadline = math.inf if timeout_s is None else self._scheduler.clock() + timeout_s
        task = Task(feeds, _num_rows(feeds), deadline)
        queue = self._queue(frozenset(feeds), frozenset(fetches.values()))
        answers = [part.answer.result() for part in self._scheduler.put(queue, task)]
        outputs = answers[0] if len(answers) == 1 else merge(answers, 0, False)
        return {name: outputs[tensor] for name, tensor in fetches.items()}

    def cancel(self) -> None:
        """Ends the batches under way, and all later ones, with CANCELLED."""
        self._session.cancel()

    def close(self) -> None:
        """Frees the session and its variables; call it once no run is under way."""
        self._scheduler.remove(self._queues.values())
        self._session.close()

    def _queue(self, feeds: frozenset[str], fetches: frozenset[str]) -> BatchQueue:
        key = feeds, fetches
        with self._lock:
            if key not in self._queues:
                process = partial(self._process, sorted(fetches))
                queue = BatchQueue(self._options, process, self._scheduler.clock)
                self._scheduler.add(queue, self._options.num_batch_threads)
                self._queues[key] = queue
            return self._queues[key]

    def _process(self, fetches: Sequence[str], tasks: Sequence[Task]) -> None:
        try:
            answers = self._run_batch(fetches, tasks)
        except Exception as error:  # the thread serves other models too, and each caller waits
            status = _as_status(error)
            for task in tasks:  # an exception for each: every raise writes into the exception
                task.answer.set_exception(StatusError(status.code, status.message))
            return
        for task, answer in zip(tasks, answers, strict=True):
            task.answer.set_result(answer)

    def _run_batch(
        self, fetches: Sequence[str], tasks: Sequence[Task]
    ) -> list[dict[str, np.ndarray]]:
        timeout_s = max(task.deadline for task in tasks) - self._scheduler.clock()
        if timeout_s <= 0:
            raise StatusError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                "Run() timeout exceeded while waiting in batching queue",
            )
        sizes = [task.size for task in tasks]
        padding = _padding_size(sum(sizes), self._options.allowed_batch_sizes)
        feeds = merge(
            [task.feeds for task in tasks], padding, self._options.pad_variable_length_inputs
        )
        outputs = self._session.run_tensors(
            feeds, fetches, timeout_s=None if timeout_s == math.inf else timeout_s
        )
        return _split(dict(zip(fetches, outputs, strict=True)), sizes, padding)


def merge(
    tasks: Sequence[Arrays], padding: int, pad_variable_length: bool
) -> dict[str, np.ndarray]:
    """The inputs of several requests as those of one batch.

    Args:
        tasks: the inputs of each request, at least one; all have the same names.
        padding: how many rows to add: copies of the first row of the last request that has one.
        pad_variable_length: whether inner shapes may differ; shorter inputs are then filled with
            their own first element.

    Raises:
        StatusError: FAILED_PRECONDITION or INTERNAL, the requests do not fit together.
    """
    batch = {}
    for name in sorted(tasks[0]):
        arrays = [task[name] for task in tasks]
        if pad_variable_length:
            arrays = _with_equal_inner_shapes(name, arrays)
        elif any(array.shape[1:] != arrays[0].shape[1:] for array in arrays):
            raise failed_precondition(
                f"Tensors with name '{name}' from different tasks have different shapes and "
                "padding is turned off. Set pad_variable_length_inputs to true, or ensure that all "
                "tensors with the same name have equal dimensions starting with the first dim."
            )
        _check_equal_dtypes(arrays)
        if padding:
            last = next(array for array in reversed(arrays) if len(array))
            arrays.append(np.repeat(last[:1], padding, axis=0))
        batch[name] = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    return batch


def _with_equal_inner_shapes(name: str, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    ranks = {array.ndim for array in arrays}
    if max(ranks) > _MAX_RANK:
        raise invalid_argument("Only tensors with rank from 1 to 6 can be padded.")
    if len(ranks) > 1:  # TensorFlow Serving reads past the end of its sizes here
        raise failed_precondition(
            f"Tensors with name '{name}' from different tasks have different ranks"
        )
    inner_shape = np.max([array.shape[1:] for array in arrays], axis=0, initial=0)
    return [_filled(array, (len(array), *inner_shape)) for array in arrays]


def _filled(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The array in the corner of a larger one, whose rest is its first element."""
    if array.size == np.prod(shape, dtype=np.int64):
        return array.reshape(shape)
    if array.size < 1:
        raise invalid_argument("Got empty tensor in batch of non-empty tensors.")
    larger = np.full(shape, array.flat[0], array.dtype)
    larger[tuple(slice(size) for size in array.shape)] = array
    return larger


def _check_equal_dtypes(arrays: Sequence[np.ndarray]) -> None:
    first = arrays[0].dtype
    for array in arrays:
        if array.dtype != first:
            raise StatusError(
                grpc.StatusCode.INTERNAL,
                "Tensor concat operation failed: INVALID_ARGUMENT: Cannot concatenate tensors that "
                f"have different data types. Got {_dtype_name(first)} and "
                f"{_dtype_name(array.dtype)}.",
            )


def _dtype_name(dtype: np.dtype) -> str:
    name: str = DataType.Name(tf.as_dtype(dtype).as_datatype_enum)
    return name.removeprefix("DT_").lower()


def _num_rows(feeds: Arrays) -> int:
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


def _padding_size(size: int, allowed_sizes: Sequence[int]) -> int:
    # An empty batch has no row to repeat; TensorFlow Serving ends itself over it.
    return next((larger - size for larger in allowed_sizes if larger >= size), 0) if size else 0


def _split(outputs: Arrays, sizes: Sequence[int], padding: int) -> list[dict[str, np.ndarray]]:
    """The rows of each request, in the order of the batch, from the outputs of the batch."""
    for _, array in sorted(outputs.items()):
        if array.ndim == 0:
            raise failed_precondition("Batched output tensor has 0 dimensions")
        if len(array) != sum(sizes) + padding:
            raise failed_precondition(
                "Batched output tensor's 0th dimension does not equal the sum of the 0th dimension "
                "sizes of the input tensors"
            )
    return [
        {name: array[end - size : end] for name, array in outputs.items()}
        for size, end in zip(sizes, np.cumsum(sizes), strict=True)
    ]


def _as_status(error: Exception) -> StatusError:
    if isinstance(error, StatusError):
        return error
    if isinstance(error, tf.errors.OpError):
        return from_number(error.error_code, error.message)
    logger.error("a batch failed", exc_info=error)
    return StatusError(grpc.StatusCode.UNKNOWN, str(error))
