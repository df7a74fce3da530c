"""The server under test, given by its address: requests to it, and its refusals."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import grpc
import pytest
import tensorflow as tf
from google.protobuf import text_format
from tensorflow.core.framework.tensor_pb2 import TensorProto
from tensorflow_serving.apis.get_model_metadata_pb2 import GetModelMetadataRequest
from tensorflow_serving.apis.get_model_status_pb2 import GetModelStatusRequest, ModelVersionStatus
from tensorflow_serving.apis.model_management_pb2 import ReloadConfigRequest
from tensorflow_serving.apis.model_service_pb2_grpc import ModelServiceStub
from tensorflow_serving.apis.predict_pb2 import PredictRequest
from tensorflow_serving.apis.prediction_service_pb2_grpc import PredictionServiceStub

from keras_mrl_serving.saved_model import list_versions
from keras_mrl_serving.server import DevServer
from tests.helpers.waiting import wait_until

TIMEOUT_S = 60.0
UNLIMITED = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
]


class Served:
    """The stubs of the server under test, the folder it watches, and the version it serves."""

    def __init__(self, target: str, base: Path, version: int) -> None:
        self.target = target
        self.channel = grpc.insecure_channel(target, options=UNLIMITED)
        self.base = base
        self.version = version
        self._prediction = PredictionServiceStub(self.channel)
        self._model = ModelServiceStub(self.channel)

    def __call__(self, request: Any, timeout_s: float | None = TIMEOUT_S) -> Any:
        return self.future(request, timeout_s).result()

    def future(self, request: Any, timeout_s: float | None = TIMEOUT_S) -> Any:
        method = {
            PredictRequest: self._prediction.Predict,
            GetModelMetadataRequest: self._prediction.GetModelMetadata,
            GetModelStatusRequest: self._model.GetModelStatus,
            ReloadConfigRequest: self._model.HandleReloadConfigRequest,
        }[type(request)]
        return method.future(request, timeout=timeout_s, wait_for_ready=True)

    def refuses(self, request: Any) -> tuple[str, str | None]:
        return refusal(lambda: self(request))

    def states(self, name: str) -> list[tuple[int, str]]:
        """The versions of a model and their states, highest first."""
        try:
            versions = self(status(name=name)).model_version_status
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            return []
        return [(v.version, ModelVersionStatus.State.Name(v.state)) for v in versions]

    def reaches(self, name: str, *states: tuple[int, str]) -> None:
        """Waits until the highest versions of a model are in these states."""
        wait_until(lambda: self.states(name)[: len(states)] == list(states), f"{name}: {states}")


@contextmanager
def server_under_test(
    kind: str, base: Path, put: Callable[[Path, str], object], **flags: Any
) -> Iterator[Served]:
    """The server at KERAS_MRL_TFS_<kind>TARGET if that is set, else a development server.

    Args:
        kind: "", or "BATCHING_".
        base: the base path of the development server.
        put: puts the model under a base path, as the version of this name.
        flags: of the development server.
    """
    address = os.environ.get(f"KERAS_MRL_TFS_{kind}TARGET")
    if address is not None:
        base = Path(os.environ[f"KERAS_MRL_TFS_{kind}BASE_PATH"])
    version = max(list_versions(str(base)), default=0) + 1
    put(base, str(version))
    server: AbstractContextManager[str] = (
        DevServer(base, **flags) if address is None else nullcontext(address)
    )
    with server as target:
        served = Served(target, base, version)
        served.reaches("default", (version, "AVAILABLE"))
        yield served
        served.channel.close()


def refusal(call: Callable[[], object]) -> tuple[str, str | None]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code().name, caught.value.details()


def label(name: str, number: int) -> str:
    return f'version_labels {{ key: "{name}" value: {number} }} '


def spec(request: Any, name: str = "default", **fields: Any) -> Any:
    request.model_spec.name = name
    if "version" in fields:
        request.model_spec.version.value = fields["version"]
    if "label" in fields:
        request.model_spec.version_label = fields["label"]
    if "signature" in fields:
        request.model_spec.signature_name = fields["signature"]
    return request


def predict(outputs: tuple[str, ...] = (), *, inputs: dict[str, Any], **fields: Any) -> Any:
    request = spec(PredictRequest(output_filter=outputs), **fields)
    for name, value in inputs.items():
        proto = value if isinstance(value, TensorProto) else tf.make_tensor_proto(value)
        request.inputs[name].CopyFrom(proto)
    return request


def metadata(*names: str, **fields: Any) -> Any:
    return spec(GetModelMetadataRequest(metadata_field=names), **fields)


def status(**fields: Any) -> Any:
    return spec(GetModelStatusRequest(), **fields)


def reload(served: Served, default: str = "", **others: str) -> ReloadConfigRequest:
    """A config of the model "default" and others, with more text for each."""
    request = ReloadConfigRequest()
    paths = {"default": served.base} | {name: served.base / f"of-{name}" for name in others}
    for name, text in {"default": default, **others}.items():
        model = request.config.model_config_list.config.add(name=name, base_path=str(paths[name]))
        model.model_platform = "tensorflow"
        text_format.Merge(text, model)
    return request
