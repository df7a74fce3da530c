"""`keras-mrl export` that is told to end: it removes what it wrote aside."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

pytestmark = pytest.mark.backend
_DEADLINE_S = 120


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_export_that_is_told_to_end_leaves_nothing(tmp_path: Path, number: int) -> None:
    base_path, temporary = tmp_path / "models", tmp_path / "temporary"
    temporary.mkdir()
    file = tmp_path / "plain.keras"
    keras.Sequential([keras.Input((5,)), keras.layers.Dense(64)]).save(file)
    np.save(tmp_path / "rows.npy", np.ones((4, 5), np.float32))
    arguments = [str(file), "--base-path", str(base_path), "--sample", str(tmp_path / "rows.npy")]
    # Under nohup a child would ignore what we ignore; what we handle it does not.
    before = signal.signal(number, lambda *_: None)
    process = subprocess.Popen(
        [sys.executable, "-m", "keras_mrl_cli", "export", *arguments],
        env={
            **os.environ,
            "KERAS_BACKEND": keras.backend.backend(),
            "TMPDIR": str(temporary),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    signal.signal(number, before)
    with process:
        deadline = time.monotonic() + _DEADLINE_S
        while process.poll() is None and not list(base_path.glob(".unfinished-*/model/variables")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(_DEADLINE_S) == 128 + number
        assert process.stdout is not None
        assert process.stdout.read() == b""
    assert not base_path.exists()
    assert not list(temporary.glob("keras-mrl-*"))
