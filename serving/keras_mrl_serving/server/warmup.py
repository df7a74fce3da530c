"""Warm-up: the requests kept beside a model, run before it serves."""

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.python.lib.io._pywrap_record_io import RecordIterator
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

from .run import ServingSession, run, run_predict
from .status import StatusError, from_number, invalid_argument

# Warm-up by the calls that feed tf.Example: Classify, Regress and MultiInference.

_CLASSIFY = "tensorflow/serving/classify"
_REGRESS = "tensorflow/serving/regress"


def run_classify(session: ServingSession, request: Any) -> None:
    """Runs a ClassificationRequest.

    Args:
        session: the version.
        request: the request; of its model_spec the signature alone counts.

    Raises:
        StatusError: the code and the text TensorFlow Serving would send.
    """
    name, signature = _signature(session, request, "No signature was found with the name")
    outputs = _classification_outputs(signature)
    run(session, name, _examples(request.input), outputs, None)


def run_regress(session: ServingSession, request: Any) -> None:
    """Runs a RegressionRequest.

    Args:
        session: the version.
        request: the request; of its model_spec the signature alone counts.

    Raises:
        StatusError: the code and the text TensorFlow Serving would send.
    """
    name, signature = _signature(session, request, "No signature was found with the name")
    outputs = _regression_outputs(signature)
    run(session, name, _examples(request.input), outputs, None)


def run_multi_inference(session: ServingSession, request: Any) -> None:
    """Runs the tasks of a MultiInferenceRequest, one after the other.

    Args:
        session: the version.
        request: the request.

    Raises:
        StatusError: the code and the text TensorFlow Serving would send.
    """
    found: dict[str, Sequence[str]] = {}
    for task in request.tasks:
        if not task.model_spec.name:
            raise invalid_argument("Found ModelSpec with an empty model name.")
        if task.model_spec.name != request.tasks[0].model_spec.name:
            raise invalid_argument(
                "All ModelSpecs in a MultiInferenceRequest must access the same model name."
            )
        text = "Requested signature not found in model graph"
        name, signature = _signature(session, task, text)
        if name in found:
            raise invalid_argument(f"Duplicate evaluation of signature: {name}")
        if task.method_name not in (_CLASSIFY, _REGRESS):
            raise StatusError(
                grpc.StatusCode.UNIMPLEMENTED,
                f"Unsupported signature method_name: {task.method_name}",
            )
        classifies = task.method_name == _CLASSIFY
        found[name] = (_classification_outputs if classifies else _regression_outputs)(signature)
    for name, outputs in found.items():
        run(session, name, _examples(request.input), outputs, None)


def _signature(session: ServingSession, request: Any, missing: str) -> tuple[str, Any]:
    name = request.model_spec.signature_name or "serving_default"
    if name not in session.signatures:
        raise invalid_argument(f"{missing}: {name}")
    return name, session.signatures[name]


def _classification_outputs(signature: Any) -> Sequence[str]:
    count = len(signature.outputs)
    _check_input(signature, "classification", count in (1, 2), "one or two output Tensors, found ")
    outputs = [name for name in ("classes", "scores") if name in signature.outputs]
    if not outputs:
        raise invalid_argument(
            'Expected classification signature outputs to contain at least one of "classes" or '
            f'"scores". Signature was: {signature}'
        )
    return outputs


def _regression_outputs(signature: Any) -> Sequence[str]:
    _check_input(signature, "regression", len(signature.outputs) == 1, "one output Tensor.")
    if "outputs" not in signature.outputs:
        raise invalid_argument(f"No regression outputs found in SignatureDef: {signature}")
    return ["outputs"]


def _check_input(signature: Any, kind: str, outputs_fit: bool, expected: str) -> None:
    if len(signature.inputs) != 1:
        raise invalid_argument("Expected one input Tensor.")
    if not outputs_fit:
        found = "" if expected.endswith(".") else len(signature.outputs)
        raise invalid_argument(f"Expected {expected}{found}")
    if "inputs" not in signature.inputs:
        raise invalid_argument(f"No {kind} inputs found in SignatureDef: {signature}")


def _examples(given: Any) -> dict[str, np.ndarray]:
    kind = given.WhichOneof("kind")
    examples = list(getattr(given, kind).examples) if kind else []
    if not examples:
        raise invalid_argument("Input is empty.")
    # Two messages end to end are one with the fields of both: so the context joins each example.
    context = (
        given.example_list_with_context.context.SerializeToString()
        if kind == "example_list_with_context"
        else b""
    )
    serialized = np.empty(len(examples), object)
    serialized[:] = [context + example.SerializeToString() for example in examples]
    return {"inputs": serialized}


# The reader behind the public, deprecated iterator; tf.data wraps its texts in ones of its own.


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
