"""The server as a whole: its flags, what ends its start, its ports, its pollers and its end."""

import itertools
import json
import logging
import shutil
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tensorflow as tf
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tensorflow_serving.apis.classification_pb2 import ClassificationRequest
from tensorflow_serving.apis.inference_pb2 import MultiInferenceRequest
from tensorflow_serving.apis.model_management_pb2 import ReloadConfigRequest
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog
from tensorflow_serving.apis.prediction_service_pb2_grpc import PredictionServiceStub
from tensorflow_serving.apis.regression_pb2 import RegressionRequest

from keras_mrl_serving.server import DevServer
from keras_mrl_serving.server.grpc_messages import CallThreads
from tests.helpers.server_target import TIMEOUT_S, Served, label, predict, refusal
from tests.helpers.waiting import wait_until

Publish = Callable[[Path, str], Path]
LOGGER = "keras_mrl_serving.server"
X = np.arange(8, dtype=np.float32).reshape(2, 4)
WEIGHTS = np.arange(12, dtype=np.float32).reshape(4, 3)
BATCHING = """
max_batch_size { value: 32 } batch_timeout_micros { value: 2000 } num_batch_threads { value: 2 }
allowed_batch_sizes: [ 4, 32 ]
"""


class Setting:
    """A folder of models, and a config file that names them."""

    def __init__(self, root: Path, publish: Publish) -> None:
        self.root = root
        self.file = root / "models.config"
        self._publish = publish

    def put(self, model: str, *versions: int) -> Path:
        for version in versions:
            self._publish(self.root / model, str(version))
        return self.root / model

    def configure(self, **texts: str) -> Path:
        models = (
            f'config {{ name: "{name}" base_path: "{self.root / name}" '
            f'model_platform: "tensorflow" {text} }}'
            for name, text in texts.items()
        )
        self.file.write_text(f"model_config_list {{ {' '.join(models)} }}")
        return self.file

    def write(self, name: str, text: str) -> Path:
        file = self.root / name
        file.write_text(text)
        return file

    def reload_request(self, *names: str) -> ReloadConfigRequest:
        request = ReloadConfigRequest()
        for name in names:
            request.config.model_config_list.config.add(
                name=name, base_path=str(self.root / name), model_platform="tensorflow"
            )
        return request


@pytest.fixture
def setting(tmp_path: Path, publish: Publish) -> Setting:
    return Setting(tmp_path, publish)


@contextmanager
def serving(server: DevServer) -> Iterator[Served]:
    """The stubs of a server that runs for as long as the context lasts."""
    with server as target:
        served = Served(target, Path(), 1)
        with served.channel:
            yield served


