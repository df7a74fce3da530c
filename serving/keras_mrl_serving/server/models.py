"""One served model: which of its versions is loaded or unloaded next, and who uses which."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from tensorflow_serving.apis.get_model_status_pb2 import ModelVersionStatus

from ..saved_model import list_versions
from .run import ServingSession
from .status import StatusError, invalid_argument

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


# Labels: names of versions, set by a model config and by nothing else.


class Labels:
    """Which version each label of each model stands for."""

    def __init__(self) -> None:
        self._versions: Mapping[str, Mapping[str, int]] | None = None

    def version(self, name: str, label: str) -> int:
        """The version behind a label.

        Args:
            name: the model.
            label: one of its labels.

        Raises:
            StatusError: UNAVAILABLE before the first config, INVALID_ARGUMENT for no such label.
        """
        if self._versions is None:
            raise StatusError(
                grpc.StatusCode.UNAVAILABLE, f"Model labels does not init yet.{label}"
            )
        number = self._versions.get(name, {}).get(label)
        if number is None:
            raise invalid_argument(f"Unrecognized servable version label: {label}")
        return number

    def assign(
        self, configs: Iterable[Any], is_available: Callable[[str, int], bool], allow_new: bool
    ) -> None:
        """Replaces all labels by those of a config, or none of them.

        Args:
            configs: the `ModelConfig` of each model.
            is_available: whether a version of a model is.
            allow_new: whether a label that did not stand for another version yet may stand for
                one that is not available.

        Raises:
            StatusError: FAILED_PRECONDITION, a label may not stand for its version.
        """
        before = self._versions or {}
        versions = {}
        for config in configs:
            for label, number in config.version_labels.items():
                moves = before.get(config.name, {}).get(label, number) != number
                if (moves or not allow_new) and not is_available(config.name, number):
                    raise StatusError(
                        grpc.StatusCode.FAILED_PRECONDITION,
                        f"Request to assign label to version {number} of model {config.name}, "
                        "which is not currently available for inference",
                    )
            versions[config.name] = dict(config.version_labels)
        self._versions = versions  # in one step, as requests read it meanwhile


# Which of the versions that stand under a model's base path are to be served.


def aspired_versions(found: Mapping[int, str], policy: Any) -> dict[int, str]:
    """The versions a policy asks for, among those that were found.

    Args:
        found: paths by version.
        policy: a `ServableVersionPolicy`; an empty one asks for the highest version.
    """
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return dict(found)
    if choice == "specific":
        return {number: found[number] for number in policy.specific.versions if number in found}
    count = max(policy.latest.num_versions, 1)
    return {number: found[number] for number in sorted(found)[-count:]}


def absent_versions(found: Mapping[int, str], policy: Any) -> list[int]:
    """The versions a policy asks for by number that were not found, ascending.

    Args:
        found: paths by version.
        policy: a `ServableVersionPolicy`.
    """
    return sorted(set(policy.specific.versions) - found.keys())


# All models of a server: base paths looked at in one round, versions loaded one by one.

_DEFAULT_RETRIES = Retries()


class Models:
    """The models of a server.

    `poll`, `settle` and `close` do all loading and unloading, one thread after the other;
    everything else answers any thread at once.

    Args:
        load: opens the version at a path.
        retries: what happens to versions that do not load.

    Attributes:
        labels: which versions the labels of the models stand for.
        changed: is held for every change of a version's state, and notified of it.
    """

    def __init__(
        self, load: Callable[[str], ServingSession], retries: Retries = _DEFAULT_RETRIES
    ) -> None:
        self.labels = Labels()
        self.changed = threading.Condition()
        self._load = load
        self._retries = retries
        # A signal's handler may close what the thread it interrupts is closing.
        self._managing = threading.RLock()
        self._models: dict[str, ServedModel] = {}
        self._watched: tuple[Any, ...] = ()
        self._left_out: set[str] = set()
        self._said: dict[str, str] = {}

    def watch(self, configs: Iterable[Any]) -> dict[str, frozenset[Version]]:
        """Says which models are served from now on; the next `poll` acts upon it.

        Args:
            configs: the `ModelConfig` of each model.

        Returns:
            the models that were not served before, with the loads of each that were met before.
        """
        with self.changed:
            before = {config.name for config in self._watched}
            self._watched = tuple(configs)
            names = [config.name for config in self._watched]
            self._left_out |= before.difference(names)
            for name in names:
                if name not in self._models:
                    model = ServedModel(name, self._load, self._retries, self.changed)
                    self._models[name] = model
            return {name: frozenset(self.versions(name)) for name in names if name not in before}

    def poll(self) -> None:
        """Brings what is served in line with what stands under the base paths.

        One base path that cannot be read leaves all models as they are. Tries that are due are
        made all the same.
        """
        with self._managing:
            self._settle()
            for name, paths in self._look().items():
                self._models[name].aspire(paths)
            self._settle()

    def settle(self) -> None:
        """Does what is left to do without a look at the base paths: due tries, and unloads."""
        with self._managing:
            self._settle()

    def next_try(self) -> float | None:
        """When a version that did not load is tried again, on the monotonic clock."""
        with self.changed:
            times = [model.next_try() for model in self._models.values()]
        return min((time for time in times if time is not None), default=None)

    def serving(
        self, name: str, number: int | None
    ) -> AbstractContextManager[tuple[int, ServingSession]]:
        """A version and its session, which stays loaded for as long as the context does.

        Args:
            name: the model.
            number: the version, or None for the highest available one.

        Raises:
            StatusError: NOT_FOUND, nothing available answers to them.
        """
        model = self._models.get(name)
        if model is None:
            raise not_found(name, number)
        return model.serving(number)

    def versions(self, name: str) -> list[Version]:
        """Every version of a model met in the life of the server, highest first.

        Args:
            name: the model; one that is not served any more keeps its versions.
        """
        model = self._models.get(name)
        return [] if model is None else model.versions()

    def close(self) -> None:
        """Unloads everything, once the requests under way are answered."""
        with self._managing:
            for model in list(self._models.values()):
                model.close()

    def _look(self) -> Mapping[str, Mapping[int, str]]:
        """The versions to serve of each model; of none where a base path cannot be read."""
        with self.changed:
            watched = self._watched
        aspired = {}
        for config in watched:
            try:
                found = list_versions(config.base_path)
            except (OSError, ValueError) as error:  # a path may hold what no path can
                why = getattr(error, "strerror", None) or error
                problem = f"base path {config.base_path} cannot be read: {why}"
                self._say(config.name, problem)
                return {}
            aspired[config.name] = aspired_versions(found, config.model_version_policy)
            self._say(config.name, _shortage(config, found, aspired[config.name]))
        return aspired

    def _say(self, name: str, problem: str) -> None:
        """Logs a problem of a model once, not at every look."""
        if problem and problem != self._said.get(name):
            _logger.warning("%s: %s", name, problem)
        self._said[name] = problem

    def _settle(self) -> None:
        with self.changed:
            left_out, self._left_out = self._left_out, set()
            models = list(self._models.values())
        for name in left_out:
            self._models[name].aspire({})
        while action := _first(m.next_unload() for m in models) or _first(
            m.next_load() for m in models
        ):
            action()


def _first(actions: Iterable[Callable[[], None] | None]) -> Callable[[], None] | None:
    return next((action for action in actions if action is not None), None)


def _shortage(config: Any, found: Mapping[int, str], aspired: Collection[int]) -> str:
    if not aspired:
        return no_versions(config.name, config.base_path)
    absent = absent_versions(found, config.model_version_policy)
    return " ".join(absent_version(config.name, number) for number in absent)
