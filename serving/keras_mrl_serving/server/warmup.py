"""Warm-up: the requests kept beside a model, run before it serves."""

import logging
import os
from collections.abc import Iterator
from typing import Any

import grpc
import tensorflow as tf
from google.protobuf.message import DecodeError

# The reader behind the public, deprecated iterator; tf.data wraps its texts in ones of its own.
from tensorflow.python.lib.io._pywrap_record_io import RecordIterator
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

from .running import ServingSession, run_predict
from .status import StatusError, from_number, invalid_argument
from .warmup_examples import run_classify, run_multi_inference, run_regress

_logger = logging.getLogger("keras_mrl_serving.server")
_FILE = os.path.join("assets.extra", "tf_serving_warmup_requests")
_MAX_RECORDS = 1000


def warm_up(session: ServingSession, path: str) -> None:
    """Runs every record a version brings along; one without any is as warm as it gets.

    Args:
        session: the version.
        path: its folder.

    Raises:
        StatusError: a record cannot be read, or its request fails; the version must not serve.
    """
    file = os.path.join(path, _FILE)
    if not os.path.exists(file):
        return
    for count, record in enumerate(_records(file), start=1):
        try:
            log = PredictionLog.FromString(record)
        except DecodeError as error:
            shown = record.decode(errors="replace")
            raise invalid_argument(f"Failed to parse warmup record: {shown} from {file}") from error
        _run(session, log)
        if count > _MAX_RECORDS:
            raise invalid_argument(
                f"Number of warmup records exceeds the maximum ({_MAX_RECORDS}) at {file}"
            )
    _logger.info("warmed up by %s", file)


def _run(session: ServingSession, log: Any) -> None:
    kind = log.WhichOneof("log_type")
    if kind is None:
        return
    request = getattr(log, kind).request if kind in _RUNS else None
    if request is None:
        number = log.DESCRIPTOR.fields_by_name[kind].number
        raise StatusError(
            grpc.StatusCode.UNIMPLEMENTED, f"Unsupported log_type for warmup: {number}"
        )
    _RUNS[kind](session, request)


_RUNS: dict[str, Any] = {
    "predict_log": lambda session, request: run_predict(session, request, None),
    "classify_log": run_classify,
    "regress_log": run_regress,
    "multi_inference_log": run_multi_inference,
}


def _records(file: str) -> Iterator[bytes]:
    try:
        yield from RecordIterator(file, "")
    except tf.errors.DataLossError as error:
        text = f"{error.message}. Please verify your warmup data is in TFRecord format."
        raise StatusError(grpc.StatusCode.DATA_LOSS, text) from error
    except tf.errors.OpError as error:
        raise from_number(error.error_code, error.message) from error
