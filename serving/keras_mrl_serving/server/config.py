"""ModelServerConfig: read from a file or made of two flags, and what TensorFlow Serving refuses."""

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import grpc
from tensorflow_serving.apis.get_model_status_pb2 import ModelVersionStatus
from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig, ModelType

from .models import Models, Version
from .status import StatusError, invalid_argument, read_text_proto

_PLATFORM = "tensorflow"
_ABSOLUTE = re.compile(r"/|[a-zA-Z][0-9a-zA-Z.]*://")


def read_config(path: str) -> Any:
    """The `ModelServerConfig` of a file.

    Args:
        path: file with the text of the proto.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such text.
    """
    example = (
        'model_config_list { config { name: "m" base_path: "/models/m" '
        'model_platform: "tensorflow" } }'
    )
    return read_text_proto(path, ModelServerConfig(), "model_config_file", example)


def single_model(name: str, base_path: str) -> Any:
    """The config that --model_name and --model_base_path stand for.

    Args:
        name: the name requests ask for.
        base_path: the folder whose numeric children are the versions.
    """
    config = ModelServerConfig()
    config.model_config_list.config.add(name=name, base_path=base_path, model_platform=_PLATFORM)
    return config


def check_models(config: Any) -> None:
    """Refuses models listed twice, and base paths that are relative.

    Args:
        config: a `ModelServerConfig`.

    Raises:
        StatusError: INVALID_ARGUMENT.
    """
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


def check_no_platform_changes(old: Any, new: Any) -> None:
    """Refuses a model whose platform is another than before.

    Args:
        old: the `ModelServerConfig` so far.
        new: the one to come.

    Raises:
        StatusError: INVALID_ARGUMENT; also where the old one already had no platform.
    """
    before = {model.name: _platform(model) for model in old.model_config_list.config}
    for model in new.model_config_list.config:
        if model.name in before and (now := _platform(model)) != before[model.name]:
            raise invalid_argument(
                f"Illegal to change a model's platform. For model {model.name} platform was "
                f"{before[model.name]} and new platform requested is {now}"
            )


def check_platforms(config: Any) -> None:
    """Refuses platforms other than TensorFlow.

    Args:
        config: a `ModelServerConfig`.

    Raises:
        StatusError: INVALID_ARGUMENT.
    """
    for model in config.model_config_list.config:
        if (platform := _platform(model)) != _PLATFORM:
            raise invalid_argument(f"Model {model.name} requests unsupported platform {platform}")


def check_logging(config: Any) -> None:
    """Refuses request logging, for which TensorFlow Serving's own binary has no writer either.

    Args:
        config: a `ModelServerConfig`.

    Raises:
        StatusError: INVALID_ARGUMENT.
    """
    if any(model.HasField("logging_config") for model in config.model_config_list.config):
        raise invalid_argument("No request-logger-creator provided.")


def custom_config() -> StatusError:
    """The error for a config of models in a form of somebody's own."""
    return invalid_argument("ModelServer does not yet support custom model config.")


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


# The config of a server put in place of the one before, as HandleReloadConfigRequest does it.

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


# The threads that look at base paths, and at the file of the model config, now and then.

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