def ask(server: DevServer, path: str, body: Any = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    url = f"http://127.0.0.1:{server.rest_api_port}/v1/models{path}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=TIMEOUT_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def state(server: DevServer, model: str) -> str:
    code, document = ask(server, f"/{model}")
    versions = document.get("model_version_status", [])
    return " ".join(f"{v['version']}:{v['state']}" for v in versions) if code == 200 else "none"


def test_models_policies_and_labels_from_a_file(setting: Setting) -> None:
    setting.put("a", 1, 2, 3)
    setting.put("b", 7)
    policy = "model_version_policy { specific { versions: 1 versions: 3 } } "
    file = setting.configure(a=policy + label("stable", 1) + label("new", 3), b=label("new", 7))
    server = DevServer(
        setting.root / "none",  # the file takes its place
        model_config_file=file,
        rest_api_port=0,
        allow_version_labels_for_unavailable_models=True,
    )
    body = {"instances": [[0.0, 0.0, 0.0, 1.0]]}
    with server:
        assert state(server, "a") == "3:AVAILABLE 1:AVAILABLE"
        assert state(server, "b") == "7:AVAILABLE"
        for path, number in (
            ("/a", "3"),
            ("/a/versions/1", "1"),
            ("/a/labels/stable", "1"),
            ("/a/labels/new", "3"),
            ("/b/labels/new", "7"),
        ):
            code, document = ask(server, f"{path}/metadata")
            assert (code, document["model_spec"]["version"]) == (200, number)
            assert ask(server, f"{path}:predict", body)[0] == 200
        error = {"error": "Unrecognized servable version label: stable"}
        assert ask(server, "/b/labels/stable:predict", body) == (400, error)
        assert ask(server, "/b/labels/stable/metadata") == (400, error)
        assert ask(server, "/a/labels/stable") == ask(server, "/a")  # a status ignores labels


def test_the_config_file_is_reloaded_again_and_again(setting: Setting) -> None:
    setting.put("a", 1)
    setting.put("b", 1)
    server = DevServer(
        model_config_file=setting.configure(a=""),
        model_config_file_poll_wait_seconds=0.02,
        rest_api_port=0,
    )
    with server:
        assert state(server, "b") == "none"
        setting.configure(a="", b="")
        wait_until(lambda: state(server, "b") == "1:AVAILABLE")
        setting.configure(b=label("stable", 1))
        wait_until(lambda: state(server, "a") == "1:END")
        wait_until(lambda: ask(server, "/b/labels/stable/metadata")[0] == 200)


def test_a_relative_base_path(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    setting.put("a", 1)
    monkeypatch.chdir(setting.root)
    server = DevServer("a", model_name="a", rest_api_port=0, file_system_poll_wait_seconds=0)
    with server:
        assert state(server, "a") == "1:AVAILABLE"


Start = Callable[[Setting], dict[str, Any]]


def relative_path(setting: Setting) -> dict[str, Any]:
    file = setting.configure(a="")
    file.write_text(file.read_text().replace(str(setting.root / "a"), "a"))
    return {"model_config_file": file}


def impossible_path(setting: Setting) -> dict[str, Any]:
    model = 'name: "a" base_path: "/a\\000b" model_platform: "tensorflow"'
    setting.file.write_text(f"model_config_list {{ config {{ {model} }} }}")
    return {"model_config_file": setting.file}


def folder_of_a_version(setting: Setting) -> dict[str, Any]:
    return {"base_path": setting.put("a", 1) / "1", "model_name": "a"}


def folder_without_a_model(setting: Setting) -> dict[str, Any]:
    (setting.root / "a" / "3").mkdir(parents=True)
    return {"base_path": setting.root / "a", "model_name": "a"}


def batching_without_its_flag(setting: Setting) -> dict[str, Any]:
    return {
        "base_path": setting.put("a", 1),
        "batching_parameters_file": setting.write("batching.config", BATCHING),
    }


def batching_that_cannot_work(setting: Setting) -> dict[str, Any]:
    text = "max_batch_size { value: 32 } allowed_batch_sizes: 16"
    return {
        "base_path": setting.put("a", 1),
        "enable_batching": True,
        "batching_parameters_file": setting.write("batching.config", text),
    }


def warm_up_that_fails(setting: Setting) -> dict[str, Any]:
    base_path = setting.put("a", 1)
    log = PredictionLog()
    log.predict_log.request.CopyFrom(predict(inputs={}, signature="none"))
    folder = base_path / "1" / "assets.extra"
    folder.mkdir()
    with tf.io.TFRecordWriter(str(folder / "tf_serving_warmup_requests")) as writer:
        writer.write(log.SerializeToString())
    return {"base_path": base_path}


NOT_SERVABLE = (
    "The config of the models must be one that can be served. Received: 'ROOT/models.config', "
)
NOT_LOADED = "The highest version must load. Received: version "
REMEDY = ". Export it again, or remove it so that a lower one is served."
ENDED_STARTS: dict[str, tuple[Start, type[Exception], str]] = {
    "no models": (
        lambda _: {},
        ValueError,
        "A DevServer must have models. Received: neither base_path nor model_config_file. Give "
        "one of them.",
    ),
    "relative path": (
        relative_path,
        ValueError,
        f"{NOT_SERVABLE}INVALID_ARGUMENT: Expected model a to have an absolute path or URI; got "
        "base_path()=a. Correct the file.",
    ),
    "label at the start": (
        lambda setting: {
            "base_path": setting.put("a", 1),
            "model_config_file": setting.configure(a=label("stable", 1)),
        },
        ValueError,
        f"{NOT_SERVABLE}FAILED_PRECONDITION: Request to assign label to version 1 of model a, "
        "which is not currently available for inference. At the start none is yet: leave the "
        "label out until a later reload, or give allow_version_labels_for_unavailable_models.",
    ),
    "request logging": (
        lambda setting: {"model_config_file": setting.configure(a="logging_config {}")},
        ValueError,
        f"{NOT_SERVABLE}INVALID_ARGUMENT: No request-logger-creator provided. Correct the file.",
    ),
    "no base path": (
        lambda setting: {"base_path": setting.root / "a"},
        FileNotFoundError,
        "base_path must be a folder that can be read. Received: base_path='ROOT/a' (No such file "
        "or directory). Export a model to ROOT/a first, or correct the path.",
    ),
    "impossible path": (
        impossible_path,
        FileNotFoundError,
        "base_path must be a folder that can be read. Received: base_path='/a\\x00b' (embedded "
        "null byte). Export a model to /a\0b first, or correct the path.",
    ),
    "no version": (
        folder_of_a_version,
        FileNotFoundError,
        "base_path must hold a version of the model. Received: No versions of servable a found "
        "under base path ROOT/a/1. Did you forget to name your leaf directory as a number (eg. "
        "'/1/')? Export a model to ROOT/a/1, or give the folder above the numbered one.",
    ),
    "absent version": (
        lambda setting: {
            "base_path": setting.put("a", 1),
            "model_config_file": setting.configure(
                a="model_version_policy { specific { versions: 9 } }"
            ),
        },
        FileNotFoundError,
        "A specific version must stand under base_path. Received: Version 9 of servable a, which "
        "was requested to be served as a 'specific' version in the servable's version policy, was "
        "not found in the file system. Name one of 1, or leave the policy out.",
    ),
    "no model": (
        folder_without_a_model,
        RuntimeError,
        f"{NOT_LOADED}3 of model a, NOT_FOUND: Specified file path does not appear to contain a "
        "SavedModel bundle (should have a file called `saved_model.pb`)\nSpecified file path: "
        f"ROOT/a/3{REMEDY}",
    ),
    "batching without its flag": (
        batching_without_its_flag,
        ValueError,
        "server_options.batching_parameters_file is set without setting "
        "server_options.enable_batching to true.",
    ),
    "batching that cannot work": (
        batching_that_cannot_work,
        RuntimeError,
        f"{NOT_LOADED}1 of model default, INVALID_ARGUMENT: Last entry in allowed_batch_sizes must "
        f"match max_batch_size; last entry was 16; expected 32{REMEDY}",
    ),
    "warm-up that fails": (
        warm_up_that_fails,
        RuntimeError,
        f"{NOT_LOADED}1 of model default, FAILED_PRECONDITION: Serving signature key "
        f'"none" not found{REMEDY}',
    ),
    "TLS file": (
        lambda setting: {"base_path": setting.root, "ssl_config_file": setting.root / "none"},
        OSError,
        "ssl_config_file must be a file that can be read. Received: ssl_config_file='ROOT/none' "
        "(No such file or directory). Correct the path.",
    ),
    "channel arguments": (
        lambda setting: {"base_path": setting.root, "grpc_channel_arguments": "a"},
        ValueError,
        "grpc_channel_arguments must be key=value pairs with commas between. Received: 'a' in "
        "grpc_channel_arguments='a'. Write them as in "
        "grpc.max_connection_age_ms=60000,grpc.so_reuseport=1.",
    ),
    "socket": (
        lambda setting: {
            "base_path": setting.put("a", 1),
            "grpc_socket_path": setting.root / "none" / "s",
        },
        OSError,
        "grpc_socket_path must be a path in a folder that can be written. Received: "
        "grpc_socket_path='ROOT/none/s', which cannot be bound. Choose another path.",
    ),
}


@pytest.mark.parametrize(("flags", "kind", "text"), ENDED_STARTS.values(), ids=ENDED_STARTS.keys())
def test_a_start_that_ends_at_once(
    setting: Setting, flags: Start, kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind) as caught:
        DevServer(**flags(setting)).start()
    assert str(caught.value) == text.replace("ROOT", str(setting.root))


def test_a_start_that_ends_leaves_nothing_loaded(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    setting.put("a", 1)
    (setting.root / "b" / "1").mkdir(parents=True)
    caplog.set_level(logging.INFO, LOGGER)
    with pytest.raises(RuntimeError, match=f"^{NOT_LOADED}1 of model b, NOT_FOUND: "):
        DevServer(model_config_file=setting.configure(a="", b="")).start()
    assert "a: version 1 unloaded" in caplog.messages


@pytest.mark.parametrize("flag", ["port", "rest_api_port"])
def test_a_port_that_is_taken_leaves_the_other_free(setting: Setting, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = {"port": 0, "rest_api_port": 0, flag: port}
        server = DevServer(setting.put("a", 1), **flags)
        with pytest.raises(OSError, match="The address must be free") as caught:
            server.start()
    assert str(caught.value) == (
        f"The address must be free. Received: host='127.0.0.1', {flag}={port}, which "
        f"cannot be bound. Choose another port, or {flag}=0 for any free one."
    )
    if flag == "port":
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", server.rest_api_port or 0))
    else:
        assert server.port == 0  # it was to be bound last


def test_a_port_of_a_running_server_is_taken(setting: Setting) -> None:
    server = DevServer(setting.put("a", 1))
    with server:
        assert server.rest_api_port is None
        with pytest.raises(OSError, match=f"Received: host='127.0.0.1', port={server.port}, which"):
            DevServer(setting.root / "a", port=server.port).start()


def test_below_zero_only_poll_reads_base_paths(setting: Setting) -> None:
    server = DevServer(
        setting.root / "a", model_name="a", rest_api_port=0, file_system_poll_wait_seconds=-1
    )
    server.poll()  # does nothing before the start
    with server:
        assert state(server, "a") == "none"
        setting.put("a", 1)
        assert state(server, "a") == "none"
        server.poll()
        assert state(server, "a") == "1:AVAILABLE"


def test_at_zero_only_poll_reads_the_base_paths_that_a_reload_adds(setting: Setting) -> None:
    setting.put("a", 1)
    setting.put("b", 1)
    server = DevServer(
        setting.root / "a", model_name="a", rest_api_port=0, file_system_poll_wait_seconds=0
    )
    with serving(server) as served:
        reload = served.future(setting.reload_request("b"))
        wait_until(lambda: state(server, "a") == "1:END")
        assert state(server, "b") == "none"
        server.poll()
        assert reload.code() is grpc.StatusCode.OK
        assert state(server, "b") == "1:AVAILABLE"


@pytest.mark.parametrize(("interval_s", "new"), [(3600, "LOADING"), (0, "END")])
def test_a_version_that_is_tried_again_is_loading(
    setting: Setting, interval_s: int, new: str
) -> None:
    server = DevServer(
        setting.put("a", 1),
        model_name="a",
        rest_api_port=0,
        file_system_poll_wait_seconds=0,
        max_num_load_retries=3,
        load_retry_interval_micros=interval_s * 10**6,
    )
    with server:
        (setting.root / "a" / "2").mkdir()
        server.poll()
        assert state(server, "a") == f"2:{new} 1:AVAILABLE"


def test_a_swap_under_traffic_fails_no_request(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    base = setting.put("m", 1)
    caplog.set_level(logging.INFO, LOGGER)
    server = DevServer(base, model_name="m", rest_api_port=0, file_system_poll_wait_seconds=0.02)
    request = predict(inputs={"x": X}, name="m")
    with server as target, grpc.insecure_channel(target) as channel:
        assert target == f"127.0.0.1:{server.port}"
        stub = PredictionServiceStub(channel)

        def version() -> int:
            # Without wait_for_ready: the port opened after the model was loaded.
            return int(stub.Predict(request, timeout=TIMEOUT_S).model_spec.version.value)

        versions = [version()]
        setting.put("m", 2)
        while versions[-1] == 1:
            versions.append(version())
        assert sorted(versions) == versions
    for port in (server.port, server.rest_api_port):
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port or 0))
    assert caplog.messages == [
        "This server is for development and tests. Production runs tensorflow/serving on the very "
        f"same files: {base}",
        f"m: version 1 loaded from {base / '1'}",
        f"m: serving {base} on {target}",
        f"REST on http://127.0.0.1:{server.rest_api_port}/v1/models",
        f"m: version 2 loaded from {base / '2'}",
        "m: version 1 unloaded",
        "m: version 2 unloaded",
    ]


def test_a_stop_ends_a_wait_and_there_is_no_second_start(setting: Setting) -> None:
    server = DevServer(setting.put("a", 1), file_system_poll_wait_seconds=0)
    server.start()
    events: list[str] = []

    def wait() -> None:
        server.wait()
        events.append("waited")

    waiting = threading.Thread(target=wait)
    waiting.start()
    events.append("stop")
    server.stop()
    waiting.join()
    assert events == ["stop", "waited"]
    with pytest.raises(RuntimeError) as caught:
        server.start()
    assert str(caught.value) == (
        "A DevServer starts once. Received: a second start(). Make another DevServer."
    )


def test_a_stop_cancels_no_call_that_has_come(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where gRPC holds them: the one thread that takes calls from it is busy with the first.

    That thread holds the lock that a stop of gRPC needs. Once both go on, they take turns. The
    first call is answered when the others have come, since a server that is quiet stops at once.
    """
    has_come, may_go_on, all_have_come = (threading.Event() for _ in range(3))
    submit = CallThreads.submit
    submitted = itertools.count(1)

    def submit_and_wait(self: CallThreads, call: Any, /, *args: Any, **kwargs: Any) -> Any:
        def call_later() -> Any:
            all_have_come.wait(5)
            return call(*args, **kwargs)

        future = submit(self, call_later)
        if next(submitted) == 65:
            all_have_come.set()
        has_come.set()
        assert may_go_on.wait(TIMEOUT_S)
        return future

    monkeypatch.setattr(CallThreads, "submit", submit_and_wait)
    request = predict(inputs={"steps": np.array(1)}, signature="count")
    server = DevServer(setting.put("a", 1))
    with grpc.insecure_channel(server.start()) as channel:
        stub = PredictionServiceStub(channel)
        calls = [stub.Predict.future(request, timeout=TIMEOUT_S)]
        assert has_come.wait(TIMEOUT_S)
        calls += [stub.Predict.future(request, timeout=TIMEOUT_S) for _ in range(64)]
        # gRPC itself refuses this one, which comes by the same connection: so those have come.
        too_large = [("metadata", "x" * 2**15)]
        with pytest.raises(grpc.RpcError, match="metadata size"):
            stub.Predict(request, timeout=TIMEOUT_S, metadata=too_large)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        stopping.join(0.5)  # it now waits, for the first call or for the lock
        may_go_on.set()
        codes = [call.code().name for call in calls]
        stopping.join()
    assert codes[0] == "OK"
    assert set(codes[1:]) <= {"OK", "UNAVAILABLE"}


def test_a_stop_ends_a_reload_that_waits(setting: Setting) -> None:
    server = DevServer(
        setting.put("a", 1), model_name="a", rest_api_port=0, file_system_poll_wait_seconds=0.02
    )
    with serving(server) as served:
        reload = served.future(setting.reload_request("b"))  # whose base path is missing
        wait_until(lambda: state(server, "a") == "1:END")
        server.stop()
        assert reload.code() is grpc.StatusCode.CANCELLED
        assert reload.details() == "Nobody waits for the reload any more."


def test_a_stop_does_not_wait_for_a_run_whose_deadline_has_passed(setting: Setting) -> None:
    server = DevServer(setting.put("a", 1))
    with grpc.insecure_channel(server.start()) as channel:
        endless = predict(inputs={"steps": np.array(2**62)}, signature="count")
        code, _ = refusal(lambda: PredictionServiceStub(channel).Predict(endless, timeout=0.1))
        assert code == "DEADLINE_EXCEEDED"
    stopping = threading.Thread(target=server.stop, daemon=True)
    stopping.start()
    wait_until(lambda: not stopping.is_alive(), "the stop")


@pytest.fixture(scope="module")
def batching(publish: Publish, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevServer]:
    base = tmp_path_factory.mktemp("batching")
    publish(base, "1")
    file = base / "batching.config"
    file.write_text(BATCHING)
    server = DevServer(base, enable_batching=True, batching_parameters_file=file, rest_api_port=0)
    with server:
        yield server


def test_rest_is_batched_too(batching: DevServer) -> None:
    body = {"signature_name": "add", "inputs": {"a": [1], "b": [1, 2]}}
    assert ask(batching, "/default:predict", body) == (
        400,
        {"error": "Batching Run() input tensors must have equal 0th-dimension size"},
    )


def test_warm_up_may_be_left_out(setting: Setting) -> None:
    flags = warm_up_that_fails(setting)
    with serving(DevServer(**flags, enable_model_warmup=False)) as served:
        assert served(predict(inputs={"x": X})).outputs


def test_with_tls(setting: Setting) -> None:
    ca = trustme.CA()
    pair = ca.issue_cert("127.0.0.1")
    (chain,) = pair.cert_chain_pems
    key = pair.private_key_pem.bytes().decode()
    file = setting.write("tls.txt", f'server_key: "{key}" server_cert: "{chain.bytes().decode()}"')
    with DevServer(setting.put("a", 1), ssl_config_file=file) as target:
        credentials = grpc.ssl_channel_credentials(ca.cert_pem.bytes())
        with grpc.secure_channel(target, credentials) as channel:
            stub = PredictionServiceStub(channel)
            assert stub.Predict(predict(inputs={"x": X}), timeout=TIMEOUT_S).outputs


@pytest.fixture(scope="module")
def many_flags(
    publish: Publish, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, str]]:
    folder = tmp_path_factory.mktemp("flags")
    publish(folder / "base", "1")
    path = folder / "grpc.sock"
    server = DevServer(
        folder / "base",
        grpc_socket_path=path,
        grpc_channel_arguments="grpc.max_connection_age_ms=60000",
        enable_grpc_healthcheck_service=True,
        enable_serialization_as_tensor_content=True,
    )
    with server as target:
        yield target, f"unix:{path}"
    shutil.rmtree(folder)


def test_port_and_socket_answer_in_tensor_content(many_flags: tuple[str, str]) -> None:
    for target in many_flags:
        with grpc.insecure_channel(target) as channel:
            request = predict(("y",), inputs={"x": X})
            response = PredictionServiceStub(channel).Predict(request, timeout=TIMEOUT_S)
        y = response.outputs["y"]
        assert y.tensor_content == (X @ WEIGHTS).tobytes()
        assert not y.float_val


def test_without_its_flag_there_is_no_health_service(batching: DevServer) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{batching.port}") as channel:
        check: Any = channel.unary_unary("/grpc.health.v1.Health/Check")
        code, _ = refusal(lambda: check(b"", timeout=TIMEOUT_S))
        assert code == "UNIMPLEMENTED"


def test_health(many_flags: tuple[str, str]) -> None:
    with grpc.insecure_channel(many_flags[0]) as channel:
        request = health_pb2.HealthCheckRequest(service="PredictionService")
        assert health_pb2_grpc.HealthStub(channel).Check(request, timeout=TIMEOUT_S).status == 1


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
        assert refusal(lambda: call(request_, timeout=TIMEOUT_S)) == (
            "UNIMPLEMENTED",
            f"The development server answers predict calls only. Received: {method}. Ask by "
            "Predict, or run tensorflow/serving on the same files.",
        )
