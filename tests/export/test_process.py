"""A model of any backend is rebuilt on TensorFlow, in a process that ends with this one."""

import importlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import pytest

from keras_mrl import MatryoshkaHead
from keras_mrl_export import ExportError, export_saved_model
from keras_mrl_export.process import module_search_path, run_child
from keras_mrl_serving._session import SavedModelSession
from tests.helpers import user_scripts
from tests.helpers.export_models import X, of_one_class, read_manifest
from tests.helpers.laws import on_backends
from tests.helpers.waiting import wait_until

BACKEND = keras.backend.backend()
# The backend's own functions, which a layer ought not to use.
NATIVE = importlib.import_module({"jax": "jax.numpy"}.get(BACKEND, BACKEND))
LOCK = threading.Lock()

in_two_processes = pytest.mark.skipif(BACKEND == "tensorflow", reason="that export is one process")


def model_with(*layers: keras.layers.Layer) -> keras.Model:
    inputs = keras.Input((5,), name="x")
    features = inputs
    for layer in layers:
        features = layer(features)
    return of_one_class(keras.Model(inputs, MatryoshkaHead(3, dims=(2, 5))(features)))


def refusal(base_path: Path, model: keras.Model) -> str:
    with pytest.raises(ExportError) as caught:
        export_saved_model(model, base_path / "new" / "models", X)
    assert os.listdir(base_path) == []
    return str(caught.value)


class Native(keras.layers.Layer):
    """A layer that calls the backend it was trained on."""

    def call(self, x: Any) -> Any:
        return NATIVE.tanh(x)


@pytest.mark.backend
@in_two_processes
def test_a_layer_of_the_backends_own_functions(tmp_path: Path) -> None:
    model = model_with(Native())
    text = refusal(tmp_path, model)
    assert text.startswith(
        "The model must load on the TensorFlow backend from its .keras form. Received: TypeError: "
    )
    assert text.endswith(
        "Give layers of your own a get_config() and keras.ops; replace Lambda layers by them."
    )
    assert "tanh" in text


class Moody(keras.layers.Layer):
    """A layer that is another one each time it is traced on TensorFlow."""

    def call(self, x: Any) -> Any:
        return x * (1.0 + (keras.backend.backend() == "tensorflow") * random.random())


def test_a_layer_that_differs_is_not_published(tmp_path: Path) -> None:
    text = refusal(tmp_path, model_with(Moody()))
    assert re.fullmatch(
        r"Every signature must equal the Keras model on the sample\. "
        r"Received: features differs: by \d+\.?\d*(e-\d+)? on rows of magnitude \d\.\d*\. "
        r"Nothing was published\. "
        r"Look for layers that act differently on each backend or at random when training=False\.",
        text,
    )


class Locked(keras.layers.Layer):
    """A layer whose code holds a lock, which does not travel."""

    def call(self, x: Any) -> Any:
        with LOCK:
            return keras.ops.tanh(x)


@pytest.mark.backend
@in_two_processes
def test_code_that_does_not_travel(tmp_path: Path) -> None:
    assert refusal(tmp_path, model_with(Locked())) == (
        "Layers of your own travel to TensorFlow by value, so their code must be picklable. "
        "Received: Locked, refused with TypeError: cannot pickle '_thread.lock' object. "
        "Move what they hold of open files, locks or devices into build() or call()."
    )


@pytest.mark.skipif(BACKEND != "tensorflow", reason="that export takes two processes")
def test_in_one_process_no_code_needs_to_travel(tmp_path: Path) -> None:
    model = model_with(Native(), Locked())
    path = export_saved_model(model, tmp_path, X, signatures=["features"])
    assert path.parent == tmp_path


@pytest.mark.backend
@in_two_processes
def test_a_process_that_ends_without_a_result_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python, base_path = tmp_path / "python", tmp_path / "models"
    python.write_text("#!/bin/sh\necho out of memory >&2\nexit 3\n")
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ExportError) as caught:
        export_saved_model(model_with(), base_path, X)
    assert str(caught.value) == (
        "The model must be rebuilt on TensorFlow in a process of its own. "
        "Received: that process ended with status 3 and said:\nout of memory\n"
        "Mend what it names; layers must use keras.ops, not the backend's own functions."
    )
    assert not base_path.exists()


# Scripts of the user's own


@pytest.mark.backend
@pytest.mark.parametrize("name", user_scripts.SCRIPTS)
def test_a_script_exports_parts_of_its_own_and_runs_once(tmp_path: Path, name: str) -> None:
    if (name == "inline") != (BACKEND == "jax"):
        pytest.skip("the other backends run the other script")
    ended = user_scripts.run(tmp_path, name)
    assert ended.status == 0, ended.errors
    (version,) = ended.base_path.iterdir()
    # Importing the export imports TensorFlow only where Keras runs on it.
    is_imported = str(BACKEND == "tensorflow")
    assert ended.output.splitlines() == [is_imported, "training", str(version)]
    assert ended.runs.read_text() == "once\n"
    assert read_manifest(version).made_with["trained_on"] == BACKEND
    with SavedModelSession(version) as session:
        assert "classify_8" in session.signatures


# The end of a process


_DEADLINE_S = 120

WRITES = """
import sys
from pathlib import Path
from keras_mrl_export.process import end_with_parent

folders = [Path(argument) for argument in sys.argv[1:]]
ending = end_with_parent(folders)
try:
    for number in range(100_000):
        (folders[number % 2] / str(number)).write_text("x")
finally:
    ending.acquire()
"""
EXPORTS = """
import sys
import keras
import numpy as np
from keras_mrl_export import export_saved_model

model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(64)])
export_saved_model(model, sys.argv[1], np.ones((4, 5), "float32"))
"""


@contextmanager
def killed_at_last(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """A test that fails must not wait for a process it started."""
    try:
        yield
    finally:
        process.kill()


def test_a_process_ends_with_its_parent_and_takes_its_folders_along(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    command = [sys.executable, "-c", WRITES, *map(str, folders)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        with killed_at_last(process):
            wait_until(lambda: (folders[1] / "301").exists())
            assert process.poll() is None
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(_DEADLINE_S) == 1
    wait_until(lambda: not os.listdir(tmp_path))


def test_a_child_ends_where_waiting_for_it_is_interrupted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import os, time; os.write(2, str(os.getpid()).encode()); time.sleep(600)"

    def interrupt() -> None:
        wait_until(lambda: log.exists() and log.read_text())
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_child([sys.executable, "-c", code], dict(os.environ), log)
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)


@pytest.mark.backend
@on_backends("torch")
def test_an_export_that_is_killed_publishes_nothing(tmp_path: Path) -> None:
    base_path, temporary = tmp_path / "models", tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "KERAS_BACKEND": BACKEND, "TMPDIR": str(temporary)}
    command = [sys.executable, "-c", EXPORTS, str(base_path)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        # The child writes: it would be done in a second or two, and this version published.
        with killed_at_last(process):
            wait_until(
                lambda: list(base_path.glob(".unfinished-*/model/variables")) or process.poll()
            )
            process.kill()
            assert process.wait(_DEADLINE_S) == -signal.SIGKILL
    wait_until(lambda: not list(temporary.glob("keras-mrl-*")))
    wait_until(lambda: not os.listdir(base_path))


def test_a_place_of_modules_that_is_no_str_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/a", Path("/b"), "", b"/c", None])
    assert module_search_path() == os.pathsep.join(["/a", os.getcwd()])
