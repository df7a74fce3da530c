"""The threads that read base paths, and the file of the model config, again and again."""

import os
import threading
from collections.abc import Callable

from .config import Configuration, read_config
from .log import logger
from .models import Models
from .status import StatusError


class Poller:
    """Calls a function again and again, in a thread of its own.

    Args:
        name: the name of the thread.
        look: the function; what it raises is logged, and the calls go on.
        seconds_to_wait: how long to wait before the next call; None means until `wake`.
    """

    def __init__(
        self, name: str, look: Callable[[], None], seconds_to_wait: Callable[[], float | None]
    ) -> None:
        self.is_stopping = False
        self._name = name
        self._look = look
        self._seconds_to_wait = seconds_to_wait
        self._woken = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Starts the thread; the first call comes after the first wait."""
        self._thread.start()

    def wake(self) -> None:
        """Ends the wait before the next call."""
        self._woken.set()

    def stop(self, grace_s: float | None = None) -> None:
        """Ends the thread, once a call under way has returned.

        Args:
            grace_s: how long to wait for that call; None means without limit.
        """
        self.is_stopping = True
        self.wake()
        if self._thread.is_alive():
            self._thread.join(grace_s)

    def _run(self) -> None:
        while True:
            self._woken.wait(self._seconds_to_wait())
            self._woken.clear()
            if self.is_stopping:
                return
            try:
                self._look()
            except Exception:  # without this thread, nothing would be loaded or unloaded any more
                logger.exception("%s: a look failed", self._name)


def model_poller(models: Models, wait_s: float) -> Poller:
    """The thread that does all loading and unloading.

    Args:
        models: the models of the server.
        wait_s: the time between two reads of the base paths; 0 or less means that it reads none,
            and only makes the tries and unloads that are due.
    """

    def seconds_to_wait() -> float | None:
        waits = (models.seconds_to_next_try(), wait_s if wait_s > 0 else None)
        return min((wait for wait in waits if wait is not None), default=None)

    return Poller("poller", models.poll if wait_s > 0 else models.settle, seconds_to_wait)


class ConfigPoller:
    """Reads the file of the model config again and again, and reloads the config.

    If a model that the config adds does not become available, because its base path is missing
    say, the reload waits until the file changes; the next look reads the new config.

    Args:
        configuration: takes the config.
        path: the file.
        wait_s: the time between two looks.
    """

    def __init__(self, configuration: Configuration, path: str, wait_s: float) -> None:
        self._configuration = configuration
        self._path = path
        self._problem = ""
        self._poller = Poller("config poller", self.look, lambda: wait_s)

    def start(self) -> None:
        """Starts the thread; the first look comes after the first wait."""
        self._poller.start()

    def stop(self, grace_s: float | None = None) -> None:
        """Ends the thread, and a wait for models in it.

        Args:
            grace_s: how long to wait for a look under way; None means without limit.
        """
        self._poller.stop(grace_s)

    def look(self) -> None:
        """Reads the file and reloads the config; a new problem with it is logged."""
        stamp = _stamp(self._path)  # before the read: a write in between makes another stamp
        problem = ""
        try:
            self._configuration.reload(
                read_config(self._path),
                lambda: not self._poller.is_stopping and not self._has_changed(stamp),
            )
        except StatusError as error:
            problem = f"{error.code.name}: {error.message}"
        except (OSError, ValueError) as error:
            problem = str(error)
        if self._has_changed(stamp):
            problem = ""
        if problem and problem != self._problem and not self._poller.is_stopping:
            logger.error("%s: %s", self._path, problem)
        self._problem = problem

    def _has_changed(self, stamp: tuple[int, int, int] | None) -> bool:
        now = _stamp(self._path)
        return now is not None and now != stamp


def _stamp(path: str) -> tuple[int, int, int] | None:
    """Numbers that change with a file; None while there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
