"""Versions come, are swapped, fail and go, and no request notices more than it must."""

import logging
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis.get_model_status_pb2 import ModelVersionStatus
from tensorflow_serving.apis.predict_pb2 import PredictRequest
from tensorflow_serving.apis.prediction_service_pb2_grpc import PredictionServiceStub

from keras_mrl_serving.server import DevServer
from keras_mrl_serving.server.config import single_model
from keras_mrl_serving.server.loading import LoadOptions, load
from keras_mrl_serving.server.models import Models, Retries
from keras_mrl_serving.server.requests import predict
from keras_mrl_serving.server.run import ServingSession
from keras_mrl_serving.server.status import StatusError, truncated

Publish = Callable[[Path, str], Path]
LOGGER = "keras_mrl_serving.server"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tmp_path / "base"


@pytest.fixture
def loads() -> list[str]:
    """The paths of all loads that were tried."""
    return []


@pytest.fixture
def make(base: Path, loads: list[str]) -> Iterator[Callable[[], Models]]:
    """Makes the models of a server: one, "m", whose versions are tried once."""
    made = []

    def loading(path: str) -> ServingSession:
        loads.append(path)
        return load(path, LoadOptions())

    def make() -> Models:
        models = Models(loading, Retries(max_num=0))
        models.watch(single_model("m", str(base)).model_config_list.config)
        models.poll()
        made.append(models)
        return models

    yield make
    for models in made:
        models.close()


@pytest.fixture
def model(base: Path, publish: Publish, make: Callable[[], Models]) -> Models:
    publish(base, "1")
    return make()


def latest(model: Models) -> int:
    with model.serving("m", None) as (number, _):
        return number


def states(model: Models) -> list[tuple[int, str]]:
    return [(v.number, ModelVersionStatus.State.Name(v.state)) for v in model.versions("m")]


def test_the_highest_version_is_served_not_the_last_in_name_order(
    base: Path, publish: Publish, make: Callable[[], Models]
) -> None:
    for name in ("9", "10"):
        publish(base, name)
    model = make()
    assert states(model) == [(10, "AVAILABLE")]
    model.close()
    assert states(model) == [(10, "END")]


def test_a_swap_and_a_swap_back(model: Models, base: Path, publish: Publish) -> None:
    publish(base, "2")
    model.poll()
    assert states(model) == [(2, "AVAILABLE"), (1, "END")]
    assert latest(model) == 2
    with pytest.raises(StatusError, match=r"^Servable not found for request: Specific\(m, 1\)$"):
        model.serving("m", 1).__enter__()
    shutil.rmtree(base / "2")
    model.poll()
    assert states(model) == [(2, "END"), (1, "AVAILABLE")]
    assert latest(model) == 1


def test_the_old_version_serves_until_the_new_one_does(base: Path, publish: Publish) -> None:
    seen: list[list[tuple[int, str]]] = []

    def watched(path: str) -> ServingSession:
        seen.append(states(models))
        return load(path, LoadOptions())

    models = Models(watched)
    publish(base, "1")
    models.watch(single_model("m", str(base)).model_config_list.config)
    models.poll()
    publish(base, "2")
    models.poll()
    assert seen == [[(1, "LOADING")], [(2, "LOADING"), (1, "AVAILABLE")]]
    models.close()


def test_an_unload_waits_for_the_requests_under_way(
    model: Models, base: Path, publish: Publish
) -> None:
    publish(base, "2")
    with model.serving("m", 1) as (_, session):
        poller = threading.Thread(target=model.poll)
        poller.start()
        while states(model) != [(2, "AVAILABLE"), (1, "UNLOADING")]:
            assert poller.is_alive()
        assert latest(model) == 2
        x = np.ones((1, 4), np.float32)
        assert session.run("serving_default", {"x": x})["total"] == 4
    poller.join()
    assert states(model) == [(2, "AVAILABLE"), (1, "END")]


def test_a_folder_being_copied_is_no_version(model: Models, base: Path) -> None:
    for name in ("2.tmp", "copying-3", ".4"):
        (base / name).mkdir()
    model.poll()
    assert states(model) == [(1, "AVAILABLE")]


