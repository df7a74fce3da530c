"""The gRPC services: each method hands its request on and turns a StatusError into a status."""

from collections.abc import Callable
from typing import Any, NoReturn

import grpc
from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc
from tensorflow_serving.apis.model_management_pb2 import ReloadConfigResponse

from .inspection import get_model_metadata, get_model_status
from .manager import Models
from .predict import predict
from .reload import Configuration
from .status import StatusError, invalid_argument, truncated


def add_services(
    server: grpc.Server, models: Models, configuration: Configuration, *, as_tensor_content: bool
) -> None:
    """Registers what TensorFlow Serving serves on a gRPC server.

    Args:
        server: the server, not yet started.
        models: the models of the server.
        configuration: what a reload replaces.
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
        def answer() -> Any:
            return predict(
                self._models,
                request,
                context.time_remaining(),
                as_tensor_content=self._as_tensor_content,
            )

        return _answer(context, answer)

    def GetModelMetadata(self, request: Any, context: grpc.ServicerContext) -> Any:
        return _answer(context, lambda: get_model_metadata(self._models, request))

    def Classify(self, request: Any, context: grpc.ServicerContext) -> Any:
        del request
        return _answer(context, lambda: _refuse("Classify"))

    def Regress(self, request: Any, context: grpc.ServicerContext) -> Any:
        del request
        return _answer(context, lambda: _refuse("Regress"))

    def MultiInference(self, request: Any, context: grpc.ServicerContext) -> Any:
        del request
        return _answer(context, lambda: _refuse("MultiInference"))


class _ModelService(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, models: Models, configuration: Configuration) -> None:
        self._models = models
        self._configuration = configuration

    def GetModelStatus(self, request: Any, context: grpc.ServicerContext) -> Any:
        return _answer(context, lambda: get_model_status(self._models, request))

    def HandleReloadConfigRequest(self, request: Any, context: grpc.ServicerContext) -> Any:
        return _answer(context, lambda: _reload(self._configuration, request, context.is_active))


def _reload(configuration: Configuration, request: Any, is_wanted: Callable[[], bool]) -> Any:
    if request.config.WhichOneof("config") != "model_config_list":
        raise invalid_argument(
            "ServerModelConfig type not supported by HandleReloadConfigRequest. Only "
            "ModelConfigList is currently supported"
        )
    configuration.reload(request.config, is_wanted)
    response = ReloadConfigResponse()
    response.status.SetInParent()
    return response


def _refuse(method: str) -> NoReturn:
    raise StatusError(
        grpc.StatusCode.UNIMPLEMENTED,
        f"The development server answers predict calls only. Received: {method}. Ask by Predict, "
        "or run tensorflow/serving on the same files.",
    )


def _answer(context: grpc.ServicerContext, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except StatusError as error:
        context.abort(error.code, truncated(error.message))
