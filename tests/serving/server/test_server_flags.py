"""The flags of batching, warm-up, sockets, health and encodings, as a client sees them."""

import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
import tensorflow as tf
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tensorflow_serving.apis.classification_pb2 import ClassificationRequest
from tensorflow_serving.apis.inference_pb2 import MultiInferenceRequest
from tensorflow_serving.apis.predict_pb2 import PredictRequest
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog
from tensorflow_serving.apis.prediction_service_pb2_grpc import PredictionServiceStub
from tensorflow_serving.apis.regression_pb2 import RegressionRequest

from keras_mrl_serving.server import DevServer

Publish = Callable[[Path, str], Path]
X = np.arange(8, dtype=np.float32).reshape(2, 4)
WEIGHTS = np.arange(12, dtype=np.float32).reshape(4, 3)
BATCHING = """
max_batch_size { value: 32 } batch_timeout_micros { value: 2000 } num_batch_threads { value: 2 }
allowed_batch_sizes: [ 4, 32 ]
"""


class Batching(NamedTuple):
    channel: grpc.Channel
    predict: Any
    rest_port: int


def predict(outputs: tuple[str, ...] = (), signature: str = "", **inputs: Any) -> PredictRequest:
    request = PredictRequest(output_filter=outputs)
    request.model_spec.name = "default"
    request.model_spec.signature_name = signature
    for name, value in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(value))
    return request


def refused(call: Callable[[], Any]) -> tuple[str, str | None]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code().name, caught.value.details()


@pytest.fixture(scope="module")
def batching(publish: Publish, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Batching]:
    base = tmp_path_factory.mktemp("batching")
    publish(base, "1")
    file = base / "batching.config"
    file.write_text(BATCHING)
    server = DevServer(base, enable_batching=True, batching_parameters_file=file, rest_api_port=0)
    with server as target, grpc.insecure_channel(target) as channel:
        assert server.rest_api_port
        yield Batching(channel, PredictionServiceStub(channel).Predict, server.rest_api_port)
    assert not [thread for thread in threading.enumerate() if thread.name == "batching"]


def test_batched_answers_are_those_of_one_by_one(
    batching: Batching,
) -> None:
    rng = np.random.default_rng(0)
    xs = [rng.normal(size=(int(n), 4)).astype(np.float32) for n in rng.integers(0, 6, 200)]

    def ask(x: np.ndarray) -> np.ndarray:
        response = batching.predict(predict(("y",), x=x), timeout=30)
        return np.asarray(tf.make_ndarray(response.outputs["y"]))

    with ThreadPoolExecutor(32) as pool:
        for x, y in zip(xs, pool.map(ask, xs), strict=True):
            np.testing.assert_allclose(y, x @ WEIGHTS, rtol=1e-5, atol=1e-5)


def test_rest_is_batched_too(batching: Batching) -> None:
    url = f"http://127.0.0.1:{batching.rest_port}/v1/models/default:predict"
    body = b'{"signature_name": "add", "inputs": {"a": [1], "b": [1, 2]}}'
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(url, body, timeout=30)
    with caught.value as error:
        assert error.code == 400
        assert error.read() == (
            b'{"error": "Batching Run() input tensors must have equal 0th-dimension size"}'
        )


def test_a_parameters_file_without_batching(publish: Publish, tmp_path: Path) -> None:
    publish(tmp_path / "base", "1")
    file = tmp_path / "batching.config"
    file.write_text(BATCHING)
    with pytest.raises(ValueError, match="without setting") as caught:
        DevServer(tmp_path / "base", batching_parameters_file=file).start()
    assert str(caught.value) == (
        "server_options.batching_parameters_file is set without setting "
        "server_options.enable_batching to true."
    )


def test_sizes_that_do_not_match_fail_the_load(publish: Publish, tmp_path: Path) -> None:
    publish(tmp_path / "base", "1")
    file = tmp_path / "batching.config"
    file.write_text("max_batch_size { value: 32 } allowed_batch_sizes: 16")
    server = DevServer(
        tmp_path / "base",
        enable_batching=True,
        batching_parameters_file=file,
        max_num_load_retries=0,
    )
    with pytest.raises(RuntimeError) as caught:
        server.start()
    assert (
        "INVALID_ARGUMENT: Last entry in allowed_batch_sizes must match max_batch_size; last entry "
        "was 16; expected 32" in str(caught.value)
    )


def test_warm_up_records_that_fail(publish: Publish, tmp_path: Path) -> None:
    version = publish(tmp_path / "base", "1")
    (version / "assets.extra").mkdir()
    log = PredictionLog()
    log.predict_log.request.CopyFrom(predict(signature="none"))
    with tf.io.TFRecordWriter(
        str(version / "assets.extra" / "tf_serving_warmup_requests")
    ) as writer:
        writer.write(log.SerializeToString())
    with pytest.raises(RuntimeError) as caught:
        DevServer(tmp_path / "base", max_num_load_retries=0).start()
    assert 'FAILED_PRECONDITION: Serving signature key "none" not found.' in str(caught.value)
    with DevServer(tmp_path / "base", enable_model_warmup=False) as target:
        with grpc.insecure_channel(target) as channel:
            assert PredictionServiceStub(channel).Predict(predict(x=X), timeout=30).outputs


@pytest.fixture(scope="module")
def many_flags(
    publish: Publish, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    folder = tmp_path_factory.mktemp("flags")
    publish(folder / "base", "1")
    socket = folder / "grpc.sock"
    server = DevServer(
        folder / "base",
        grpc_socket_path=socket,
        grpc_channel_arguments="grpc.max_connection_age_ms=60000",
        enable_grpc_healthcheck_service=True,
        enable_serialization_as_tensor_content=True,
    )
    with server as target:
        yield target, f"unix:{socket}"
    shutil.rmtree(folder)


def test_port_and_socket_answer_in_tensor_content(many_flags: tuple[str, str]) -> None:
    for target in many_flags:
        with grpc.insecure_channel(target) as channel:
            response = PredictionServiceStub(channel).Predict(predict(("y",), x=X), timeout=30)
        y = response.outputs["y"]
        assert y.tensor_content == (X @ WEIGHTS).tobytes()
        assert not y.float_val


def test_health(many_flags: tuple[str, str]) -> None:
    with grpc.insecure_channel(many_flags[0]) as channel:
        for service in ("", "ModelService", "PredictionService"):
            request = health_pb2.HealthCheckRequest(service=service)
            assert health_pb2_grpc.HealthStub(channel).Check(request, timeout=30).status == 1


def test_no_health_service_unless_asked_for(batching: Batching) -> None:
    check: Any = batching.channel.unary_unary("/grpc.health.v1.Health/Check")
    assert refused(lambda: check(b"", timeout=30)) == ("UNIMPLEMENTED", "Method not found!")


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Classify", ClassificationRequest()),
        ("Regress", RegressionRequest()),
        ("MultiInference", MultiInferenceRequest()),
    ],
)
def test_calls_no_matryoshka_client_needs(
    many_flags: tuple[str, str], method: str, request_: Any
) -> None:
    with grpc.insecure_channel(many_flags[0]) as channel:
        call = getattr(PredictionServiceStub(channel), method)
        assert refused(lambda: call(request_, timeout=30)) == (
            "UNIMPLEMENTED",
            f"The development server answers predict calls only. Received: {method}. Ask by "
            "Predict, or run tensorflow/serving on the same files.",
        )