def test_a_version_that_does_not_load_leaves_the_old_one(
    model: Models, base: Path, publish: Publish, loads: list[str]
) -> None:
    (base / "2").mkdir()
    model.poll()
    assert states(model) == [(2, "END"), (1, "AVAILABLE")]
    assert latest(model) == 1
    error = model.versions("m")[0].error
    assert error is not None
    assert (error.code, error.number) == (grpc.StatusCode.NOT_FOUND, 5)
    assert error.message == (
        "Specified file path does not appear to contain a SavedModel bundle (should have a file "
        f"called `saved_model.pb`)\nSpecified file path: {base / '2'}"
    )
    # Not tried again while it stays, even where it has become good.
    shutil.rmtree(base / "2")
    publish(base, "2")
    model.poll()
    # Nor where it was away for a while: the wish for version 1, which stands in for it, waits.
    (base / "2").rename(base / "gone")
    model.poll()
    (base / "gone").rename(base / "2")
    model.poll()
    assert loads == [str(base / "1"), str(base / "2")]
    assert states(model) == [(2, "END"), (1, "AVAILABLE")]
    publish(base, "3")
    model.poll()
    assert states(model) == [(3, "AVAILABLE"), (2, "END"), (1, "END")]


def test_a_version_that_did_not_load_is_tried_again_once_it_was_away(
    base: Path, publish: Publish, make: Callable[[], Models]
) -> None:
    (base / "2").mkdir(parents=True)
    model = make()
    assert states(model) == [(2, "END")]
    shutil.rmtree(base / "2")
    model.poll()
    publish(base, "2")
    model.poll()
    assert states(model) == [(2, "AVAILABLE")]
    assert model.versions("m")[0].error is None


def test_a_model_that_cannot_be_read_is_an_error_not_an_end(
    model: Models, base: Path, publish: Publish
) -> None:
    (publish(base, "2") / "saved_model.pb").write_bytes(b"garbage")
    model.poll()
    error = model.versions("m")[0].error
    assert error is not None
    assert error.code is grpc.StatusCode.DATA_LOSS
    assert latest(model) == 1


