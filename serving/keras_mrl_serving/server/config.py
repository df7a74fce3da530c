"""ModelServerConfig: where it comes from, what TensorFlow Serving refuses, and how it is reloaded.

A reload replaces the whole config, as HandleReloadConfigRequest does: a model that is left out is
unloaded.
"""

import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

import grpc
from tensorflow_serving.apis.get_model_status_pb2 import ModelVersionStatus
from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig, ModelType

from .models import Models, Version
from .status import StatusError, failed_precondition, invalid_argument
from .text_proto import TextProtoFile

_PLATFORM = "tensorflow"
_ABSOLUTE = re.compile(r"/|[a-zA-Z][0-9a-zA-Z.]*://")
_LOADED_OR_FAILED = (ModelVersionStatus.AVAILABLE, ModelVersionStatus.END)
Awaited = Mapping[str, frozenset[Version]]


def read_config(path: str) -> Any:
    """The `ModelServerConfig` of a file.

    Args:
        path: a text proto.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no text proto of ModelServerConfig.
    """
    example = (
        'model_config_list { config { name: "m" base_path: "/models/m" '
        'model_platform: "tensorflow" } }'
    )
    return TextProtoFile("model_config_file", path, ModelServerConfig(), example).read()


def single_model(name: str, base_path: str) -> Any:
    """The `ModelServerConfig` that --model_name and --model_base_path stand for.

    Args:
        name: the name of the model in requests.
        base_path: the folder whose numeric children are the versions.
    """
    config = ModelServerConfig()
    config.model_config_list.config.add(name=name, base_path=base_path, model_platform=_PLATFORM)
    return config


class Configuration:
    """The config that a server's models, policies and labels come from.

    Args:
        models: the models of the server.
        allow_labels_for_unavailable: whether a new label may stand for a version that is not
            available.
        wake: makes another thread call `Models.poll` soon.
        check_interval_s: how often a reload that waits checks whether its caller still does.
    """

    def __init__(
        self,
        models: Models,
        *,
        allow_labels_for_unavailable: bool = False,
        wake: Callable[[], None] = lambda: None,
        check_interval_s: float = 0.1,
    ) -> None:
        self._models = models
        self._allow_labels = allow_labels_for_unavailable
        self._wake = wake
        self._check_interval_s = check_interval_s
        self._reloading = threading.Lock()
        self._config: Any = ModelServerConfig()
        self._is_closed = False

    def reload(self, config: Any, is_active: Callable[[], bool] = lambda: True) -> None:
        """Replaces the config, and waits until the models it adds are available.

        It waits neither for unloads nor for versions of models that were served before. A reload
        begins when the one before it has ended.

        Args:
            config: a `ModelServerConfig`.
            is_active: whether the caller still waits.

        Raises:
            StatusError: the code and the text TensorFlow Serving would send.
        """
        while not self._reloading.acquire(timeout=self._check_interval_s):
            self._check_active(is_active)
        try:
            awaited = self.apply(config)
            self._wake()
            self.wait(awaited, is_active)
            check_logging(config)
        finally:
            self._reloading.release()

    def apply(self, config: Any) -> Awaited:
        """Replaces the config; the next `Models.poll` loads and unloads accordingly.

        Args:
            config: a `ModelServerConfig`.

        Returns:
            the models that the config adds, for `wait`.

        Raises:
            StatusError: the config is refused. It is stored all the same if the reason is a label
                or an unsupported platform.
        """
        kind, kind_before = config.WhichOneof("config"), self._config.WhichOneof("config")
        if kind_before is not None and kind != "model_config_list":
            raise failed_precondition(
                "Cannot transition to requested config. It is only legal to transition from one "
                "ModelConfigList to another."
            )
        if kind is None:
            return {}
        if kind != "model_config_list":
            raise invalid_argument("ModelServer does not yet support custom model config.")
        _check_names_and_paths(config)
        _check_no_platform_changes(self._config, config)
        self._config = config
        configs = config.model_config_list.config
        self._models.labels.assign(configs, self._is_available, self._allow_labels)
        _check_platforms(config)
        return self._models.watch(configs)

    def wait(self, awaited: Awaited, is_active: Callable[[], bool] = lambda: True) -> None:
        """Waits until each model has a version that is available, or that did not load.

        Args:
            awaited: the models, as `apply` returned them.
            is_active: whether the caller still waits.

        Raises:
            StatusError: UNKNOWN, some models did not load; CANCELLED, the caller waits no longer.
        """
        names = sorted(awaited)
        with self._models.changed:
            while None in (versions := [self._new_version(n, awaited[n]) for n in names]):
                self._check_active(is_active)
                self._models.changed.wait(self._check_interval_s)
        failures = [
            f"{{{{name: {name} version: {version.number}}} due to error: "
            f"{version.error.code.name}: {version.error.message}}}, "
            for name, version in zip(names, versions, strict=True)
            if version is not None and version.error is not None
        ]
        if failures:
            raise StatusError(
                grpc.StatusCode.UNKNOWN,
                f"{len(failures)} model(s) did not become available: {{{''.join(failures)}}}",
            )

    def close(self) -> None:
        """Ends the waits under way, as the server stops."""
        self._is_closed = True

    def _new_version(self, name: str, earlier: frozenset[Version]) -> Version | None:
        """The highest version that was loaded, or failed to load, after the earlier ones."""
        versions = self._models.versions(name)
        done = (v for v in versions if v not in earlier and v.state in _LOADED_OR_FAILED)
        return next(done, None)

    def _is_available(self, name: str, number: int) -> bool:
        return any(
            version.number == number and version.state == ModelVersionStatus.AVAILABLE
            for version in self._models.versions(name)
        )

    def _check_active(self, is_active: Callable[[], bool]) -> None:
        if self._is_closed or not is_active():
            raise StatusError(grpc.StatusCode.CANCELLED, "Nobody waits for the reload any more.")


