"""One served model: its base path polled, its versions loaded, swapped and unloaded."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
import tensorflow as tf
from tensorflow_serving.apis.get_model_status_pb2 import ModelVersionStatus

from .._session import SavedModelSession
from .status import StatusError, from_number
from .versions import latest, list_versions

_logger = logging.getLogger("keras_mrl_serving.server")


@dataclass
class Version:
    """One version the server has met; `state` is a `ModelVersionStatus.State`.

    `session` is there exactly while the version is available. `error` stands beside END where it
    did not load; END without one means unloaded.
    """

    number: int
    state: int = ModelVersionStatus.LOADING
    error: StatusError | None = None
    session: SavedModelSession | None = None
    in_use: int = 0


class ServedModel:
    """The versions of one model.

    `poll` is called by one thread at a time and does all loading and unloading; `serving` and
    `versions` by any.

    Args:
        name: the name requests ask for.
        base_path: the folder whose numeric children are the versions.
    """

    def __init__(self, name: str, base_path: str) -> None:
        self.name = name
        self.base_path = base_path
        self._versions: dict[int, Version] = {}
        self._failed: set[int] = set()
        self._changed = threading.Condition()

    def poll(self) -> None:
        """Brings what is served in line with what stands under the base path.

        The old version goes only once a new one serves, or where none is left to serve. A version
        that failed to load is not tried again until it has been removed, or a higher one has taken
        its place.

        Raises:
            OSError: the base path cannot be read; nothing is changed then.
        """
        aspired = latest(list_versions(self.base_path))
        self._failed &= aspired.keys()
        for number in sorted(aspired.keys() - self._failed - self._available(), reverse=True):
            self._load(number, aspired[number])
        available = self._available()
        if available and not aspired:
            _logger.warning(no_versions(self.name, self.base_path))
        if not aspired or available & aspired.keys():
            for number in sorted(available - aspired.keys()):
                self._unload(number)

    @contextmanager
    def serving(self, number: int | None) -> Iterator[tuple[int, SavedModelSession]]:
        """A version and its session, which stays loaded for as long as the context does.

        Args:
            number: the version, or None for the highest available one.

        Raises:
            StatusError: NOT_FOUND, nothing available answers to `number`.
        """
        version, session = self._acquire(number)
        try:
            yield version.number, session
        finally:
            with self._changed:
                version.in_use -= 1
                self._changed.notify_all()

    def versions(self) -> list[Version]:
        """Every version met in the life of the server, highest first."""
        with self._changed:
            return sorted(self._versions.values(), key=lambda v: v.number, reverse=True)

    def close(self) -> None:
        """Unloads everything, once the requests under way are answered."""
        for number in sorted(self._available()):
            self._unload(number)

    def _available(self) -> set[int]:
        with self._changed:
            return {number for number, version in self._versions.items() if version.session}

    def _acquire(self, number: int | None) -> tuple[Version, SavedModelSession]:
        with self._changed:
            chosen = max(self._available(), default=None) if number is None else number
            version = None if chosen is None else self._versions.get(chosen)
            if version is None or version.session is None:
                raise not_found(self.name, number)
            version.in_use += 1
            return version, version.session

    def _load(self, number: int, path: str) -> None:
        version = Version(number)
        with self._changed:
            self._versions[number] = version
        try:
            session = _open(path)
        except StatusError as error:
            _logger.error("%s: version %d does not load: %s", self.name, number, error)
            self._failed.add(number)
            with self._changed:
                version.state, version.error = ModelVersionStatus.END, error
            return
        with self._changed:
            version.state, version.session = ModelVersionStatus.AVAILABLE, session
        _logger.info("%s: version %d loaded from %s", self.name, number, path)

    def _unload(self, number: int) -> None:
        with self._changed:
            version = self._versions[number]
            # Taken out first, so that no new request gets it while the ones under way finish.
            session, version.session = version.session, None
            version.state = ModelVersionStatus.UNLOADING
            self._changed.wait_for(lambda: version.in_use == 0)
        if session is not None:
            session.close()
        with self._changed:
            version.state = ModelVersionStatus.END
        _logger.info("%s: version %d unloaded", self.name, number)


def no_versions(name: str, base_path: str) -> str:
    """What TensorFlow Serving says of a base path without versions."""
    return (
        f"No versions of servable {name} found under base path {base_path}. Did you forget to "
        "name your leaf directory as a number (eg. '/1/')?"
    )


def not_found(name: str, number: int | None) -> StatusError:
    """The error for a model, or a version of one, that nothing available answers to."""
    request = f"Latest({name})" if number is None else f"Specific({name}, {number})"
    message = f"Servable not found for request: {request}"
    return StatusError(grpc.StatusCode.NOT_FOUND, message)


def _open(path: str) -> SavedModelSession:
    if not tf.saved_model.contains_saved_model(path):
        raise StatusError(
            grpc.StatusCode.NOT_FOUND,
            "Specified file path does not appear to contain a SavedModel bundle (should have a "
            f"file called `saved_model.pb`)\nSpecified file path: {path}",
        )
    try:
        return SavedModelSession(path)
    except tf.errors.OpError as error:
        raise from_number(error.error_code, error.message) from error
    except Exception as error:  # the loader raises whatever it met; no model may end the server
        raise StatusError(grpc.StatusCode.UNKNOWN, str(error)) from error
