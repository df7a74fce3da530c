"""`keras-mrl serve`: the development server, its end, its errors, and the real one in its place."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import numpy as np
import pytest
import trustme
from tensorflow_serving.apis.prediction_service_pb2_grpc import PredictionServiceStub

from keras_mrl_cli.serve import FLAGS
from keras_mrl_serving import Client
from tests.helpers.cli import KERAS_MRL, Call, Exported
from tests.helpers.endless_models import put_endless_load, save_endless
from tests.helpers.hostile_peers import open_connections, post
from tests.helpers.server_target import predict
from tests.helpers.waiting import wait_until

SERVE = [*KERAS_MRL, "serve"]
X = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)


@pytest.fixture
def base_path(exported: Exported) -> Path:
    """The folder of an exported model."""
    return exported.base_path


@pytest.fixture
def no_real_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@contextmanager
def serving(
    *flags: str, cwd: Path, served: str = "'tiny'"
) -> Iterator[tuple[subprocess.Popen[str], str, str | None]]:
    """The server in a process of its own, and the addresses it says it serves at."""
    process = subprocess.Popen(
        [*SERVE, "--port", "0", *flags],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.fullmatch(
            rf"Serving {re.escape(served)} at "
            r"(127\.0\.0\.1:\d+)(?: and (http://127\.0\.0\.1:\d+))?\. "
            r"Stop with Ctrl-C\.\n",
            line,
        )
        assert match, line or process.communicate()[1]
        yield process, match[1], match[2]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.usefixtures("no_real_server")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_a_signal_ends_it(base_path: Path, number: signal.Signals) -> None:
    flags = ("--model_name", "tiny", "--model_base_path", base_path.name)  # relative to cwd
    with serving(*flags, cwd=base_path.parent) as (process, target, http):
        assert http is None
        with Client(target, model="tiny") as client:
            assert client.describe().dims == (2, 4, 16)
            lengths = np.linalg.norm(client.embed(X, dim=2), axis=1)
            np.testing.assert_allclose(lengths, 1, rtol=1e-5)
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert out == ""
    assert "Traceback" not in err
    assert "This server is for development and tests." in err


@pytest.mark.usefixtures("no_real_server")
def test_a_signal_right_after_its_first_line_ends_it_too(base_path: Path) -> None:
    flags = ("--model_name=tiny", f"--model_base_path={base_path}")
    with serving(*flags, cwd=base_path.parent) as (process, _, _):
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 0


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base path of a model whose calls need not end."""
    base = tmp_path_factory.mktemp("endless")
    save_endless(base / "1")
    return base


@contextmanager
def serving_endless_calls(
    base: Path, folder: Path
) -> Iterator[tuple[subprocess.Popen[str], list[Any]]]:
    """A server in the middle of everything that could keep it from ending.

    A run that can be cancelled and one that cannot, over gRPC; one over REST; a load of another
    version; slow and silent connections at both ports.
    """
    shutil.copytree(base, folder / "base")
    pipe = folder / "pipe"
    os.mkfifo(pipe)
    flags = (
        "--model_name=tiny",
        f"--model_base_path={folder / 'base'}",
        "--rest_api_port=0",
        "--rest_api_timeout_in_ms=0",
    )
    with (
        serving(*flags, cwd=folder) as (process, target, http),
        grpc.insecure_channel(target) as channel,
    ):
        assert http
        rest_port, grpc_port = (int(text.rpartition(":")[2]) for text in (http, target))
        stub = PredictionServiceStub(channel)
        steps, path = np.array(2**62), np.array(str(pipe))
        calls = [
            stub.Predict.future(predict(inputs=inputs, name="tiny", signature=signature))
            for inputs, signature in (({"steps": steps}, "count"), ({"path": path}, "read"))
        ]
        body = json.dumps({"signature_name": "count", "inputs": 2**62}).encode()
        put_endless_load(folder / "base" / "2")
        asked = post(body).replace(b"/default:", b"/tiny:")
        with (
            open_connections(rest_port, 1, asked),
            open_connections(rest_port, 100, asked[:-9]),
            open_connections(rest_port, 100),
            open_connections(grpc_port, 100),
        ):

            def state_of_2() -> str:
                with urlopen(f"{http}/v1/models/tiny", timeout=30) as response:
                    return str(json.load(response)["model_version_status"][0])

            wait_until(lambda: "LOADING" in state_of_2())
            assert not any(call.done() for call in calls)
            yield process, calls