def check_logging(config: Any) -> None:
    """Refuses request logging, for which TensorFlow Serving's own binary has no writer either.

    Args:
        config: a `ModelServerConfig`.

    Raises:
        StatusError: INVALID_ARGUMENT.
    """
    if any(model.HasField("logging_config") for model in config.model_config_list.config):
        raise invalid_argument("No request-logger-creator provided.")


def _check_names_and_paths(config: Any) -> None:
    names = set()
    for model in config.model_config_list.config:
        if model.name in names:
            raise invalid_argument(
                f"Illegal to list model {model.name} multiple times in config list"
            )
        names.add(model.name)
    for model in config.model_config_list.config:
        if not _ABSOLUTE.match(model.base_path):
            raise invalid_argument(
                f"Expected model {model.name} to have an absolute path or URI; "
                f"got base_path()={model.base_path}"
            )


def _check_no_platform_changes(old: Any, new: Any) -> None:
    """Refuses a model that changes its platform, and any model if the old config has none."""
    before = {model.name: _platform(model) for model in old.model_config_list.config}
    for model in new.model_config_list.config:
        if model.name in before and (platform := _platform(model)) != before[model.name]:
            raise invalid_argument(
                f"Illegal to change a model's platform. For model {model.name} platform was "
                f"{before[model.name]} and new platform requested is {platform}"
            )


def _check_platforms(config: Any) -> None:
    for model in config.model_config_list.config:
        if (platform := _platform(model)) != _PLATFORM:
            raise invalid_argument(f"Model {model.name} requests unsupported platform {platform}")


def _platform(model: Any) -> str:
    deprecated, fields = model.model_type, "ModelServerConfig::model_type (deprecated)"
    if deprecated and model.model_platform:
        raise invalid_argument(
            f"Illegal setting both {fields} and ModelServerConfig::model_platform."
        )
    if deprecated and deprecated != ModelType.TENSORFLOW:
        raise invalid_argument(f"ModelServerConfig::model_type choice {deprecated} not supported.")
    if not deprecated and not model.model_platform:
        raise invalid_argument(
            f"Illegal setting neither {fields} nor ModelServerConfig::model_platform, "
            f"model name is {model.name}"
        )
    return _PLATFORM if deprecated else str(model.model_platform)
