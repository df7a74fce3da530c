"""All models of a server: base paths looked at in one round, versions loaded one by one."""

import logging
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from ..version_folders import list_versions
from .labels import Labels
from .model import Retries, ServedModel, Version, absent_version, no_versions, not_found
from .running import ServingSession
from .versions import absent_versions, aspired_versions

_logger = logging.getLogger("keras_mrl_serving.server")
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
