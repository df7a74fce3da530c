"""Predict: a request checked in TensorFlow Serving's order and words, the run, the response."""

from collections.abc import Iterable, Mapping
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis.predict_pb2 import PredictResponse

from .lookup import check_model_spec, serving
from .model import ServedModel
from .status import StatusError, from_number, invalid_argument
from .tensors import decode, encode


def predict(models: Mapping[str, ServedModel], request: Any, timeout_s: float | None) -> Any:
    """Answers a PredictRequest.

    Args:
        models: the served models by name.
        request: the `PredictRequest`.
        timeout_s: what is left until the caller's deadline; None without one.

    Raises:
        StatusError: the code and the text TensorFlow Serving would send.
    """
    check_model_spec(request)
    spec = request.model_spec
    with serving(models, spec) as (number, session):
        name = spec.signature_name or "serving_default"
        if name not in session.signatures:
            raise StatusError(
                grpc.StatusCode.FAILED_PRECONDITION, f'Serving signature key "{name}" not found.'
            )
        signature = session.signatures[name]
        inputs = _read_inputs(signature, request.inputs)
        _check_output_filter(signature, request.output_filter)
        try:
            outputs = session.run(name, inputs, request.output_filter, timeout_s=timeout_s)
        except tf.errors.OpError as error:
            raise from_number(error.error_code, error.message) from error
    response = PredictResponse()
    response.model_spec.name = spec.name
    response.model_spec.signature_name = name
    response.model_spec.version.value = number
    for alias, array in outputs.items():
        encode(array, response.outputs[alias])
    return response


def _read_inputs(signature: Any, sent: Mapping[str, Any]) -> dict[str, np.ndarray]:
    declared, defaults = signature.inputs, signature.defaults
    if len(sent) > len(declared) or (len(sent) < len(declared) and not defaults):
        raise invalid_argument(
            f"input size does not match signature: {len(sent)}!={len(declared)} "
            f"len({_names(sent)}) != len({_names(declared)}). "
            f"Sent extra: {_names(sent.keys() - declared.keys())}. "
            f"Missing but required: {_names(declared.keys() - sent.keys())}."
        )
    inputs = {}
    for alias in sorted(declared):
        if alias not in sent and alias not in defaults:
            raise invalid_argument(
                f"Signature input alias: {alias}(feed name: {declared[alias].name}) not found in "
                f"request and no default value provided. Inputs expected to be in the request "
                f"{_names(sent)}, or default input alias set: {','.join(sorted(defaults))}"
            )
        try:
            inputs[alias] = decode(sent[alias] if alias in sent else defaults[alias])
        except ValueError as error:
            raise invalid_argument(f"tensor parsing error: {alias}") from error
    used = sent.keys() & declared.keys()
    if len(used) != len(sent):
        raise invalid_argument(
            f"Inputs contains invalid name. Used request inputs: {','.join(sorted(used))}, "
            f"request input: {','.join(sorted(sent))}"
        )
    return inputs


def _check_output_filter(signature: Any, names: Iterable[str]) -> None:
    seen = set()
    for alias in names:
        if alias not in signature.outputs:
            raise invalid_argument(
                f"output tensor alias not found in signature: {alias} Outputs expected to be "
                f"in the set {_names(signature.outputs)}."
            )
        if alias in seen:
            raise invalid_argument(f"duplicate output tensor alias: {alias}")
        seen.add(alias)


def _names(names: Iterable[str]) -> str:
    return "{" + ",".join(sorted(names)) + "}"
