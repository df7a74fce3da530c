"""The models of a server: which of their versions are loaded and unloaded, and when.

The versions that a model's policy asks for are its aspired versions. Which one is loaded or
unloaded next follows TensorFlow Serving's AvailabilityPreservingPolicy: an old version serves until
a new one does. A version that does not load is tried again some times, while it stays aspired.
"""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from tensorflow_serving.apis.get_model_status_pb2 import ModelVersionStatus

from ..saved_model import list_versions, no_versions
from .log import logger
from .run import ServingSession
from .status import StatusError, failed_precondition, invalid_argument, stopped


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
    """One life of a version, which begins when it is aspired and ends when it is unloaded.

    `state` is a `ModelVersionStatus.State`; `session` is there exactly while the version is
    available, and `retired` from then on until it is unloaded; `failure` is that of the last try,
    and `retry_at` the time of the next one.
    """

    number: int
    path: str
    state: int = ModelVersionStatus.START
    failure: StatusError | None = None
    session: ServingSession | None = None
    retired: ServingSession | None = None
    in_use: int = 0
    is_aspired: bool = True
    tries: int = 0
    retry_at: float | None = None

    @property
    def error(self) -> StatusError | None:
        """Why it did not load, after the last try; END without an error means unloaded."""
        return self.failure if self.state == ModelVersionStatus.END else None


class Models:
    """The models of a server.

    `poll`, `settle` and `close` do all loading and unloading, one thread at a time. The other
    methods may be called by any thread at any time.

    Args:
        load: opens the version at a path.
        retries: how often versions that do not load are tried again.
        clock: the time in seconds.

    Attributes:
        labels: the versions that labels stand for.
        changed: held for every change of a version's state, and notified of it.
    """

    def __init__(
        self,
        load: Callable[[str], ServingSession],
        retries: Retries,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.labels = Labels()
        self.changed = threading.Condition()
        self._load = load
        self._retries = retries
        self._clock = clock
        # Reentrant: a signal's handler may close what the thread it interrupts is closing.
        self._managing = threading.RLock()
        self._models: dict[str, ServedModel] = {}
        self._configs: tuple[Any, ...] = ()
        self._left_out: set[str] = set()
        self._problems: dict[str, str] = {}
        self._is_closed = False

    def watch(self, configs: Iterable[Any]) -> dict[str, frozenset[Version]]:
        """Sets which models are served; the next `poll` acts upon it.

        Args:
            configs: the `ModelConfig` of each model.

        Returns:
            the models that were not served before, each with the versions it had before.
        """
        with self.changed:
            before = {config.name for config in self._configs}
            self._configs = tuple(configs)
            names = [config.name for config in self._configs]
            self._left_out |= before.difference(names)
            for name in names:
                if name not in self._models:
                    self._models[name] = ServedModel(
                        name, self._load, self._retries, self._clock, self.changed
                    )
            return {name: frozenset(self.versions(name)) for name in names if name not in before}

    def poll(self) -> None:
        """Reads the base paths, then loads and unloads what has changed.

        If one base path cannot be read, the versions of all models stay as they are. Tries that
        are due are made all the same.
        """
        with self._managing:
            self._load_and_unload()
            for name, paths in self._read_base_paths().items():
                self._models[name].aspire(paths)
            self._load_and_unload()

    def settle(self) -> None:
        """Makes the tries and unloads that are due, without reading the base paths."""
        with self._managing:
            self._load_and_unload()

    def seconds_to_next_try(self) -> float | None:
        """How long until a version that did not load is tried again; None if none is."""
        with self.changed:
            times = [model.next_try() for model in self._models.values()]
        due = min((time for time in times if time is not None), default=None)
        return None if due is None else max(due - self._clock(), 0.0)

    @contextmanager
    def serving(self, name: str, number: int | None) -> Iterator[tuple[int, ServingSession]]:
        """A version and its session, which stays loaded for as long as the context lasts.

        Args:
            name: the model.
            number: the version; None means the highest available one.

        Raises:
            StatusError: NOT_FOUND, no such version is available; UNAVAILABLE, `close` came first,
                or cancelled the run.
        """
        try:
            model = self._models.get(name)
            if model is None:
                raise _not_found(name, number)
            version, session = model.acquire(number)
            try:
                yield version.number, session
            finally:
                model.release(version)
        except StatusError as error:
            is_cut_off = error.code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.NOT_FOUND)
            raise (stopped() if self._is_closed and is_cut_off else error) from error

    def versions(self, name: str) -> list[Version]:
        """Every version of a model since the server started, highest first.

        Args:
            name: the model; one that is no longer served keeps its versions.
        """
        model = self._models.get(name)
        return [] if model is None else model.versions()

    def close(self, grace_s: float | None = None) -> None:
        """Unloads everything, once the requests under way are answered; nothing loads any more.

        Args:
            grace_s: how long to wait for runs, which are cancelled, and as long again for a load
                under way. What goes on even so is left behind. None means to cancel no run, and
                to wait without limit.
        """
        self._is_closed = True
        if grace_s is not None:
            self._cancel_runs(grace_s)
        if not self._managing.acquire(timeout=-1 if grace_s is None else grace_s):
            logger.warning("A load or an unload does not end; it is left behind.")
            return
        try:
            for model in list(self._models.values()):
                model.close()
        finally:
            self._managing.release()

    def _cancel_runs(self, grace_s: float) -> None:
        """Cancels all runs under way; a version of which one goes on even so is left behind."""
        busy = [version for model in list(self._models.values()) for version in model.in_use()]
        for version in busy:
            if session := version.session or version.retired:
                session.cancel()
        with self.changed:
            self.changed.wait_for(lambda: not any(v.in_use for v in busy), grace_s)
            for version in busy:
                if version.in_use:
                    logger.warning("A run on %s does not end; it is left behind.", version.path)
                    version.session = None

    def _read_base_paths(self) -> Mapping[str, Mapping[int, str]]:
        """The aspired versions of each model; of none if a base path cannot be read."""
        with self.changed:
            configs = self._configs
        aspired = {}
        for config in configs:
            try:
                versions = list_versions(config.base_path)
            except (OSError, ValueError) as error:  # ValueError: the text can be no path at all
                reason = getattr(error, "strerror", None) or error
                self._warn(config.name, f"base path {config.base_path} cannot be read: {reason}")
                return {}
            aspired[config.name] = aspired_versions(versions, config.model_version_policy)
            self._warn(config.name, _shortage(config, versions, aspired[config.name]))
        return aspired

    def _warn(self, name: str, problem: str) -> None:
        """Logs the problem of a model when it is new, and not at every poll."""
        if problem and problem != self._problems.get(name):
            logger.warning("%s: %s", name, problem)
        self._problems[name] = problem

    def _load_and_unload(self) -> None:
        with self.changed:
            left_out, self._left_out = self._left_out, set()
            models = list(self._models.values())
        for name in left_out:
            self._models[name].aspire({})
        while not self._is_closed and (
            action := _first(m.next_unload() for m in models)
            or _first(m.next_load() for m in models)
        ):
            action()


