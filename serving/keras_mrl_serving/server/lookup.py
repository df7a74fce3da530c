"""What a ModelSpec asks for: the checks every request begins with."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from .._session import SavedModelSession
from .model import ServedModel, not_found
from .status import invalid_argument


def check_model_spec(request: Any) -> None:
    """Refuses a request without model_spec.

    Args:
        request: any request of TensorFlow Serving that carries one.

    Raises:
        StatusError: INVALID_ARGUMENT.
    """
    if not request.HasField("model_spec"):
        raise invalid_argument("Missing ModelSpec")


def serving(
    models: Mapping[str, ServedModel], spec: Any
) -> AbstractContextManager[tuple[int, SavedModelSession]]:
    """The version a ModelSpec names and its session, loaded for as long as the context lasts.

    Args:
        models: the served models by name.
        spec: a `ModelSpec`.

    Raises:
        StatusError: INVALID_ARGUMENT for no name or a label, NOT_FOUND for what is not available.
    """
    if not spec.name:
        raise invalid_argument("ModelSpec has no name specified.")
    choice = spec.WhichOneof("version_choice")
    if choice == "version_label":
        # Labels come from a model config only; without one each is unknown, whatever the model.
        raise invalid_argument(f"Unrecognized servable version label: {spec.version_label}")
    number = spec.version.value if choice == "version" else None
    if spec.name not in models:
        raise not_found(spec.name, number)
    return models[spec.name].serving(number)
