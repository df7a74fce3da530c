"""What a ModelSpec asks for: the checks every request begins with."""

from contextlib import AbstractContextManager
from typing import Any

from .manager import Models
from .running import ServingSession
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


def serving(models: Models, spec: Any) -> AbstractContextManager[tuple[int, ServingSession]]:
    """The version a ModelSpec names and its session, loaded for as long as the context lasts.

    Args:
        models: the models of the server.
        spec: a `ModelSpec`.

    Raises:
        StatusError: INVALID_ARGUMENT for no name or no such label, UNAVAILABLE for a label before
            any config, NOT_FOUND for what is not available.
    """
    if not spec.name:
        raise invalid_argument("ModelSpec has no name specified.")
    choice = spec.WhichOneof("version_choice")
    number: int | None = None
    if choice == "version_label":
        number = models.labels.version(spec.name, spec.version_label)
    elif choice == "version":
        number = spec.version.value
    return models.serving(spec.name, number)
