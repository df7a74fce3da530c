"""Versions that come and go under eight clients: only what TensorFlow Serving fails may fail."""

import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis.get_model_status_pb2 import GetModelStatusRequest
from tensorflow_serving.apis.model_service_pb2_grpc import ModelServiceStub
from tensorflow_serving.apis.predict_pb2 import PredictRequest
from tensorflow_serving.apis.prediction_service_pb2_grpc import PredictionServiceStub

from keras_mrl_serving.server import DevServer
from tests.helpers.disk import wait_until

SECONDS = 30.0 if os.environ.get("KERAS_MRL_SOAK") else 2.0
NUM_CLIENTS = 8
X = np.arange(8, dtype=np.float32).reshape(2, 4)


class Numbered(tf.Module):
    """Says in each of its outputs which version it is."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = tf.Variable(float(number))

    @tf.function(input_signature=[tf.TensorSpec((None, 4), name="x")])
    def add(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"sum": x + self.number, "number": tf.identity(self.number)}


class Clients:
    """Threads that ask without a pause; what they were answered, and when they were refused."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.answers: dict[int, int] = {}
        self.wrong: list[str] = []
        self.refusals: list[tuple[float, float, str]] = []
        self._stub = PredictionServiceStub(channel)
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask_on) for _ in range(NUM_CLIENTS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _ask_on(self) -> None:
        request = PredictRequest()
        request.model_spec.name = "m"
        request.inputs["x"].CopyFrom(tf.make_tensor_proto(X))
        while not self._stopping.is_set():
            start = time.monotonic()
            try:
                response = self._stub.Predict(request, timeout=30.0)
            except grpc.RpcError as error:
                said = f"{error.code().name}: {error.details()}"
                with self._lock:
                    self.refusals.append((start, time.monotonic(), said))
                continue
            version = response.model_spec.version.value
            sums = np.reshape(response.outputs["sum"].float_val, X.shape)
            numbers = [version, *response.outputs["number"].float_val, *np.unique(sums - X)]
            with self._lock:
                self.answers[version] = self.answers.get(version, 0) + 1
                if set(numbers) != {version}:
                    self.wrong.append(str(numbers))


@pytest.fixture(scope="module")
def put(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, int], None]:
    """Puts a version in place as an exporter must: beside, then renamed."""
    models = tmp_path_factory.mktemp("numbered")
    for number in (1, 2, 4, 5):
        tf.saved_model.save(Numbered(number), str(models / str(number)))
    shutil.rmtree(models / "4" / "variables")  # half-copied
    (models / "3").mkdir()
    (models / "3" / "saved_model.pb").write_bytes(b"garbage")  # broken

    def put(base: Path, number: int) -> None:
        shutil.copytree(models / str(number), base / "copying")
        (base / "copying").rename(base / str(number))

    return put


@pytest.fixture
def base(tmp_path: Path, put: Callable[[Path, int], None]) -> Path:
    put(tmp_path, 1)
    return tmp_path


@pytest.mark.soak
def test_versions_come_and_go_under_load(base: Path, put: Callable[[Path, int], None]) -> None:
    """2 s, and 30 s in `make soak`."""
    server = DevServer(
        base, model_name="m", file_system_poll_wait_seconds=0.02, max_num_load_retries=0
    )
    bad: list[tuple[float, float]] = []
    with server as target, grpc.insecure_channel(target) as channel:
        status = ModelServiceStub(channel).GetModelStatus
        asked = GetModelStatusRequest()
        asked.model_spec.name = "m"

        def states() -> dict[int, int]:
            return {v.version: v.state for v in status(asked).model_version_status}

        def seen(number: int) -> int:
            return len(clients.refusals) if number == 4 else clients.answers.get(number, 0)

        def comes(number: int) -> None:
            before = seen(number)
            put(base, number)
            wait_until(lambda: states().get(number) == 30)
            wait_until(lambda: seen(number) > before)

        def goes(number: int, instead: int) -> None:
            shutil.rmtree(base / str(number))
            wait_until(lambda: states()[instead] == 30 and states()[number] == 50)

        clients = Clients(channel)
        end = time.monotonic() + SECONDS
        rounds = 0
        while time.monotonic() < end:
            comes(2)
            put(base, 3)
            wait_until(lambda: states().get(3) == 50)
            assert states()[2] == 30  # it stands in for the broken one
            shutil.rmtree(base / "3")
            start = time.monotonic()
            comes(4)
            goes(4, instead=2)
            bad.append((start, time.monotonic()))
            comes(5)
            goes(5, instead=2)
            goes(2, instead=1)
            rounds += 1
        clients.stop()
    assert rounds >= 1
    assert clients.wrong == []
    assert clients.answers.keys() == {1, 2, 5}
    texts = {said for _, _, said in clients.refusals}
    assert all(said.startswith("FAILED_PRECONDITION: ") for said in texts), texts
    assert texts
    outside = [
        said
        for began, ended, said in clients.refusals
        if not any(began <= last and ended >= first for first, last in bad)
    ]
    assert outside == []
    print(f"{rounds} rounds, answers {clients.answers}, {len(clients.refusals)} refused, {texts}")
