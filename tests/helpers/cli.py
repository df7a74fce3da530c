"""The command line as tests call it: in this process, or in one where some packages are missing."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from keras_mrl_cli.__main__ import main

KERAS_MRL = [sys.executable, "-m", "keras_mrl_cli"]
FRAMEWORKS = ("keras", "tensorflow", "tensorflow_serving", "jax", "torch", "keras_mrl")
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)

# The last line where files are bad, filled in with how many of how many.
BAD_FILES = (
    "keras-mrl: All files are checked before anything is sent. Received: {} of {} that cannot be "
    "used, named above. Mend them, or go on without them: --skip-unreadable."
)
ALL_BAD = BAD_FILES.replace(", or go on without them: --skip-unreadable", "")
LEFT_OUT = "keras-mrl: {} of {} files are left out, named above."

_BLOCKER = """
import json, os, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in json.loads(os.environ["BLOCKED"]):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
"""


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


class Call:
    """Calls `keras-mrl` in this process; words given beforehand come first."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *words: str) -> None:
        self._capsys = capsys
        self._words = words

    def __call__(self, *words: str) -> Ended:
        self._capsys.readouterr()
        status = main([*self._words, *words])
        printed = self._capsys.readouterr()
        return Ended(status, printed.out, printed.err)

    def of(self, *words: str) -> "Call":
        """The same with more words beforehand."""
        return Call(self._capsys, *self._words, *words)

    def refused(self, *words: str, status: int = 1) -> str:
        """The one line on stderr of a command that cannot go on, without the program's name."""
        ended = self(*words)
        assert (ended.status, ended.out) == (status, "")
        (line,) = ended.err.splitlines()
        assert line.startswith("keras-mrl: ")
        return line.removeprefix("keras-mrl: ")

    def misused(self, *words: str) -> str:
        """The line for flags that click refuses, without the hint at the help."""
        line = self.refused(*words, status=2)
        text, _, hint = line.partition(" Try 'keras-mrl")
        assert hint.endswith(" --help'."), line
        return text


def run_without(packages: Sequence[str], folder: Path, *words: str, **environment: str) -> Ended:
    """Run a command in a process of its own, in which these packages cannot be imported."""
    (folder / "sitecustomize.py").write_text(_BLOCKER)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "BLOCKED": json.dumps(packages), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,  # it hangs
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def end_reading_early(folder: Path, *words: str) -> tuple[int, bytes]:
    """Close stdout after a command's first line; its exit status, and stderr."""
    process = subprocess.Popen(
        [*KERAS_MRL, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    with process.stderr as stderr:
        err = stderr.read()
    return process.wait(timeout=600), err


class Terminal(io.StringIO):
    """A stderr on which progress is shown; one that sees `interrupt_at` is interrupted there."""

    def __init__(self, interrupt_at: str | None = None) -> None:
        super().__init__()
        self._interrupt_at = interrupt_at

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self._interrupt_at is not None and self._interrupt_at in text:
            self._interrupt_at = None
            raise KeyboardInterrupt
        return super().write(text)


def lines(out: str) -> list[Any]:
    """The JSON objects that a command printed."""
    return [json.loads(line) for line in out.splitlines()]


def paint(file: str, color: Any, size: tuple[int, int] = (12, 16), mode: str = "RGB") -> str:
    """Write an image of one colour; return its name."""
    Image.new(mode, size, color).save(file)
    return file


# The model that the tests of `export`, `inspect` and `deploy` look at.

MAKE = """
import keras
import numpy as np
from keras_mrl import MatryoshkaClassifier, MatryoshkaHead
from my_layers import Twice
backbone = keras.Sequential([keras.Input((6,), name="x"), keras.layers.Dense(16), Twice()])
model = MatryoshkaClassifier(backbone, MatryoshkaHead(5, (2, 4, 16)), name="tiny_One")
model.predict(np.ones((2, 6), "float32"), verbose=0)
model.compile(loss="sparse_categorical_crossentropy")
model.save("tiny.keras")
"""

LAYERS = """
import keras

@keras.saving.register_keras_serializable(package="mine")
class Twice(keras.layers.Layer):
    def call(self, x):
        return 2 * x
"""

CASCADE = {
    "stages": [
        {"dim": 2, "threshold": 0.5, "temperature": 2.0},
        {"dim": 16, "threshold": None, "temperature": 1.0},
    ],
    "confidence": "max_probability",
    "expected_dim": 9.0,
    "cumulative_dim": 11.0,
    "accuracy": 0.75,
    "full_accuracy": 0.8,
    "exit_fractions": [0.5, 0.5],
    "holdout_size": 40,
    "method": "by hand",
}

LABELS = ("lynx", "ibex", "otter", "grüner Specht", "hare")


@dataclass(frozen=True)
class Exported:
    """What `keras-mrl export` wrote and printed."""

    folder: Path
    out: str
    err: str

    @property
    def base_path(self) -> Path:
        return self.folder / "models"


def export_tiny_model(folder: Path) -> Exported:
    """Save a classifier with a layer of the user's own, and export it from that folder."""
    (folder / "my_layers.py").write_text(LAYERS)
    (folder / "policy.json").write_text(json.dumps(CASCADE))
    (folder / "labels.txt").write_text("\n".join(LABELS) + "\n", "utf-8")
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    subprocess.run([sys.executable, "-c", MAKE], cwd=folder, env=environment, check=True)
    words = [*KERAS_MRL, "export", "tiny.keras", "--base-path", "models", "--version", "1"]
    words += ["--top-k", "3"]
    words += ["--import", "my_layers", "--policy", "policy.json", "--labels", "labels.txt"]
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return Exported(folder, done.stdout, done.stderr)


# The gallery that the tests of `index` build indexes of.

GALLERY_ROWS, GALLERY_WIDTH = 600, 32
BUILD = ("build", "--embeddings", "E.npy", "--out", "a.index")
GIVEN = ("--dims", "8,32", "--shortlists", "60")  # a funnel, so that none is planned


def embeddings(rows: int = GALLERY_ROWS, seed: int = 0) -> npt.NDArray[np.float32]:
    """Rows as a Matryoshka model gives them: the first coordinates matter most."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, GALLERY_WIDTH)) * 0.8 ** np.arange(GALLERY_WIDTH)
    return values.astype(np.float32)
