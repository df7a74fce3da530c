"""A version opened as TensorFlow Serving opens one: the session, batched if asked, warmed up."""

import os
from dataclasses import dataclass, field
from typing import Any

import grpc
import tensorflow as tf

from .._session import SavedModelSession
from .batching import BatchingSession, BatchThreads
from .batching_config import batching_options
from .run import ServingSession
from .status import StatusError, from_number
from .warmup import warm_up


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How versions are loaded; one for all models of a server.

    Args:
        enable_model_warmup: replay the records in the version's assets.extra before it serves.
        batching_parameters: a `tensorflow.serving.BatchingParameters`; None means unbatched.

    Attributes:
        batch_threads: what all models loaded with these options share.
    """

    enable_model_warmup: bool = True
    batching_parameters: Any | None = None
    batch_threads: BatchThreads = field(
        default_factory=BatchThreads, init=False, repr=False, compare=False
    )


def load(path: str, options: LoadOptions) -> ServingSession:
    """Opens one version.

    Args:
        path: folder of the version.
        options: how to load it.

    Raises:
        StatusError: it does not load, with TensorFlow Serving's code and text.
    """
    parameters = options.batching_parameters
    batching = None if parameters is None else batching_options(parameters)
    session: ServingSession = (opened := _open(path))
    if batching is not None:
        session = BatchingSession(opened, batching, options.batch_threads)
    try:
        if options.enable_model_warmup:
            warm_up(session, path)
    except BaseException:
        session.close()
        raise
    return session


def _as_in_cpp(error: Exception, path: str) -> StatusError:
    if str(error).startswith("MetaGraphDef associated with tags"):
        return StatusError(
            grpc.StatusCode.NOT_FOUND,
            "Could not find meta graph def matching supplied tags: { serve }. To inspect available "
            "tag-sets in the SavedModel, please use the SavedModel CLI: `saved_model_cli`",
        )
    file = os.path.join(path, tf.saved_model.SAVED_MODEL_FILENAME_PB)
    if str(error).startswith("Cannot parse file") and os.path.exists(file):
        return StatusError(grpc.StatusCode.DATA_LOSS, f"Can't parse {file} as binary proto")
    return StatusError(grpc.StatusCode.UNKNOWN, str(error))


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
        message = error.message.removeprefix("Graph execution error:\n\n")  # Python's own
        raise from_number(error.error_code, message) from error
    except (OSError, RuntimeError) as error:  # as Python's loader words it: C++ has other words
        raise _as_in_cpp(error, path) from error
    except Exception as error:  # the loader raises whatever it met; no model may end the server
        raise StatusError(grpc.StatusCode.UNKNOWN, str(error)) from error