class ServedModel:
    """The versions of one model.

    `aspire`, `next_unload`, `next_load` and `close` are called by one thread at a time and do all
    loading and unloading; the other methods may be called by any.

    Args:
        name: the name of the model in requests.
        load: opens the version at a path.
        retries: how often versions that do not load are tried again.
        clock: the time in seconds.
        changed: held for every change of a version's state, and notified of it.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[str], ServingSession],
        retries: Retries,
        clock: Callable[[], float],
        changed: threading.Condition,
    ) -> None:
        self.name = name
        self._load_at = load
        self._retries = retries
        self._clock = clock
        self._changed = changed
        self._listed: dict[int, Version] = {}  # every version since the start
        self._managed: dict[int, Version] = {}  # those aspired, and those still to be unloaded

    def aspire(self, paths: Mapping[int, str]) -> None:
        """Sets which versions are to be served.

        Nothing changes while `paths` names a version that is being replaced, as in TensorFlow
        Serving: the new versions are not given up for it, and are tried again as before.

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
                self._managed[number] = self._listed[number] = version
            self._changed.notify_all()

    def next_unload(self) -> Callable[[], None] | None:
        """The unload that is due: of the lowest version that is no longer aspired.

        The last available version stays while an aspired one is still to come.
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
        """The load that is due: of the highest version not yet tried, else to be tried again."""
        now = self._clock()
        new = [v for v in self._managed.values() if v.state == ModelVersionStatus.START]
        due = [v for v in self._managed.values() if v.retry_at is not None and v.retry_at <= now]
        if not new and not due:
            return None
        highest = max(new or due, key=lambda version: version.number)
        return lambda: self._load(highest)

    def next_try(self) -> float | None:
        """When a version that did not load is tried again, on the clock."""
        with self._changed:
            times = [v.retry_at for v in self._managed.values() if v.retry_at is not None]
        return min(times, default=None)

    def acquire(self, number: int | None) -> tuple[Version, ServingSession]:
        """A version and its session, which stays loaded until `release`; see `Models.serving`."""
        with self._changed:
            ready = {n: v for n, v in self._managed.items() if v.session}
            version = ready.get(max(ready, default=0) if number is None else number)
            if version is None or version.session is None:
                raise _not_found(self.name, number)
            version.in_use += 1
            return version, version.session

    def release(self, version: Version) -> None:
        """Ends one use of a version."""
        with self._changed:
            version.in_use -= 1
            self._changed.notify_all()

    def versions(self) -> list[Version]:
        """Every version since the server started, highest first."""
        with self._changed:
            return sorted(self._listed.values(), key=lambda v: v.number, reverse=True)

    def in_use(self) -> list[Version]:
        """The versions that answer requests right now."""
        with self._changed:
            return [version for version in self._managed.values() if version.in_use]

    def close(self) -> None:
        """Unloads everything, once the requests under way are answered."""
        self.aspire({})
        while unload := self.next_unload():
            unload()

    def _load(self, version: Version) -> None:
        with self._changed:
            version.state, version.retry_at = ModelVersionStatus.LOADING, None
            version.tries += 1
            self._changed.notify_all()
        try:
            session = self._load_at(version.path)
        except StatusError as error:
            self._fail(version, error)
            return
        except Exception as error:  # a version may break in any way; the other models must go on
            logger.exception("%s: version %d", self.name, version.number)
            self._fail(version, StatusError(grpc.StatusCode.UNKNOWN, str(error)))
            return
        with self._changed:
            version.state, version.session = ModelVersionStatus.AVAILABLE, session
            version.failure = None
            self._changed.notify_all()
        logger.info("%s: version %d loaded from %s", self.name, version.number, version.path)

    def _fail(self, version: Version, error: StatusError) -> None:
        logger.error("%s: version %d does not load: %s", self.name, version.number, error)
        with self._changed:
            version.failure = error
            if version.tries > self._retries.max_num:
                version.state = ModelVersionStatus.END
            else:
                version.retry_at = self._clock() + self._retries.interval_s
            self._changed.notify_all()

    def _unload(self, version: Version) -> None:
        with self._changed:
            # Taken out first, so that no new request gets it while the ones under way finish.
            session, version.session = version.session, None
            version.retired = session
            version.state = ModelVersionStatus.UNLOADING
            self._changed.notify_all()
            self._changed.wait_for(lambda: version.in_use == 0)
        if session is not None:
            session.close()
        with self._changed:
            version.retired = None
            version.state = ModelVersionStatus.END
            self._managed.pop(version.number, None)  # gone already if a signal's handler closed
            self._changed.notify_all()
        logger.info("%s: version %d unloaded", self.name, version.number)


class Labels:
    """The versions that labels stand for; a model config sets them, and nothing else does."""

    def __init__(self) -> None:
        self._numbers: Mapping[str, Mapping[str, int]] | None = None  # by model, then by label

    def version(self, name: str, label: str) -> int:
        """The version that a label stands for.

        Args:
            name: the model.
            label: one of its labels.

        Raises:
            StatusError: UNAVAILABLE before the first config, INVALID_ARGUMENT for no such label.
        """
        if self._numbers is None:
            raise StatusError(
                grpc.StatusCode.UNAVAILABLE, f"Model labels does not init yet.{label}"
            )
        number = self._numbers.get(name, {}).get(label)
        if number is None:
            raise invalid_argument(f"Unrecognized servable version label: {label}")
        return number

    def assign(
        self, configs: Iterable[Any], is_available: Callable[[str, int], bool], allow_new: bool
    ) -> None:
        """Replaces all labels by those of a config, or raises and replaces none.

        Args:
            configs: the `ModelConfig` of each model.
            is_available: whether a version of a model is available.
            allow_new: whether a label that stood for no version yet may stand for one that is not
                available.

        Raises:
            StatusError: FAILED_PRECONDITION, a label may not stand for its version.
        """
        before = self._numbers or {}
        numbers = {}
        for config in configs:
            for label, number in config.version_labels.items():
                moves = before.get(config.name, {}).get(label, number) != number
                if (moves or not allow_new) and not is_available(config.name, number):
                    raise failed_precondition(
                        f"Request to assign label to version {number} of model {config.name}, "
                        "which is not currently available for inference"
                    )
            numbers[config.name] = dict(config.version_labels)
        self._numbers = numbers  # in one step, as requests read it meanwhile


def aspired_versions(paths: Mapping[int, str], policy: Any) -> dict[int, str]:
    """The versions under a base path that a policy asks for.

    Args:
        paths: paths by version.
        policy: a `ServableVersionPolicy`; an empty one asks for the highest version.
    """
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return dict(paths)
    if choice == "specific":
        return {number: paths[number] for number in policy.specific.versions if number in paths}
    count = max(policy.latest.num_versions, 1)
    return {number: paths[number] for number in sorted(paths)[-count:]}


def absent_versions(paths: Mapping[int, str], policy: Any) -> list[int]:
    """The versions that a policy names and a base path lacks, ascending.

    Args:
        paths: paths by version.
        policy: a `ServableVersionPolicy`.
    """
    return sorted(set(policy.specific.versions) - paths.keys())


def absent_version(name: str, number: int) -> str:
    """TensorFlow Serving's text about a version that a policy names and the base path lacks."""
    return (
        f"Version {number} of servable {name}, which was requested to be served as a 'specific' "
        "version in the servable's version policy, was not found in the file system."
    )


def _shortage(config: Any, paths: Mapping[int, str], aspired: Collection[int]) -> str:
    if not aspired:
        return no_versions(config.name, config.base_path)
    absent = absent_versions(paths, config.model_version_policy)
    return " ".join(absent_version(config.name, number) for number in absent)


def _first(actions: Iterable[Callable[[], None] | None]) -> Callable[[], None] | None:
    return next((action for action in actions if action is not None), None)


def _not_found(name: str, number: int | None) -> StatusError:
    request = f"Latest({name})" if number is None else f"Specific({name}, {number})"
    message = f"Servable not found for request: {request}"
    return StatusError(grpc.StatusCode.NOT_FOUND, message)
