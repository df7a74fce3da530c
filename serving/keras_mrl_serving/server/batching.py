"""A session that runs requests together, as TensorFlow Serving's BatchingSession does."""

import logging
import math
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial

import grpc
import numpy as np
import tensorflow as tf

from .._session import SavedModelSession
from .batching_config import BatchingOptions
from .batching_merge import batch_size, merge, padding_size, split
from .batching_queue import BatchQueue, Task
from .batching_threads import BatchThreads
from .status import StatusError, from_number

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
