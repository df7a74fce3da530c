"""The server as a whole, with a config: its start, its end, its labels over REST, its pollers."""

import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from tensorflow_serving.apis.get_model_status_pb2 import GetModelStatusRequest
from tensorflow_serving.apis.model_management_pb2 import ReloadConfigRequest
from tensorflow_serving.apis.model_service_pb2_grpc import ModelServiceStub

from keras_mrl_serving.server import DevServer
from tests.helpers.disk import wait_until

Publish = Callable[[Path, str], Path]


class Setting:
    """A folder of models and a config file that names them."""

    def __init__(self, root: Path, publish: Publish) -> None:
        self.root = root
        self.file = root / "models.config"
        self._publish = publish

    def put(self, model: str, *versions: int) -> None:
        for version in versions:
            self._publish(self.root / model, str(version))

    def configure(self, **texts: str) -> Path:
        models = (
            f'config {{ name: "{name}" base_path: "{self.root / name}" '
            f'model_platform: "tensorflow" {text} }}'
            for name, text in texts.items()
        )
        self.file.write_text(f"model_config_list {{ {' '.join(models)} }}")
        return self.file


@pytest.fixture
def setting(tmp_path: Path, publish: Publish) -> Setting:
    return Setting(tmp_path, publish)


def label(name: str, number: int) -> str:
    return f'version_labels {{ key: "{name}" value: {number} }} '


def ask(server: DevServer, path: str, body: Any = None) -> tuple[int, Any]:
    data = None if body is None else json.dumps(body).encode()
    url = f"http://127.0.0.1:{server.rest_api_port}/v1/models{path}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data), timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def state(server: DevServer, model: str) -> str:
    code, answer = ask(server, f"/{model}")
    found = answer.get("model_version_status", [])
    return " ".join(f"{v['version']}:{v['state']}" for v in found) if code == 200 else "none"


