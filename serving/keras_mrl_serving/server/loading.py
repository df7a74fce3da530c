"""A version opened as TensorFlow Serving opens one: its session, perhaps batched, and warmed up."""

import os
from dataclasses import dataclass, field
from typing import Any

import grpc
import tensorflow as tf

from .._session import SavedModelSession
from .batch_scheduler import BatchScheduler
from .batching import BatchingSession
from .batching_config import batching_options
from .run import ServingSession
from .status import StatusError, failed_precondition, from_number
from .warmup import warm_up


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How the versions of all models of a server are loaded.

    Args:
        enable_model_warmup: whether the records in a version's assets.extra are run before it
            serves.
        batching_parameters: a `tensorflow.serving.BatchingParameters`; None means unbatched.

    Attributes:
        batch_scheduler: shared by all models that are loaded with these options.
    """

    enable_model_warmup: bool = True
    batching_parameters: Any | None = None
    batch_scheduler: BatchScheduler = field(
        default_factory=BatchScheduler, init=False, repr=False, compare=False
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
    opened = _open(path)
    session: ServingSession = opened
    if batching is not None:
        session = BatchingSession(opened, batching, options.batch_scheduler)
    try:
        if options.enable_model_warmup:
            warm_up(session, path)
    except BaseException:
        session.close()
        raise
    return session


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
    except ImportError as error:  # of tensorflow-text, which TensorFlow Serving has built in
        raise failed_precondition(str(error)) from error
    except (OSError, RuntimeError) as error:  # Python's loader words these differently from C++
        raise _in_the_words_of_cpp(error, path) from error
    except Exception as error:  # a damaged model may raise anything
        raise StatusError(grpc.StatusCode.UNKNOWN, str(error)) from error


def _in_the_words_of_cpp(error: Exception, path: str) -> StatusError:
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
