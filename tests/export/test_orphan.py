"""An export that is ended from outside publishes nothing and leaves nothing."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras
import pytest

from keras_mrl_cli.exporting.ending import ended_by_signals
from keras_mrl_export import process

BACKEND = keras.backend.backend()
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


def until(is_so: Callable[[], Any]) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def killed_at_last(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """A test that fails must not wait for what it started."""
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
            until(lambda: (folders[1] / "301").exists())
            assert process.poll() is None
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(_DEADLINE_S) == 1
    assert os.listdir(tmp_path) == []


def test_folders_are_removed_again_where_something_was_written_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, remove = tmp_path / "a", shutil.rmtree
    folder.mkdir()
    tries: list[Callable[[Path], object]] = [remove, str, str]
    ended: list[int] = []
    monkeypatch.setattr(os, "read", lambda *_: b"")
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: tries.pop()(path))
    process._watch([folder], threading.Lock())
    assert (ended, os.listdir(tmp_path)) == ([1], [])


def test_a_process_goes_where_waiting_for_it_fails(tmp_path: Path) -> None:
    said = tmp_path / "said"
    code = "import os, sys, time; os.write(2, str(os.getpid()).encode()); time.sleep(600)"

    command = [sys.executable, "-c", code]
    threading.Thread(target=_terminate_once_said, args=(said,)).start()
    with ended_by_signals(), pytest.raises(SystemExit):
        process._run(command, dict(os.environ), said)
    with pytest.raises(ProcessLookupError):
        os.kill(int(said.read_text()), 0)


def _terminate_once_said(said: Path) -> None:
    until(lambda: said.exists() and said.read_text())
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.backend
@pytest.mark.skipif(BACKEND == "tensorflow", reason="that export is one process")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_export_that_is_killed_publishes_nothing(tmp_path: Path, number: int) -> None:
    base_path, temporary = tmp_path / "models", tmp_path / "temporary"
    temporary.mkdir()
    environment = {**os.environ, "KERAS_BACKEND": BACKEND, "TMPDIR": str(temporary)}
    command = [sys.executable, "-c", EXPORTS, str(base_path)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        # The other process writes: it would be done, and publish, in a second or two.
        with killed_at_last(process):
            until(lambda: list(base_path.glob(".unfinished-*/model/variables")) or process.poll())
            process.send_signal(number)
            assert process.wait(_DEADLINE_S) == -number
    until(lambda: not list(temporary.glob("keras-mrl-*")))
    until(lambda: not os.listdir(base_path))


def test_what_is_no_str_among_the_places_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/a", Path("/b"), "", b"/c", None])
    assert process._search_path() == os.pathsep.join(["/a", os.getcwd()])
