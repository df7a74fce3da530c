"""The threads that compute batches, and how they serve all queues in turn."""

import math
import threading
import time
from collections import deque
from collections.abc import Iterable

from .batching_queue import BatchQueue, Task

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
