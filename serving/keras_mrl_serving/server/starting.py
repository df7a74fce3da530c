"""The first config of a server, and its first versions: what is wrong with them ends the start."""

from typing import Any

import grpc

from ..version_folders import list_versions
from .config import check_logging
from .manager import Models
from .model import absent_version, no_versions
from .reload import Configuration
from .status import StatusError
from .versions import absent_versions, aspired_versions


def apply_first(configuration: Configuration, config: Any, path: str) -> None:
    """Puts the first config in place.

    Args:
        configuration: of the server that starts.
        config: its `ModelServerConfig`.
        path: where the config comes from.

    Raises:
        ValueError: TensorFlow Serving would not start with it.
    """
    try:
        configuration.apply(config)
        check_logging(config)
    except StatusError as error:
        remedy = "Correct the file."
        if error.code is grpc.StatusCode.FAILED_PRECONDITION:
            remedy = (
                "At the start none is yet: leave the label out until a later reload, or give "
                "allow_version_labels_for_unavailable_models."
            )
        raise ValueError(
            "The config of the models must be one that can be served. Received: "
            f"{path!r}, {error.code.name}: {error.message}. {remedy}"
        ) from error


def load_first_versions(models: Models, config: Any) -> None:
    """Loads what the config asks for, all of which must be there.

    TensorFlow Serving waits for base paths and versions that are not there, and tries a version
    that does not load for five minutes; here that ends the start at once.

    Args:
        models: the models of the server.
        config: the `ModelServerConfig` it starts with.

    Raises:
        FileNotFoundError: a base path is no folder, or holds no version.
        RuntimeError: a version does not load.
    """
    for model in config.model_config_list.config:
        _check_has_versions(model)
    models.poll()
    for model in config.model_config_list.config:
        newest = models.versions(model.name)[0]
        if newest.failure is not None:
            raise RuntimeError(
                f"The highest version must load. Received: version {newest.number} of model "
                f"{model.name}, {newest.failure.code.name}: {newest.failure.message.rstrip('.')}. "
                "Export it again, or remove it so that a lower one is served."
            )


def _check_has_versions(model: Any) -> None:
    path = model.base_path
    try:
        found = list_versions(path)
    except (OSError, ValueError) as error:  # a path may hold what no path can
        why = getattr(error, "strerror", None) or error
        raise FileNotFoundError(
            f"base_path must be a folder that can be read. Received: base_path={path!r} "
            f"({why}). Export a model to {path}/1 first, or correct the path."
        ) from error
    if aspired_versions(found, model.model_version_policy):
        return
    if found:
        absent = absent_version(model.name, absent_versions(found, model.model_version_policy)[0])
        raise FileNotFoundError(
            f"A specific version must stand under base_path. Received: {absent} "
            f"Name one of {', '.join(map(str, sorted(found)))}, or leave the policy out."
        )
    raise FileNotFoundError(
        f"base_path must hold a version of the model. Received: "
        f"{no_versions(model.name, path)} Put the SavedModel at {path}/1, or give the folder "
        "above the numbered one."
    )
