"""ModelServerConfig: read from a file or made of two flags, and what TensorFlow Serving refuses."""

import re
from typing import Any

from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig, ModelType

from .status import StatusError, invalid_argument
from .text_protos import read_text_proto

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
