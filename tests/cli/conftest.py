"""One model that the command itself has exported, for those that look at what was exported."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

MAKE = """
import keras
import numpy as np
from keras_mrl import MatryoshkaClassifier, MatryoshkaHead
from my_layers import Twice
backbone = keras.Sequential([keras.Input((6,), name="x"), keras.layers.Dense(16), Twice()])
model = MatryoshkaClassifier(backbone, MatryoshkaHead(5, (2, 4, 16)), name="tiny_One")
model.predict(np.ones((2, 6), "float32"), verbose=0)
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
KERAS_MRL = [sys.executable, "-m", "keras_mrl_cli"]


@dataclass(frozen=True)
class Exported:
    """What `keras-mrl export` left, and what it said."""

    folder: Path
    out: str
    err: str

    @property
    def base_path(self) -> Path:
        return self.folder / "models"


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A classifier with a layer of the user's own, exported from a folder with its module."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "my_layers.py").write_text(LAYERS)
    (folder / "policy.json").write_text(json.dumps(CASCADE))
    (folder / "labels.txt").write_text("\n".join(LABELS) + "\n", "utf-8")
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    subprocess.run([sys.executable, "-c", MAKE], cwd=folder, env=environment, check=True)
    command = [*KERAS_MRL, "export", "tiny.keras", "--base-path", "models", "--top-k", "3"]
    command += ["--import", "my_layers", "--policy", "policy.json", "--labels", "labels.txt"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return Exported(folder, done.stdout, done.stderr)
