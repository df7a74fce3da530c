"""Base paths whose versions compute nothing, and the models of a server that serves them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from google.protobuf import text_format
from tensorflow_serving.apis.get_model_status_pb2 import ModelVersionStatus
from tensorflow_serving.config.model_server_config_pb2 import ModelConfig

from keras_mrl_serving.server.models import Models
from keras_mrl_serving.server.run import ServingSession
from keras_mrl_serving.server.status import StatusError


class Disk:
    """Base paths with versions, good and broken, and the loads and closes of these versions."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.events: list[str] = []
        self.broken: set[str] = set()

    def put(self, *names: str) -> None:
        for name in names:
            (self.root / name).mkdir(parents=True)

    def remove(self, *names: str) -> None:
        for name in names:
            (self.root / name).rmdir()

    def load(self, path: str) -> ServingSession:
        name = str(Path(path).relative_to(self.root))
        self.events.append(f"load {name}")
        if name in self.broken:
            raise StatusError(grpc.StatusCode.DATA_LOSS, f"{name} is broken")
        return IdleSession(
            lambda: self.events.append(f"close {name}"),
            lambda: self.events.append(f"cancel {name}"),
        )

    def new_events(self) -> list[str]:
        """The events since the last call."""
        events, self.events = self.events, []
        return events


class IdleSession:
    """A session that computes nothing."""

    def __init__(
        self, on_close: Callable[[], object], on_cancel: Callable[[], object] = lambda: None
    ) -> None:
        self.signatures: Mapping[str, Any] = {}
        self._on_close = on_close
        self._on_cancel = on_cancel

    def run(
        self,
        signature_name: str,
        inputs: Mapping[str, np.ndarray],
        output_names: Sequence[str] = (),
        *,
        timeout_s: float | None = None,
    ) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def cancel(self) -> None:
        self._on_cancel()

    def close(self) -> None:
        self._on_close()


class Clock:
    """The time as a test sets it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def config(disk: Disk, name: str, policy: str = "") -> Any:
    model = ModelConfig(name=name, base_path=str(disk.root / name))
    text_format.Parse(policy, model.model_version_policy)
    return model


def states(models: Models, name: str = "m") -> str:
    return " ".join(
        f"{version.number}:{ModelVersionStatus.State.Name(version.state)}"
        for version in models.versions(name)
    )