def test_models_policies_and_labels_from_a_file(setting: Setting) -> None:
    setting.put("a", 1, 2, 3)
    setting.put("b", 7)
    policy = "model_version_policy { specific { versions: 1 versions: 3 } } "
    file = setting.configure(a=policy + label("stable", 1) + label("new", 3), b=label("new", 7))
    server = DevServer(
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
            code, answer = ask(server, f"{path}/metadata")
            assert (code, answer["model_spec"]["version"]) == (200, number)
            assert ask(server, f"{path}:predict", body)[0] == 200
        said = {"error": "Unrecognized servable version label: stable"}
        assert ask(server, "/b/labels/stable:predict", body) == (400, said)
        assert ask(server, "/b/labels/stable/metadata") == (400, said)
        assert ask(server, "/a/labels/stable") == ask(server, "/a")  # a status ignores labels


def test_the_file_is_reloaded_now_and_then(setting: Setting) -> None:
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


def refusal(kind: type[Exception], *arguments: Any, **flags: Any) -> str:
    with pytest.raises(kind) as caught:
        DevServer(*arguments, **flags).start()
    return str(caught.value)


def test_without_models() -> None:
    assert refusal(ValueError) == (
        "A DevServer must have models. Received: neither base_path nor model_config_file. Give "
        "one of them."
    )


def test_a_config_that_cannot_be_served(setting: Setting) -> None:
    file = setting.configure(a="")
    file.write_text(file.read_text().replace(str(setting.root / "a"), "a"))
    assert refusal(ValueError, model_config_file=file) == (
        f"The config of the models must be one that can be served. Received: '{file}', "
        "INVALID_ARGUMENT: Expected model a to have an absolute path or URI; got base_path()=a. "
        "Correct the file."
    )


def test_a_label_at_the_start(setting: Setting) -> None:
    setting.put("a", 1)
    file = setting.configure(a=label("stable", 1))
    assert refusal(ValueError, model_config_file=file) == (
        f"The config of the models must be one that can be served. Received: '{file}', "
        "FAILED_PRECONDITION: Request to assign label to version 1 of model a, which is not "
        "currently available for inference. At the start none is yet: leave the label out until a "
        "later reload, or give allow_version_labels_for_unavailable_models."
    )


def test_one_model_without_its_folder(setting: Setting, caplog: pytest.LogCaptureFixture) -> None:
    setting.put("a", 1)
    caplog.set_level(logging.INFO)
    file = setting.configure(a="", b="")
    path = setting.root / "b"
    assert refusal(FileNotFoundError, model_config_file=file) == (
        f"base_path must be a folder that can be read. Received: base_path='{path}' (No such file "
        f"or directory). Export a model to {path}/1 first, or correct the path."
    )
    (path / "1").mkdir(parents=True)
    assert refusal(RuntimeError, model_config_file=file).startswith(
        "The highest version must load. Received: version 1 of model b, NOT_FOUND: "
    )
    assert "a: version 1 unloaded" in caplog.messages  # nothing stays behind


def test_a_version_asked_for_that_is_absent(setting: Setting) -> None:
    setting.put("a", 1)
    file = setting.configure(a="model_version_policy { specific { versions: 9 } }")
    assert refusal(FileNotFoundError, model_config_file=file) == (
        "A specific version must stand under base_path. Received: Version 9 of servable a, which "
        "was requested to be served as a 'specific' version in the servable's version policy, was "
        "not found in the file system. Name one of 1, or leave the policy out."
    )


def test_a_base_path_that_no_path_can_be(setting: Setting) -> None:
    file = setting.root / "models.config"
    model = 'name: "a" base_path: "/a\\000b" model_platform: "tensorflow"'
    file.write_text(f"model_config_list {{ config {{ {model} }} }}")
    assert refusal(FileNotFoundError, model_config_file=file).startswith(
        "base_path must be a folder that can be read. Received: base_path='/a\\x00b' (embedded "
    )


def test_a_config_file_takes_the_place_of_a_base_path(setting: Setting) -> None:
    setting.put("a", 1)
    file = setting.configure(a="")
    server = DevServer(setting.root / "none", model_config_file=file, rest_api_port=0)
    with server:
        assert state(server, "a") == "1:AVAILABLE"


def test_a_relative_base_path(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    setting.put("a", 1)
    monkeypatch.chdir(setting.root)
    server = DevServer("a", model_name="a", rest_api_port=0, file_system_poll_wait_seconds=0)
    with server:
        assert state(server, "a") == "1:AVAILABLE"


def test_below_zero_nobody_looks_but_poll(setting: Setting) -> None:
    server = DevServer(
        setting.root / "a", model_name="a", rest_api_port=0, file_system_poll_wait_seconds=-1
    )
    server.poll()  # before the start it is nothing
    with server:
        assert state(server, "a") == "none"
        setting.put("a", 1)
        assert state(server, "a") == "none"
        server.poll()
        assert state(server, "a") == "1:AVAILABLE"


def test_at_zero_what_a_reload_adds_is_never_looked_for(setting: Setting) -> None:
    setting.put("a", 1)
    setting.put("b", 1)
    request = ReloadConfigRequest()
    for name in ("a", "b"):
        request.config.model_config_list.config.add(
            name=name, base_path=str(setting.root / name), model_platform="tensorflow"
        )
    server = DevServer(
        setting.root / "a", model_name="a", rest_api_port=0, file_system_poll_wait_seconds=0
    )
    with grpc.insecure_channel(server.start()) as channel:
        stub = ModelServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.HandleReloadConfigRequest(request, timeout=0.3)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert state(server, "b") == "none"
        server.poll()
        assert state(server, "b") == "1:AVAILABLE"
    server.stop()


def test_a_stop_does_not_wait_for_a_reload_that_waits(setting: Setting) -> None:
    setting.put("a", 1)
    request = ReloadConfigRequest()
    request.config.model_config_list.config.add(
        name="b", base_path=str(setting.root / "b"), model_platform="tensorflow"
    )
    server = DevServer(setting.root / "a", model_name="a", file_system_poll_wait_seconds=0.02)
    with grpc.insecure_channel(server.start()) as channel:
        waiting = ModelServiceStub(channel).HandleReloadConfigRequest.future(request, timeout=60)
        seen = GetModelStatusRequest()
        seen.model_spec.name = "a"
        stub = ModelServiceStub(channel)
        wait_until(lambda: stub.GetModelStatus(seen).model_version_status[0].state == 50)
        start = time.monotonic()
        server.stop()
        assert time.monotonic() - start < 4
        assert waiting.code() is grpc.StatusCode.CANCELLED


def test_a_version_that_is_tried_again_is_loading(setting: Setting) -> None:
    setting.put("a", 1)
    server = DevServer(
        setting.root / "a",
        model_name="a",
        rest_api_port=0,
        file_system_poll_wait_seconds=0,
        max_num_load_retries=3,
        load_retry_interval_micros=20_000,
    )
    with server:
        (setting.root / "a" / "2").mkdir()
        server.poll()
        assert state(server, "a") == "2:LOADING 1:AVAILABLE"
        wait_until(lambda: state(server, "a") == "2:END 1:AVAILABLE")
