"""The REST surface: which path asks for what, and the HTTP code and JSON of each answer."""

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

import grpc
from google.protobuf.json_format import MessageToDict
from tensorflow_serving.apis.get_model_metadata_pb2 import GetModelMetadataRequest, SignatureDefMap
from tensorflow_serving.apis.get_model_status_pb2 import GetModelStatusRequest
from tensorflow_serving.apis.model_pb2 import ModelSpec
from tensorflow_serving.apis.predict_pb2 import PredictRequest

from .http_server import error_body
from .log import logger
from .models import Models
from .requests import get_model_metadata, get_model_status, predict, serving
from .rest_json import parse_body, read_inputs, write_columns, write_rows
from .status import StatusError, invalid_argument, unimplemented
from .tensors import decode, encode

_MODEL = r"(?:/([^/:]+))"
_VERSION = r"(?:/versions/(\d+)|/labels/([^/:]+))?"
_FLAGS = re.IGNORECASE | re.ASCII
_POST = re.compile(rf"/v1/models{_MODEL}{_VERSION}:(classify|regress|predict)", _FLAGS)
_GET = re.compile(rf"/v1/models{_MODEL}?{_VERSION}(?:/(metadata))?", _FLAGS)
_MAX_ANSWER_BYTES = 2**25  # of the outputs; as JSON they are more, and more again on the way there
_HTTP_CODES = {
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.UNAUTHENTICATED: 401,
}


def answer(
    models: Models, timeout_s: float | None, method: str, path: str, body: bytes
) -> tuple[int, bytes]:
    """The HTTP code and the JSON that answer a request; it raises nothing.

    Args:
        models: the models of the server.
        timeout_s: how long a model may compute; None means without limit.
        method: the HTTP method, in capitals.
        path: the path and query of the request, still quoted.
        body: the body, empty where there is none.
    """
    try:
        return 200, _answer(models, timeout_s, method, path, body)
    except StatusError as error:
        return _HTTP_CODES.get(error.code, 500), error_body(error.message)
    except Exception:  # whatever goes wrong, the caller waits for an answer
        logger.exception("%s %s", method, path)
        return 500, error_body("The server met an error of its own; its log tells more.")


def _answer(models: Models, timeout_s: float | None, method: str, path: str, body: bytes) -> bytes:
    malformed = invalid_argument(f"Malformed request: {method} {path}")
    if not path.lower().startswith("/v1/"):  # no handler of TensorFlow Serving takes these
        raise StatusError(grpc.StatusCode.NOT_FOUND, malformed.message)
    if method == "POST" and (match := _POST.fullmatch(path)):
        spec = _model_spec(*match.group(1, 2, 3))
        if match[4] == "predict":
            return _predict(models, timeout_s, spec, body)
        if match[4] in ("classify", "regress"):
            raise unimplemented(
                "The development server answers predict calls only. "
                f"Received: {method} {path}. Ask {path.rpartition(':')[0]}:predict, or run "
                "tensorflow/serving on the same files."
            )
        raise malformed  # the verb counts in small letters only
    if method == "GET" and (match := _GET.fullmatch(path)):
        if match[1] is None:
            raise invalid_argument("Missing model name in request.")
        spec = _model_spec(*match.group(1, 2, 3))
        return _metadata(models, spec) if match[4] == "metadata" else _status(models, spec)
    raise malformed


def _model_spec(name: str, version: str | None, label: str | None) -> Any:
    spec = ModelSpec(name=unquote(name))
    if version is not None:
        digits = version.lstrip("0") or "0"
        if len(digits) > 19 or int(digits) >= 2**63:
            raise invalid_argument(f"Failed to convert version: {version} to numeric.")
        spec.version.value = int(digits)
    if label is not None:
        spec.version_label = unquote(label)
    return spec


def _predict(models: Models, timeout_s: float | None, spec: Any, body: bytes) -> bytes:
    document = parse_body(body)
    request = PredictRequest(model_spec=spec)
    request.model_spec.signature_name = document.get("signature_name", "")
    declared = _declared_inputs(models, request.model_spec)
    for name, array in read_inputs(document, declared).items():
        encode(array, request.inputs[name])
    response = predict(models, request, timeout_s, max_answer_bytes=_MAX_ANSWER_BYTES)
    outputs = {name: decode(proto) for name, proto in response.outputs.items()}
    return write_rows(outputs) if "instances" in document else write_columns(outputs)


def _declared_inputs(models: Models, spec: Any) -> Mapping[str, Any]:
    name = spec.signature_name or "serving_default"
    with serving(models, spec) as (_, session):
        if name not in session.signatures:
            raise invalid_argument(f'Serving signature name: "{name}" not found in signature def')
        inputs: Mapping[str, Any] = session.signatures[name].inputs
    if not inputs:
        name = spec.signature_name or "DEFAULT"
        raise invalid_argument(f"Failed to get input map for signature: {name}")
    return inputs


def _status(models: Models, spec: Any) -> bytes:
    response = get_model_status(models, GetModelStatusRequest(model_spec=spec))
    return _json(MessageToDict(response, always_print_fields_with_no_presence=True))


def _metadata(models: Models, spec: Any) -> bytes:
    request = GetModelMetadataRequest(model_spec=spec, metadata_field=["signature_def"])
    response = get_model_metadata(models, request)
    signatures = SignatureDefMap()
    response.metadata["signature_def"].Unpack(signatures)
    model_spec, signature_def = (
        MessageToDict(
            message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )
        for message in (response.model_spec, signatures)
    )
    return _json({"model_spec": model_spec, "metadata": {"signature_def": signature_def}})


def _json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, indent=1).encode() + b"\n"