@pytest.mark.usefixtures("no_real_server")
def test_a_signal_ends_it_whatever_is_under_way(endless: Path, tmp_path: Path) -> None:
    with serving_endless_calls(endless, tmp_path) as (process, calls):
        process.terminate()
        _, err = process.communicate(timeout=60)
        assert [call.code().name for call in calls] == ["UNAVAILABLE"] * 2
        cut_off = calls[0].details()
    assert "Traceback" not in err
    if process.returncode:  # where the machine is too busy to stop in order
        assert process.returncode == 1
        assert "keras-mrl: The server did not end within 10 s. It is ended now.\n" in err
    else:
        assert cut_off == "The server was stopped before it answered."
        assert "2 calls are cut off: UNAVAILABLE." in err
        assert f"A run on {tmp_path}/base/1 does not end; it is left behind." in err
        assert "A load or an unload does not end; it is left behind." in err


@pytest.mark.usefixtures("no_real_server")
def test_a_second_signal_ends_it_at_once(endless: Path, tmp_path: Path) -> None:
    with serving_endless_calls(endless, tmp_path) as (process, _):
        assert process.stderr
        process.terminate()
        while not process.stderr.readline().startswith("keras-mrl: Stopping. Requests under way "):
            pass
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "left behind" not in err


@pytest.mark.usefixtures("no_real_server")
def test_a_signal_ends_it_while_it_loads(tmp_path: Path) -> None:
    put_endless_load(tmp_path / "base" / "1")
    process = subprocess.Popen(
        [*SERVE, "--port=0", f"--model_base_path={tmp_path / 'base'}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    while "This server is for development and tests." not in process.stderr.readline():
        pass
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + signal.SIGTERM, "")


@pytest.mark.usefixtures("no_real_server")
def test_it_serves_rest_and_tls(base_path: Path, tmp_path: Path) -> None:
    authority = trustme.CA()
    pair = authority.issue_cert("127.0.0.1")
    config = tmp_path / "tls.txt"
    chain = "".join(pem.bytes().decode() for pem in pair.cert_chain_pems)
    config.write_text(
        f'server_key: "{pair.private_key_pem.bytes().decode()}"\nserver_cert: "{chain}"\n'
    )
    flags = (
        "--model_name=tiny",
        f"--model_base_path={base_path}",
        "--rest_api_port=0",
        f"--ssl_config_file={config}",
    )
    with serving(*flags, cwd=tmp_path) as (process, target, http):
        root = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
        with grpc.secure_channel(target, root) as channel:
            grpc.channel_ready_future(channel).result(timeout=30)
        with urlopen(f"{http}/v1/models/tiny", timeout=30) as response:
            assert json.load(response)["model_version_status"][0]["state"] == "AVAILABLE"
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 0


@pytest.mark.usefixtures("no_real_server")
def test_a_tls_file_that_is_none(base_path: Path, tmp_path: Path, call: Call) -> None:
    config = tmp_path / "tls.txt"
    flags = (f"--model_base_path={base_path}", "--port=0", f"--ssl_config_file={config}")
    assert refusal(call, *flags) == (
        f"ssl_config_file must be a file that can be read. Received: ssl_config_file='{config}' "
        "(No such file or directory). Correct the path."
    )


def refusal(call: Call, *flags: str) -> str:
    """The last line on stderr of a server that does not start; its log comes before."""
    status, out, err = call("serve", "--model_name", "m", *flags)
    assert (status, out) == (1, "")
    line = err.splitlines()[-1]
    assert line.startswith("keras-mrl: ")
    return line.removeprefix("keras-mrl: ")


@pytest.fixture
def no_tensorflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading it takes seconds, after which a refusal that needs none of it would come late."""
    monkeypatch.setitem(sys.modules, "keras_mrl_serving.server.server", None)


@pytest.mark.usefixtures("no_real_server", "no_tensorflow")
def test_a_base_path_that_is_not_there(tmp_path: Path, call: Call) -> None:
    missing = tmp_path / "none"
    assert refusal(call, f"--model_base_path={missing}") == (
        f"base_path must be a folder that can be read. Received: base_path='{missing}' "
        f"(No such file or directory). Export a model to {missing} first, or correct the path."
    )


@pytest.mark.usefixtures("no_real_server", "no_tensorflow")
def test_a_base_path_without_versions(base_path: Path, call: Call) -> None:
    leaf = base_path / "1"
    assert refusal(call, f"--model_base_path={leaf}") == (
        "base_path must hold a version of the model. Received: No versions of servable m found "
        f"under base path {leaf}. Did you forget to name your leaf directory as a number (eg. "
        f"'/1/')? Export a model to {leaf}, or give the folder above the numbered one."
    )


@pytest.mark.usefixtures("no_real_server")
def test_a_model_config_that_does_not_parse(tmp_path: Path, call: Call) -> None:
    """Scripts look on stderr for these words, which are TensorFlow Serving's."""
    config = tmp_path / "models.config"
    config.write_text('model_config_list {\n  config { nam: "m" }\n}\n')
    assert (
        "Error parsing text-format tensorflow.serving.ModelServerConfig: 2:15: Message type "
        '"tensorflow.serving.ModelConfig" has no field named "nam"'
    ) in refusal(call, f"--model_config_file={config}")


@pytest.mark.usefixtures("no_real_server", "no_tensorflow")
@pytest.mark.parametrize("flag", ["port", "rest_api_port"])
def test_a_port_in_use(flag: str, base_path: Path, call: Call) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        sentence = refusal(call, f"--model_base_path={base_path}", "--port=0", f"--{flag}={port}")
    assert sentence == (
        f"The address must be free. Received: host='127.0.0.1', {flag}={port}, which cannot be "
        f"bound. Choose another port, or {flag}=0 for any free one."
    )


@pytest.mark.parametrize("flag", ["port", "rest_api_port"])
@pytest.mark.parametrize("port", [-1, 65536, 70000])
def test_a_port_that_is_none(flag: str, port: int, call: Call) -> None:
    assert call.refused("serve", "--model_base_path=x", f"--{flag}={port}", status=2) == (
        f"--{flag} must lie in 0..65535. Received: {port}. Choose another, or 0 for any free one."
    )


@pytest.fixture
def fake_server(tmp_path: Path) -> Path:
    """A `tensorflow_model_server` that prints what it was started with."""
    fake = tmp_path / "bin" / "tensorflow_model_server"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$0" "$@"\nexit 7\n')
    fake.chmod(0o755)
    return fake


def start_with(fake: Path, *flags: str) -> tuple[int, list[str], str]:
    done = subprocess.run(
        [*SERVE, *flags],
        cwd=fake.parents[1],
        env={**os.environ, "PATH": f"{fake.parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_the_real_server_takes_its_place_with_the_same_flags(fake_server: Path) -> None:
    status, out, err = start_with(
        fake_server,
        "--model_name=digits",
        "--model_base_path=models/digits",
        "--port=8501",
        "--rest_api_port=8502",
        "--enable_batching",
        "--enable_model_warmup=false",
        "--ssl_config_file=tls.txt",
        "--grpc_max_threads=1",
    )
    assert (status, err) == (7, "")  # its status, so it is the same process
    assert out == [
        str(fake_server),
        f"--model_base_path={fake_server.parents[1]}/models/digits",
        "--model_name=digits",
        "--port=8501",
        "--file_system_poll_wait_seconds=1",
        "--rest_api_port=8502",
        "--ssl_config_file=tls.txt",
        "--enable_batching=true",
        "--enable_model_warmup=false",
        "--grpc_max_threads=1",
    ]


def test_a_base_path_with_a_scheme_is_left_alone(fake_server: Path) -> None:
    _, out, _ = start_with(fake_server, "--model_base_path=s3://bucket/digits")
    assert out[1:] == [
        "--model_base_path=s3://bucket/digits",
        "--model_name=default",
        "--port=8500",
        "--file_system_poll_wait_seconds=1",
    ]


def test_dev_asks_for_the_development_server_all_the_same(
    fake_server: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Call,
) -> None:
    monkeypatch.setenv("PATH", str(fake_server.parent))
    sentence = refusal(call, "--dev", f"--model_base_path={tmp_path / 'none'}")
    assert sentence.startswith("base_path must be a folder that can be read. ")


def test_a_config_file_needs_no_base_path(fake_server: Path) -> None:
    _, out, _ = start_with(fake_server, "--model_config_file=models.config", "--port=1")
    assert out[1:] == [
        "--model_name=default",
        "--port=1",
        "--file_system_poll_wait_seconds=1",
        "--model_config_file=models.config",
    ]


def test_neither_a_base_path_nor_a_config_file(call: Call) -> None:
    assert call.refused("serve", "--port=1", status=2) == (
        "A server must have models. Received: neither --model_base_path nor "
        "--model_config_file. Give one of them."
    )


def test_a_boolean_that_is_none(call: Call) -> None:
    assert call.misused("serve", "--model_base_path=x", "--enable_batching=maybe") == (
        "Invalid value for '--enable_batching': must be true or false. Received: maybe."
    )


@pytest.mark.parametrize("flag", ["--grpc_max_threads=1", "--flush_filesystem_caches"])
def test_dev_refuses_flags_of_the_real_server_by_name(
    fake_server: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Call,
    flag: str,
) -> None:
    monkeypatch.setenv("PATH", str(fake_server.parent))
    words = ("serve", "--dev", "--model_base_path=x", flag, "--prot=1")
    assert call.refused(*words, status=2) == (
        "The development server must be started with flags it has. Received: "
        f"{flag}, of tensorflow_model_server alone. Leave them out here, and give them to "
        "tensorflow/serving."
    )


def test_dev_refuses_flags_that_nobody_has(
    fake_server: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    monkeypatch.setenv("PATH", str(fake_server.parent))
    assert call.refused("serve", "--dev", "--model_base_path=x", "--prot=1", status=2) == (
        "Only known flags are taken. Received: --prot=1. See the command's "
        "--help for those there are. tensorflow_model_server may know more."
    )


def test_every_flag_is_an_argument_of_the_development_server(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: Call
) -> None:
    from keras_mrl_serving.server import DevServer

    taken: dict[str, object] = {}

    class Taking(DevServer):
        def __init__(self, base_path: str | None = None, **flags: Any) -> None:
            taken.update(flags, base_path=base_path)
            super().__init__(base_path, **flags)

        def start(self) -> str:
            raise OSError("enough")

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("keras_mrl_serving.server.DevServer", Taking)
    values: dict[str, object] = {
        "model_name": "m",
        "model_config_file": "models.config",
        "model_config_file_poll_wait_seconds": 2,
        "port": 1,
        "rest_api_port": 2,
        "rest_api_timeout_in_ms": 3,
        "grpc_socket_path": "/tmp/s",
        "grpc_channel_arguments": "a=1,b=2",
        "file_system_poll_wait_seconds": 0,
        "enable_batching": True,
        "batching_parameters_file": "batching.config",
        "ssl_config_file": "tls.txt",
        "enable_model_warmup": False,
        "enable_grpc_healthcheck_service": True,
        "enable_serialization_as_tensor_content": True,
        "allow_version_labels_for_unavailable_models": True,
        "max_num_load_retries": 1,
        "load_retry_interval_micros": -1,
    }
    texts = [f"--{name}={str(value).lower()}" for name, value in values.items()]
    ended = call("serve", "--model_base_path=/models", *texts)
    assert ended.status == 1
    assert ended.err.endswith("keras-mrl: enough\n")
    assert taken == {**values, "base_path": "/models", "host": "127.0.0.1"}
    assert set(values) | {"model_base_path"} == set(FLAGS)


@pytest.mark.parametrize(
    ("words", "value"),
    [(["true"], "true"), (["false"], "false"), ([], "true"), (["--port=1"], "true")],
)
def test_a_boolean_may_have_a_word_or_none(fake_server: Path, words: list[str], value: str) -> None:
    flags = ["--model_base_path=/models", "--enable_batching", *words]
    _, out, _ = start_with(fake_server, *flags)
    assert f"--enable_batching={value}" in out


def test_unknown_flags_reach_the_real_server_with_their_words(fake_server: Path) -> None:
    flags = ["--model_base_path=/models", "--grpc_max_threads", "4", "--num_load_threads=2"]
    _, out, _ = start_with(fake_server, *flags)
    assert out[-3:] == ["--grpc_max_threads", "4", "--num_load_threads=2"]


@pytest.mark.usefixtures("no_real_server")
def test_it_serves_the_models_of_a_config_file(base_path: Path, tmp_path: Path) -> None:
    config = tmp_path / "models.config"
    config.write_text(
        f'''model_config_list {{ config {{
            name: "tiny" base_path: "{base_path}" model_platform: "tensorflow"
            version_labels {{ key: "stable" value: 1 }} }} }}'''
    )
    flags = (
        f"--model_config_file={config}",
        "--rest_api_port=0",
        "--allow_version_labels_for_unavailable_models",
    )
    with serving(*flags, cwd=tmp_path, served=f"the models of '{config}'") as (process, _, http):
        with urlopen(f"{http}/v1/models/tiny/labels/stable/metadata", timeout=30) as response:
            assert json.load(response)["model_spec"]["version"] == "1"
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 0
