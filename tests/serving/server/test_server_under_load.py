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
from tensorflow_serving.apis.get_model_status_pb2 import ModelVersionStatus
from tensorflow_serving.apis.model_service_pb2_grpc import ModelServiceStub
from tensorflow_serving.apis.prediction_service_pb2_grpc import PredictionServiceStub

from keras_mrl_serving.server import DevServer
from tests.helpers.server_target import TIMEOUT_S, predict, status
from tests.helpers.waiting import wait_until

NUM_ROUNDS = 40 if os.environ.get("KERAS_MRL_SOAK") else 1
NUM_CLIENTS = 8
AVAILABLE, END = ModelVersionStatus.AVAILABLE, ModelVersionStatus.END
X = np.arange(8, dtype=np.float32).reshape(2, 4)


class Numbered(tf.Module):
    """Adds its own version number to each of its outputs."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = tf.Variable(float(number))

    @tf.function(input_signature=[tf.TensorSpec((None, 4), name="x")])
    def add(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"sum": x + self.number, "number": tf.identity(self.number)}


class Clients:
    """Threads that ask without a pause; the answers they get, and the times of their refusals."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.answers: dict[int, int] = {}
        self.wrong: list[str] = []
        self.refusals: list[tuple[float, float, str]] = []
        self._stub = PredictionServiceStub(channel)
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run) for _ in range(NUM_CLIENTS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        request = predict(inputs={"x": X}, name="m")
        while not self._stopping.is_set():
            start = time.monotonic()
            try:
                response = self._stub.Predict(request, timeout=TIMEOUT_S)
            except grpc.RpcError as error:
                text = f"{error.code().name}: {error.details()}"
                with self._lock:
                    self.refusals.append((start, time.monotonic(), text))
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
    """One round, and forty in `make soak`."""
    server = DevServer(
        base, model_name="m", file_system_poll_wait_seconds=0.02, max_num_load_retries=0
    )
    half_copied: list[tuple[float, float]] = []  # when version 4 was there
    with server as target, grpc.insecure_channel(target) as channel:
        get_status = ModelServiceStub(channel).GetModelStatus

        def states() -> dict[int, int]:
            return {v.version: v.state for v in get_status(status(name="m")).model_version_status}

        def num_answers(number: int) -> int:
            return len(clients.refusals) if number == 4 else clients.answers.get(number, 0)

        def add(number: int) -> None:
            before = num_answers(number)
            put(base, number)
            wait_until(lambda: states().get(number) == AVAILABLE)
            wait_until(lambda: num_answers(number) > before)

        def remove(number: int, instead: int) -> None:
            shutil.rmtree(base / str(number))
            wait_until(lambda: states()[instead] == AVAILABLE and states()[number] == END)

        clients = Clients(channel)
        for _ in range(NUM_ROUNDS):
            add(2)
            put(base, 3)
            wait_until(lambda: states().get(3) == END)
            assert states()[2] == AVAILABLE  # it stands in for the broken one
            shutil.rmtree(base / "3")
            start = time.monotonic()
            add(4)
            remove(4, instead=2)
            half_copied.append((start, time.monotonic()))
            add(5)
            remove(5, instead=2)
            remove(2, instead=1)
        clients.stop()
    assert clients.wrong == []
    assert clients.answers.keys() == {1, 2, 5}
    assert clients.refusals
    assert [
        (began, ended, text)
        for began, ended, text in clients.refusals
        if not text.startswith("FAILED_PRECONDITION: ")
        or not any(began <= last and ended >= first for first, last in half_copied)
    ] == []
