"""The gRPC services: the answers to Predict, GetModelMetadata, GetModelStatus and a reload."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import grpc
from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc
from tensorflow_serving.apis.get_model_metadata_pb2 import GetModelMetadataResponse, SignatureDefMap
from tensorflow_serving.apis.get_model_status_pb2 import GetModelStatusResponse
from tensorflow_serving.apis.model_management_pb2 import ReloadConfigResponse
from tensorflow_serving.apis.predict_pb2 import PredictResponse

from .answer_size import MAX_ANSWER_BYTES
from .config import Configuration
from .models import Models
from .run import ServingSession, run_predict
from .status import StatusError, invalid_argument, truncated
from .tensors import encode

_FIELD = "signature_def"


def add_services(
    server: grpc.Server, models: Models, configuration: Configuration, *, as_tensor_content: bool
) -> None:
    """Registers TensorFlow Serving's services on a gRPC server.

    Args:
        server: the server, not yet started.
        models: the models of the server.
        configuration: takes the configs of reloads.
        as_tensor_content: whether answers come in bytes, not in the field of each dtype.
    """
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        _PredictionService(models, as_tensor_content), server
    )
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(
        _ModelService(models, configuration), server
    )


class _PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, models: Models, as_tensor_content: bool) -> None:
        self._models = models
        self._as_tensor_content = as_tensor_content

    def Predict(self, request: Any, context: grpc.ServicerContext) -> Any:
        timeout_s, as_tensor_content = context.time_remaining(), self._as_tensor_content
        return _answer(
            context,
            lambda: predict(self._models, request, timeout_s, as_tensor_content=as_tensor_content),
        )

    def GetModelMetadata(self, request: Any, context: grpc.ServicerContext) -> Any:
        return _answer(context, lambda: get_model_metadata(self._models, request))

    def Classify(self, _request: Any, context: grpc.ServicerContext) -> None:
        _refuse(context, "Classify")

    def Regress(self, _request: Any, context: grpc.ServicerContext) -> None:
        _refuse(context, "Regress")

    def MultiInference(self, _request: Any, context: grpc.ServicerContext) -> None:
        _refuse(context, "MultiInference")


class _ModelService(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, models: Models, configuration: Configuration) -> None:
        self._models = models
        self._configuration = configuration

    def GetModelStatus(self, request: Any, context: grpc.ServicerContext) -> Any:
        return _answer(context, lambda: get_model_status(self._models, request))

    def HandleReloadConfigRequest(self, request: Any, context: grpc.ServicerContext) -> Any:
        return _answer(context, lambda: _reload(self._configuration, request, context.is_active))


def _answer(context: grpc.ServicerContext, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except StatusError as error:
        context.abort(error.code, truncated(error.message))


def _refuse(context: grpc.ServicerContext, method: str) -> None:
    context.abort(
        grpc.StatusCode.UNIMPLEMENTED,
        f"The development server answers predict calls only. Received: {method}. Ask by Predict, "
        "or run tensorflow/serving on the same files.",
    )


def _reload(configuration: Configuration, request: Any, is_active: Callable[[], bool]) -> Any:
    if request.config.WhichOneof("config") != "model_config_list":
        raise invalid_argument(
            "ServerModelConfig type not supported by HandleReloadConfigRequest. Only "
            "ModelConfigList is currently supported"
        )
    configuration.reload(request.config, is_active)
    response = ReloadConfigResponse()
    response.status.SetInParent()
    return response


def predict(
    models: Models,
    request: Any,
    timeout_s: float | None,
    *,
    as_tensor_content: bool = False,
    max_answer_bytes: int = MAX_ANSWER_BYTES,
) -> Any:
    """Answers a PredictRequest.

    Args:
        models: the models of the server.
        request: the `PredictRequest`.
        timeout_s: the time left until the caller's deadline; None without one.
        as_tensor_content: answer in bytes, not in the field of each dtype.
        max_answer_bytes: the most that the outputs may take.

    Raises:
        StatusError: the code and the text TensorFlow Serving would send; RESOURCE_EXHAUSTED, the
            answer would be too large.
    """
    _check_has_model_spec(request)
    spec = request.model_spec
    with serving(models, spec) as (number, session):
        name, outputs = run_predict(session, request, timeout_s, max_answer_bytes)
    response = PredictResponse()
    response.model_spec.name = spec.name
    response.model_spec.signature_name = name
    response.model_spec.version.value = number
    for alias, array in outputs.items():
        encode(array, response.outputs[alias], as_tensor_content=as_tensor_content)
    return response


def get_model_metadata(models: Models, request: Any) -> Any:
    """Answers a GetModelMetadataRequest with the signatures of one version.

    Args:
        models: the models of the server.
        request: the `GetModelMetadataRequest`.

    Raises:
        StatusError: the code and the text TensorFlow Serving would send.
    """
    _check_has_model_spec(request)
    if not request.metadata_field:
        raise invalid_argument("GetModelMetadataRequest must specify at least one metadata_field")
    for field in request.metadata_field:
        if field != _FIELD:
            raise invalid_argument(f"Metadata field {field} is not supported")
    response = GetModelMetadataResponse()
    with serving(models, request.model_spec) as (number, session):
        response.model_spec.name = request.model_spec.name
        response.model_spec.version.value = number
        protos = {key: signature.proto for key, signature in session.signatures.items()}
        response.metadata[_FIELD].Pack(SignatureDefMap(signature_def=protos))
    return response


def get_model_status(models: Models, request: Any) -> Any:
    """Answers a GetModelStatusRequest: every version since the server started, highest first.

    Args:
        models: the models of the server.
        request: the `GetModelStatusRequest`; a version narrows the answer, a label does not.

    Raises:
        StatusError: the code and the text TensorFlow Serving would send.
    """
    _check_has_model_spec(request)
    spec = request.model_spec
    versions = models.versions(spec.name)
    if spec.HasField("version"):
        number = spec.version.value
        versions = [version for version in versions if version.number == number]
        refusal = f"Could not find version {number} of model {spec.name}"
    else:
        refusal = f"Could not find any versions of model {spec.name}"
    if not versions:
        raise StatusError(grpc.StatusCode.NOT_FOUND, refusal)
    response = GetModelStatusResponse()
    for version in versions:
        status = response.model_version_status.add(version=version.number, state=version.state)
        status.status.SetInParent()
        if version.error is not None:
            status.status.error_code = version.error.number
            status.status.error_message = version.error.message
    return response


def serving(models: Models, spec: Any) -> AbstractContextManager[tuple[int, ServingSession]]:
    """The version that a ModelSpec names and its session, loaded for as long as the context lasts.

    Args:
        models: the models of the server.
        spec: a `ModelSpec`.

    Raises:
        StatusError: INVALID_ARGUMENT for no name or no such label, UNAVAILABLE for a label before
            any config, NOT_FOUND for a version that is not available.
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


def _check_has_model_spec(request: Any) -> None:
    if not request.HasField("model_spec"):
        raise invalid_argument("Missing ModelSpec")
