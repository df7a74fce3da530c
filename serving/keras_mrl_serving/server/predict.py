"""Predict: the version asked for, the run, the response."""

from typing import Any

from tensorflow_serving.apis.predict_pb2 import PredictResponse

from .lookup import check_model_spec, serving
from .manager import Models
from .running import run_predict
from .tensors import encode


def predict(
    models: Models,
    request: Any,
    timeout_s: float | None,
    *,
    as_tensor_content: bool = False,
) -> Any:
    """Answers a PredictRequest.

    Args:
        models: the models of the server.
        request: the `PredictRequest`.
        timeout_s: what is left until the caller's deadline; None without one.
        as_tensor_content: answer in bytes, not in the field of each dtype.

    Raises:
        StatusError: the code and the text TensorFlow Serving would send.
    """
    check_model_spec(request)
    spec = request.model_spec
    with serving(models, spec) as (number, session):
        name, outputs = run_predict(session, request, timeout_s)
    response = PredictResponse()
    response.model_spec.name = spec.name
    response.model_spec.signature_name = name
    response.model_spec.version.value = number
    for alias, array in outputs.items():
        encode(array, response.outputs[alias], as_tensor_content=as_tensor_content)
    return response
