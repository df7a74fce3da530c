"""The gRPC services: each method hands its request on and turns a StatusError into a status."""

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import grpc
from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc

from .inspection import get_model_metadata, get_model_status
from .model import ServedModel
from .predict import predict
from .status import StatusError, truncated


def add_services(server: grpc.Server, models: Mapping[str, ServedModel]) -> None:
    """Registers what TensorFlow Serving serves on a gRPC server.

    Args:
        server: the server, not yet started.
        models: the served models by name; what changes in it is served from the next request on.
    """
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        _PredictionService(models), server
    )
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(_ModelService(models), server)


class _PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self._models = models

    def Predict(self, request: Any, context: grpc.ServicerContext) -> Any:
        timeout_s = context.time_remaining()
        return _answer(context, lambda: predict(self._models, request, timeout_s))

    def Classify(self, request: Any, context: grpc.ServicerContext) -> Any:
        del request
        _decline(context, "Classify")

    def Regress(self, request: Any, context: grpc.ServicerContext) -> Any:
        del request
        _decline(context, "Regress")

    def MultiInference(self, request: Any, context: grpc.ServicerContext) -> Any:
        del request
        _decline(context, "MultiInference")

    def GetModelMetadata(self, request: Any, context: grpc.ServicerContext) -> Any:
        return _answer(context, lambda: get_model_metadata(self._models, request))


class _ModelService(model_service_pb2_grpc.ModelServiceServicer):
    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self._models = models

    def GetModelStatus(self, request: Any, context: grpc.ServicerContext) -> Any:
        return _answer(context, lambda: get_model_status(self._models, request))


def _answer(context: grpc.ServicerContext, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except StatusError as error:
        context.abort(error.code, truncated(error.message))


def _decline(context: grpc.ServicerContext, method: str) -> NoReturn:
    context.abort(
        grpc.StatusCode.UNIMPLEMENTED,
        f"The development server answers predict calls only. Received: {method}. "
        "Call Predict, or run tensorflow/serving on the same files.",
    )
