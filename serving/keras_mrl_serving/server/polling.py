"""The threads that look at base paths, and at the file of the model config, now and then."""

import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial

from .config import read_config
from .manager import Models
from .reload import Configuration
from .status import StatusError

_logger = logging.getLogger("keras_mrl_serving.server")
_Stamp = tuple[int, int, int]


class Poller:
    """Looks at the base paths of all models in one thread, which does all loading.

    Args:
        models: the models of the server.
        wait_s: the time between two looks; 0 or less means no look, only due tries and unloads.
    """

    def __init__(self, models: Models, wait_s: float) -> None:
        self._models = models
        self._wait_s = wait_s
        self._called = threading.Event()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="poller", daemon=True)

    def start(self) -> None:
        """Begins; the first look comes after the first wait."""
        self._thread.start()

    def wake(self) -> None:
        """Has it look now."""
        self._called.set()

    def stop(self) -> None:
        """Ends it, once what it does is done."""
        self._is_stopping = True
        self.wake()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        next_look = time.monotonic() + self._wait_s if self._wait_s > 0 else None
        while True:
            times = [t for t in (next_look, self._models.next_try()) if t is not None]
            timeout = max(min(times) - time.monotonic(), 0) if times else None
            called = self._called.wait(timeout)
            self._called.clear()
            if self._is_stopping:
                return
            looks = next_look is not None and (called or time.monotonic() >= next_look)
            try:
                if looks:
                    self._models.poll()
                else:
                    self._models.settle()
            except Exception:  # nothing would be loaded or unloaded any more
                _logger.exception("looking for versions failed")
            if looks:
                next_look = time.monotonic() + self._wait_s


class ConfigPoller:
    """Reads the file of the model config again and again, and reloads what it says.

    Where a model that it adds does not become available, for want of its base path say, the wait
    for it ends once the file changes: what it says then is taken at the next look.

    Args:
        configuration: what is reloaded.
        path: the file.
        wait_s: the time between two looks.
    """

    def __init__(self, configuration: Configuration, path: str, wait_s: float) -> None:
        self._configuration = configuration
        self._path = path
        self._wait_s = wait_s
        self._stopping = threading.Event()
        self._problem = ""
        self._thread = threading.Thread(target=self._run, name="config poller", daemon=True)

    def start(self) -> None:
        """Begins; the first look comes after the first wait."""
        self._thread.start()

    def stop(self) -> None:
        """Ends it."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> None:
        """Reloads what the file says now; what is wrong with it is only logged."""
        read = _stamp(self._path)  # before it is read: what is written meanwhile is read next
        problem = _problem_of(partial(self._reload, read))
        if self._is_replaced(read):
            problem = ""
        if problem and problem != self._problem and not self._stopping.is_set():
            _logger.error("%s: %s", self._path, problem)
        self._problem = problem

    def _reload(self, read: _Stamp | None) -> None:
        config = read_config(self._path)
        self._configuration.reload(
            config, lambda: not self._stopping.is_set() and not self._is_replaced(read)
        )

    def _is_replaced(self, read: _Stamp | None) -> bool:
        now = _stamp(self._path)
        return now is not None and now != read

    def _run(self) -> None:
        while not self._stopping.wait(self._wait_s):
            self.look()


def _stamp(path: str) -> _Stamp | None:
    """What changes with a file; None while there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _problem_of(action: Callable[[], None]) -> str:
    try:
        action()
    except StatusError as error:
        return f"{error.code.name}: {error.message}"
    except (OSError, ValueError) as error:
        return str(error)
    return ""
