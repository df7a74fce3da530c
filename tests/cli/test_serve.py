"""`keras-mrl serve`, as a user runs it: in a process of its own."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from keras_mrl_serving import Client, KerasMrlError
from keras_mrl_serving.contract import Manifest


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that follows the contract as far as `describe` and `embed_2` go."""
    base = tmp_path_factory.mktemp("models")
    manifest = Manifest(
        name="small",
        kind="encoder",
        fingerprint="0",
        dims=(2,),
        width=2,
        inputs={"inputs": {"dtype": "float32", "shape": [None, 2]}},
        made_with={},
    ).to_json()
    module = tf.Module()
    embed = tf.function(lambda inputs: {"embedding": 2.0 * inputs})
    describe = tf.function(lambda key: {"manifest": tf.fill(tf.shape(key), manifest)})
    signatures = {
        "embed_2": embed.get_concrete_function(inputs=tf.TensorSpec([None, 2], tf.float32)),
        "describe": describe.get_concrete_function(key=tf.TensorSpec([None], tf.string)),
    }
    tf.saved_model.save(module, str(base / "1"), signatures=signatures)
    return base


def start(*flags: str, path: str | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, **({"PATH": path} if path else {})}
    return subprocess.Popen(
        [sys.executable, "-m", "keras_mrl_cli", "serve", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def server(base_path: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    process = start(
        "--dev", "--model_name=small", f"--model_base_path={base_path}", f"--port={port}"
    )
    yield process
    process.kill()
    process.communicate()


def wait_for(client: Client) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            client.describe()
        except KerasMrlError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        else:
            return


def test_it_serves_the_folder_and_ends_on_sigterm(server: subprocess.Popen[str], port: int) -> None:
    with Client(f"127.0.0.1:{port}", model="small") as client:
        wait_for(client)
        assert client.embed(np.ones((3, 2)), dim=2).tolist() == [[2.0, 2.0]] * 3
    begun = time.monotonic()
    server.send_signal(signal.SIGTERM)
    out, err = server.communicate(timeout=20)
    assert server.returncode == 0
    assert time.monotonic() - begun < 10
    assert out == f"Serving 'small' at 127.0.0.1:{port}. Stop with Ctrl-C.\n"
    assert "for development and tests" in err


def ended(*flags: str) -> tuple[int, str]:
    process = start("--dev", *flags)
    _, err = process.communicate(timeout=60)
    refusal = err[err.find("keras-mrl: ") :]
    return process.returncode, refusal


def test_a_path_without_versions_is_refused(tmp_path: Path) -> None:
    assert ended("--model_name=m", f"--model_base_path={tmp_path}") == (
        1,
        "keras-mrl: base_path must hold a version of the model. Received: No versions of servable "
        f"m found under base path {tmp_path}. Did you forget to name your leaf directory as a "
        f"number (eg. '/1/')? Put the SavedModel at {tmp_path}/1, or give the folder above the "
        "numbered one.\n",
    )


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert ended(f"--model_base_path={missing}") == (
        1,
        f"keras-mrl: base_path must be a folder that can be read. Received: base_path="
        f"'{missing}' (No such file or directory). Export a model to {missing}/1 first, or "
        "correct the path.\n",
    )


def test_a_port_in_use_is_refused(base_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, sentence = ended(f"--model_base_path={base_path}", f"--port={port}")
    assert status == 1
    assert sentence == (
        f"keras-mrl: The address must be free. Received: host='127.0.0.1', port={port}, which "
        "cannot be bound. Choose another port, or port=0 for any free one.\n"
    )


@pytest.fixture
def path_with_the_real_server(tmp_path: Path) -> str:
    """A PATH on which `tensorflow_model_server` is a script that says its arguments."""
    script = tmp_path / "tensorflow_model_server"
    script.write_text('#!/bin/sh\necho "real $*"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return f"{tmp_path}{os.pathsep}{os.environ['PATH']}"


def test_the_real_server_runs_where_it_is_installed(
    base_path: Path, path_with_the_real_server: str
) -> None:
    flags = ("--model_name=m", f"--model_base_path={base_path}", "--port=8500")
    process = start(*flags, "--enable_batching=true", path=path_with_the_real_server)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out == (
        f"real --model_base_path={base_path} --model_name=m --port=8500 "
        "--file_system_poll_wait_seconds=1 --enable_batching=true\n"
    )


def test_dev_keeps_the_real_server_out(path_with_the_real_server: str, tmp_path: Path) -> None:
    process = start("--dev", f"--model_base_path={tmp_path}/no", path=path_with_the_real_server)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "real" not in out
    assert "base_path must be a folder" in err
