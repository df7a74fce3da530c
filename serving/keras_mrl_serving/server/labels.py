"""Labels: names of versions, set by a model config and by nothing else."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import grpc

from .status import StatusError, invalid_argument


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
