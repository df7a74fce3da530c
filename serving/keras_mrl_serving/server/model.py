"""One served model: which of its versions is loaded or unloaded next, and who uses which."""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import grpc
from tensorflow_serving.apis.get_model_status_pb2 import ModelVersionStatus

from .running import ServingSession
from .status import StatusError

_logger = logging.getLogger("keras_mrl_serving.server")


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How often a version that does not load is tried again, and when.

    Args:
        max_num: tries after the first one.
        interval_s: the time between two tries.
    """

    max_num: int = 5
    interval_s: float = 60.0


@dataclass(eq=False)
class Version:
    """One load of a version the server has met; `state` is a `ModelVersionStatus.State`.

    `session` is there exactly while the version is available. `failure` is that of the last try,
    and `retry_at` when there is another one.
    """

    number: int
    path: str
    state: int = ModelVersionStatus.START
    failure: StatusError | None = None
    session: ServingSession | None = None
    in_use: int = 0
    is_aspired: bool = True
    tries: int = 0
    retry_at: float | None = None

    @property
    def error(self) -> StatusError | None:
        """Why it did not load, once it is not tried again; END without one means unloaded."""
        return self.failure if self.state == ModelVersionStatus.END else None


class ServedModel:
    """The versions of one model, under TensorFlow Serving's AvailabilityPreservingPolicy.

    `aspire`, `next_unload`, `next_load` and `close` are called by one thread at a time and do all
    loading and unloading; `serving` and `versions` by any.

    Args:
        name: the name requests ask for.
        load: opens the version at a path.
        retries: what happens to a version that does not load.
        changed: is held for every change of a version's state, and notified of it.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[str], ServingSession],
        retries: Retries,
        changed: threading.Condition,
    ) -> None:
        self.name = name
        self._load_at = load
        self._retries = retries
        self._changed = changed
        self._met: dict[int, Version] = {}
        self._managed: dict[int, Version] = {}

    def aspire(self, paths: Mapping[int, str]) -> None:
        """Says which versions are to be served from now on.

        Where an old version still stands in for new ones, a wish that names it again waits until
        it is gone, as TensorFlow Serving lets it wait: the new ones are not given up for it, and
        tried again as before.

        Args:
            paths: paths by version.
        """
        with self._changed:
            if any(v.number in paths for v in self._managed.values() if not v.is_aspired):
                return
            for version in list(self._managed.values()):
                if version.number not in paths:
                    version.is_aspired = False
                    if version.retry_at is not None:
                        version.state, version.retry_at = ModelVersionStatus.END, None
                    if version.session is None:
                        del self._managed[version.number]
            for number in paths.keys() - self._managed.keys():
                version = Version(number, paths[number])
                self._managed[number] = self._met[number] = version
            self._changed.notify_all()

    def next_unload(self) -> Callable[[], None] | None:
        """The unloading that is due: of the lowest version no longer wanted.

        None is due while it alone serves and one that is wanted does not yet.
        """
        managed = self._managed.values()
        ready = [version for version in managed if version.session]
        spare = [version for version in ready if not version.is_aspired]
        must_stay = (
            len(spare) == 1
            and any(version.is_aspired for version in managed)
            and not any(version.is_aspired for version in ready)
        )
        if not spare or must_stay:
            return None
        lowest = min(spare, key=lambda version: version.number)
        return lambda: self._unload(lowest)

    def next_load(self) -> Callable[[], None] | None:
        """The loading that is due: of the highest version not yet tried, or to be tried again."""
        now = time.monotonic()
        new = [v for v in self._managed.values() if v.state == ModelVersionStatus.START]
        due = [v for v in self._managed.values() if v.retry_at is not None and v.retry_at <= now]
        if not new and not due:
            return None
        highest = max(new or due, key=lambda version: version.number)
        return lambda: self._load(highest)

    def next_try(self) -> float | None:
        """When a version that did not load is tried again, on the monotonic clock."""
        with self._changed:
            times = [v.retry_at for v in self._managed.values() if v.retry_at is not None]
        return min(times, default=None)

    @contextmanager
    def serving(self, number: int | None) -> Iterator[tuple[int, ServingSession]]:
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
            return sorted(self._met.values(), key=lambda v: v.number, reverse=True)

    def close(self) -> None:
        """Unloads everything, once the requests under way are answered."""
        self.aspire({})
        while unload := self.next_unload():
            unload()

    def _acquire(self, number: int | None) -> tuple[Version, ServingSession]:
        with self._changed:
            ready = {n: v for n, v in self._managed.items() if v.session}
            version = ready.get(max(ready, default=0) if number is None else number)
            if version is None or version.session is None:
                raise not_found(self.name, number)
            version.in_use += 1
            return version, version.session

    def _load(self, version: Version) -> None:
        with self._changed:
            version.state, version.retry_at = ModelVersionStatus.LOADING, None
            version.tries += 1
            self._changed.notify_all()
        try:
            session = self._load_at(version.path)
        except StatusError as error:
            self._note_failure(version, error)
            return
        except Exception as error:  # whatever one model does, the others are served on
            _logger.exception("%s: version %d", self.name, version.number)
            self._note_failure(version, StatusError(grpc.StatusCode.UNKNOWN, str(error)))
            return
        with self._changed:
            version.state, version.session = ModelVersionStatus.AVAILABLE, session
            version.failure = None
            self._changed.notify_all()
        _logger.info("%s: version %d loaded from %s", self.name, version.number, version.path)

    def _note_failure(self, version: Version, error: StatusError) -> None:
        _logger.error("%s: version %d does not load: %s", self.name, version.number, error)
        with self._changed:
            version.failure = error
            if version.tries > self._retries.max_num:
                version.state = ModelVersionStatus.END
            else:
                version.retry_at = time.monotonic() + self._retries.interval_s
            self._changed.notify_all()

    def _unload(self, version: Version) -> None:
        with self._changed:
            # Taken out first, so that no new request gets it while the ones under way finish.
            session, version.session = version.session, None
            version.state = ModelVersionStatus.UNLOADING
            self._changed.notify_all()
            self._changed.wait_for(lambda: version.in_use == 0)
        if session is not None:
            session.close()
        with self._changed:
            version.state = ModelVersionStatus.END
            del self._managed[version.number]
            self._changed.notify_all()
        _logger.info("%s: version %d unloaded", self.name, version.number)


def no_versions(name: str, base_path: str) -> str:
    """What TensorFlow Serving says of a base path without versions."""
    return (
        f"No versions of servable {name} found under base path {base_path}. Did you forget to "
        "name your leaf directory as a number (eg. '/1/')?"
    )


def absent_version(name: str, number: int) -> str:
    """What TensorFlow Serving says of a version that a policy names and nobody put there."""
    return (
        f"Version {number} of servable {name}, which was requested to be served as a 'specific' "
        "version in the servable's version policy, was not found in the file system."
    )


def not_found(name: str, number: int | None) -> StatusError:
    """The error for a model, or a version of one, that nothing available answers to."""
    request = f"Latest({name})" if number is None else f"Specific({name}, {number})"
    message = f"Servable not found for request: {request}"
    return StatusError(grpc.StatusCode.NOT_FOUND, message)