def test_without_versions_nothing_is_served(
    model: Models, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(base / "1")
    with caplog.at_level(logging.WARNING, LOGGER):
        model.poll()
        model.poll()
    assert states(model) == [(1, "END")]
    with pytest.raises(StatusError, match=r"^Servable not found for request: Latest\(m\)$"):
        latest(model)
    assert caplog.messages == [
        f"m: No versions of servable m found under base path {base}. Did you forget to name your "
        "leaf directory as a number (eg. '/1/')?"
    ]


def test_without_its_folder_a_model_stays(
    model: Models, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base.rename(base.with_name("away"))
    model.poll()
    model.poll()
    assert states(model) == [(1, "AVAILABLE")]
    assert caplog.messages == [f"m: base path {base} cannot be read: No such file or directory"]


def test_the_deadline_is_the_runs_own(model: Models) -> None:
    request = PredictRequest()
    request.model_spec.name = "m"
    request.model_spec.signature_name = "count"
    request.inputs["steps"].CopyFrom(tf.make_tensor_proto(10**7, tf.int64))
    with pytest.raises(StatusError, match=r"^Timed out waiting for notification$") as caught:
        predict(model, request, 0.1)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_request_given_up_does_not_hold_the_server(base: Path, publish: Publish) -> None:
    publish(base, "1")
    request = PredictRequest()
    request.model_spec.name = "default"
    request.model_spec.signature_name = "count"
    request.inputs["steps"].CopyFrom(tf.make_tensor_proto(10**7, tf.int64))
    server = DevServer(base)
    with grpc.insecure_channel(server.start()) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            PredictionServiceStub(channel).Predict(request, timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        start = time.monotonic()
        server.stop()  # waits for runs under way, and this one would take half a minute
    assert time.monotonic() - start < 10


def test_a_cut_text_has_no_half_character() -> None:
    assert truncated("s" * 1024) == "s" * 1024
    assert truncated("s" + "€" * 500) == "s" + "€" * 341 + "...TRUNCATED"
    assert truncated("ss" + "€" * 500) == "ss" + "€" * 340 + "...TRUNCATED"


def test_a_swap_under_traffic_fails_no_request(
    base: Path, publish: Publish, caplog: pytest.LogCaptureFixture
) -> None:
    publish(base, "1")
    request = PredictRequest()
    request.model_spec.name = "m"
    request.inputs["x"].CopyFrom(tf.make_tensor_proto(np.ones((1, 4), np.float32)))
    caplog.set_level(logging.INFO, LOGGER)
    server = DevServer(base, model_name="m", file_system_poll_wait_seconds=0.05)
    with server as target, grpc.insecure_channel(target) as channel:
        assert target == f"127.0.0.1:{server.port}"
        stub = PredictionServiceStub(channel)

        def answering() -> int:
            return stub.Predict(request, timeout=60.0).model_spec.version.value

        assert answering() == 1  # no wait_for_ready: the port opened after the model was loaded
        publish(base, "2")
        answers = [1]
        while answers[-1] == 1:
            answers.append(answering())
        assert sorted(answers) == answers
        base.rename(base.with_name("away"))
        while "cannot be read" not in caplog.text:
            assert answering() == 2
        time.sleep(0.2)  # four more looks, of which the log says nothing
        base.with_name("away").rename(base)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", server.port))
    log = [message for message in caplog.messages if "serving" in message or "loaded" in message]
    assert log == [
        "This server is for development and tests. Production runs tensorflow/serving on the very "
        f"same files: {base}",
        f"m: version 1 loaded from {base / '1'}",
        f"m: serving {base} on {target}",
        f"m: version 2 loaded from {base / '2'}",
        "m: version 1 unloaded",
        "m: version 2 unloaded",
    ]
    unread = [message for message in caplog.messages if "cannot be read" in message]
    assert unread == [f"m: base path {base} cannot be read: No such file or directory"]


def test_wait_ends_with_stop(base: Path, publish: Publish) -> None:
    publish(base, "1")
    server = DevServer(base, file_system_poll_wait_seconds=0)
    server.start()
    waiting = threading.Thread(target=server.wait)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    server.stop()
    waiting.join(10)
    assert not waiting.is_alive()
    with pytest.raises(RuntimeError) as caught:
        server.start()
    assert str(caught.value) == (
        "A DevServer starts once. Received: a second start(). Make another DevServer."
    )


def start_error(base: Path, kind: type[Exception], port: int = 0) -> str:
    with pytest.raises(kind) as caught:
        DevServer(base, model_name="m", port=port).start()
    return str(caught.value)


def test_no_base_path(base: Path) -> None:
    assert start_error(base, FileNotFoundError) == (
        f"base_path must be a folder that can be read. Received: base_path={str(base)!r} "
        f"(No such file or directory). Export a model to {base}/1 first, or correct the path."
    )


def test_no_versions(base: Path, publish: Publish) -> None:
    leaf = publish(base, "1")
    assert start_error(leaf, FileNotFoundError) == (
        "base_path must hold a version of the model. Received: No versions of servable m found "
        f"under base path {leaf}. Did you forget to name your leaf directory as a number (eg. "
        f"'/1/')? Put the SavedModel at {leaf}/1, or give the folder above the numbered one."
    )


def test_a_first_version_that_does_not_load(base: Path) -> None:
    (base / "3").mkdir(parents=True)
    assert start_error(base, RuntimeError) == (
        "The highest version must load. Received: version 3 of model m, NOT_FOUND: Specified file "
        "path does not appear to contain a SavedModel bundle (should have a file called "
        f"`saved_model.pb`)\nSpecified file path: {base / '3'}. Export it again, or remove it so "
        "that a lower one is served."
    )


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            b"",
            "NOT_FOUND: Could not find meta graph def matching supplied tags: { serve }. To "
            "inspect available tag-sets in the SavedModel, please use the SavedModel CLI: "
            "`saved_model_cli`",
        ),
        (b"garbage", "DATA_LOSS: Can't parse BASE/3/saved_model.pb as binary proto"),
    ],
)
def test_a_first_version_that_is_no_model(data: bytes, said: str, base: Path) -> None:
    (base / "3").mkdir(parents=True)
    (base / "3" / "saved_model.pb").write_bytes(data)
    assert start_error(base, RuntimeError) == (
        "The highest version must load. Received: version 3 of model m, "
        f"{said.replace('BASE', str(base))}. Export it again, or remove it so that a lower one is "
        "served."
    )


def test_a_first_version_whose_variables_are_cut_short(base: Path, publish: Publish) -> None:
    """In TensorFlow's words alone: Python puts some of its own before them."""
    publish(base, "3")
    (data,) = (base / "3" / "variables").glob("variables.data-*")
    data.write_bytes(data.read_bytes()[:-1])
    said = start_error(base, RuntimeError)
    assert said.startswith("The highest version must load. Received: version 3 of model m, ")
    assert ": Read less bytes than requested" in said
    assert "Graph execution error" not in said


def test_a_port_that_is_taken(base: Path, publish: Publish) -> None:
    publish(base, "1")
    server = DevServer(base)
    with server:
        assert start_error(base, OSError, server.port) == (
            f"The address must be free. Received: host='127.0.0.1', port={server.port}, which "
            "cannot be bound. Choose another port, or port=0 for any free one."
        )
