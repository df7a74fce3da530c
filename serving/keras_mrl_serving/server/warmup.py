"""Warm-up: the requests recorded beside a model, run before it serves.

Records are requests of Predict, or of Classify, Regress and MultiInference, which feed tf.Example.
A record that fails fails the load.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError

# The reader below the public, deprecated iterator; tf.data puts words of its own into the errors.
from tensorflow.python.lib.io._pywrap_record_io import RecordIterator
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

from .._session import Signature
from .log import logger
from .run import ServingSession, run, run_predict
from .status import StatusError, from_number, invalid_argument, unimplemented

_FILE = os.path.join("assets.extra", "tf_serving_warmup_requests")
_MAX_RECORDS = 1000
_METHODS = "tensorflow/serving/"


def warm_up(session: ServingSession, path: str) -> None:
    """Runs the records of a version, if there are any.

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
            text = record.decode(errors="replace")
            raise invalid_argument(f"Failed to parse warmup record: {text} from {file}") from error
        _run_log(session, log)
        if count > _MAX_RECORDS:
            raise invalid_argument(
                f"Number of warmup records exceeds the maximum ({_MAX_RECORDS}) at {file}"
            )
    logger.info("warmed up by %s", file)


def _records(file: str) -> Iterator[bytes]:
    try:
        yield from RecordIterator(file, "")
    except tf.errors.DataLossError as error:
        text = f"{error.message}. Please verify your warmup data is in TFRecord format."
        raise StatusError(grpc.StatusCode.DATA_LOSS, text) from error
    except tf.errors.OpError as error:
        raise from_number(error.error_code, error.message) from error


def _run_log(session: ServingSession, log: Any) -> None:
    kind = log.WhichOneof("log_type")
    if kind is None:
        return
    if kind not in ("predict_log", "classify_log", "regress_log", "multi_inference_log"):
        number = log.DESCRIPTOR.fields_by_name[kind].number
        raise unimplemented(f"Unsupported log_type for warmup: {number}")
    request = getattr(log, kind).request
    if kind == "predict_log":
        run_predict(session, request, None)
    elif kind == "multi_inference_log":
        _run_multi_inference(session, request)
    else:
        name = _signature_name(session, request, "No signature was found with the name")
        outputs = _outputs(session.signatures[name], kind.removesuffix("_log"))
        run(session, name, _serialized_examples(request.input), outputs, None)


def _run_multi_inference(session: ServingSession, request: Any) -> None:
    """Checks all tasks, then runs one after the other."""
    outputs_by_signature: dict[str, Sequence[str]] = {}
    for task in request.tasks:
        if not task.model_spec.name:
            raise invalid_argument("Found ModelSpec with an empty model name.")
        if task.model_spec.name != request.tasks[0].model_spec.name:
            raise invalid_argument(
                "All ModelSpecs in a MultiInferenceRequest must access the same model name."
            )
        name = _signature_name(session, task, "Requested signature not found in model graph")
        if name in outputs_by_signature:
            raise invalid_argument(f"Duplicate evaluation of signature: {name}")
        method = task.method_name.removeprefix(_METHODS)
        if task.method_name not in (f"{_METHODS}classify", f"{_METHODS}regress"):
            raise unimplemented(f"Unsupported signature method_name: {task.method_name}")
        outputs_by_signature[name] = _outputs(session.signatures[name], method)
    for name, outputs in outputs_by_signature.items():
        run(session, name, _serialized_examples(request.input), outputs, None)


def _signature_name(session: ServingSession, request: Any, refusal: str) -> str:
    name = request.model_spec.signature_name or "serving_default"
    if name not in session.signatures:
        raise invalid_argument(f"{refusal}: {name}")
    return str(name)


def _outputs(signature: Signature, method: str) -> Sequence[str]:
    """The outputs that Classify or Regress fetches, once the signature fits the method."""
    classifies, count = method == "classify", len(signature.outputs)
    if len(signature.inputs) != 1:
        raise invalid_argument("Expected one input Tensor.")
    if classifies and count not in (1, 2):
        raise invalid_argument(f"Expected one or two output Tensors, found {count}")
    if not classifies and count != 1:
        raise invalid_argument("Expected one output Tensor.")
    kind = "classification" if classifies else "regression"
    if "inputs" not in signature.inputs:
        raise invalid_argument(f"No {kind} inputs found in SignatureDef: {signature.proto}")
    names = ("classes", "scores") if classifies else ("outputs",)
    outputs = [name for name in names if name in signature.outputs]
    if not outputs and classifies:
        raise invalid_argument(
            'Expected classification signature outputs to contain at least one of "classes" or '
            f'"scores". Signature was: {signature.proto}'
        )
    if not outputs:
        raise invalid_argument(f"No regression outputs found in SignatureDef: {signature.proto}")
    return outputs


def _serialized_examples(request_input: Any) -> dict[str, np.ndarray]:
    kind = request_input.WhichOneof("kind")
    examples = list(getattr(request_input, kind).examples) if kind else []
    if not examples:
        raise invalid_argument("Input is empty.")
    # Two messages end to end are one message with the fields of both: this joins the context.
    context = (
        request_input.example_list_with_context.context.SerializeToString()
        if kind == "example_list_with_context"
        else b""
    )
    serialized = np.empty(len(examples), object)
    serialized[:] = [context + example.SerializeToString() for example in examples]
    return {"inputs": serialized}
