"""The config of a server put in place of the one before, as HandleReloadConfigRequest does it."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import grpc
from tensorflow_serving.apis.get_model_status_pb2 import ModelVersionStatus
from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

from .config import (
    check_logging,
    check_models,
    check_no_platform_changes,
    check_platforms,
    custom_config,
)
from .manager import Models
from .model import Version
from .status import StatusError

_LOOK_S = 0.1
_DONE = (ModelVersionStatus.AVAILABLE, ModelVersionStatus.END)
Awaited = Mapping[str, frozenset[Version]]


class Configuration:
    """The config that a server's models, policies and labels come from.

    Args:
        models: the models of the server.
        allow_labels_for_unavailable: whether a new label may stand for a version that is not
            available.
        wake: has somebody poll, soon.
    """

    def __init__(
        self,
        models: Models,
        *,
        allow_labels_for_unavailable: bool = False,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._models = models
        self._allow_labels = allow_labels_for_unavailable
        self._wake = wake
        self._reloading = threading.Lock()
        self._config: Any = ModelServerConfig()
        self._is_closed = False

    def reload(self, config: Any, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Replaces the config, and waits until the models it adds are available.

        Neither unloads nor versions of models that were served before are waited for. One reload
        waits for the one before.

        Args:
            config: a `ModelServerConfig`.
            is_wanted: whether anybody still waits for the end.

        Raises:
            StatusError: the code and the text TensorFlow Serving would send.
        """
        while not self._reloading.acquire(timeout=_LOOK_S):
            self._check_wanted(is_wanted)
        try:
            awaited = self.apply(config)
            self._wake()
            self.wait(awaited, is_wanted)
            check_logging(config)
        finally:
            self._reloading.release()

    def apply(self, config: Any) -> Awaited:
        """Replaces the config; a later poll loads and unloads what that means.

        Args:
            config: a `ModelServerConfig`.

        Returns:
            the models it adds, to be waited for.

        Raises:
            StatusError: it cannot be; a label that cannot be set or a platform that is not served
                is found once the config has been stored.
        """
        kind, before = config.WhichOneof("config"), self._config.WhichOneof("config")
        if before is not None and kind != "model_config_list":
            raise StatusError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "Cannot transition to requested config. It is only legal to transition from one "
                "ModelConfigList to another.",
            )
        if kind is None:
            return {}
        if kind != "model_config_list":
            raise custom_config()
        check_models(config)
        check_no_platform_changes(self._config, config)
        self._config = config
        configs = config.model_config_list.config
        self._models.labels.assign(configs, self._is_available, self._allow_labels)
        check_platforms(config)
        return self._models.watch(configs)

    def wait(self, awaited: Awaited, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Waits until each model has a version that is available, or one that did not load.

        Args:
            awaited: what `apply` returned.
            is_wanted: whether anybody still waits for the end.

        Raises:
            StatusError: UNKNOWN, some did not load.
        """
        with self._models.changed:
            while None in (reached := [self._reached(*item) for item in sorted(awaited.items())]):
                self._check_wanted(is_wanted)
                self._models.changed.wait(_LOOK_S)
        failed = [
            f"{{{{name: {name} version: {version.number}}} due to error: "
            f"{version.error.code.name}: {version.error.message}}}, "
            for name, version in zip(sorted(awaited), reached, strict=True)
            if version is not None and version.error is not None
        ]
        if failed:
            raise StatusError(
                grpc.StatusCode.UNKNOWN,
                f"{len(failed)} model(s) did not become available: {{{''.join(failed)}}}",
            )

    def close(self) -> None:
        """Ends the waits under way, as the server stops."""
        self._is_closed = True

    def _reached(self, name: str, known: frozenset[Version]) -> Version | None:
        """The highest version met since that came to an end of its loading, good or bad."""
        versions = self._models.versions(name)
        return next((v for v in versions if v not in known and v.state in _DONE), None)

    def _is_available(self, name: str, number: int) -> bool:
        return any(
            version.number == number and version.state == ModelVersionStatus.AVAILABLE
            for version in self._models.versions(name)
        )

    def _check_wanted(self, is_wanted: Callable[[], bool]) -> None:
        if self._is_closed or not is_wanted():
            raise StatusError(grpc.StatusCode.CANCELLED, "Nobody waits for the reload any more.")
