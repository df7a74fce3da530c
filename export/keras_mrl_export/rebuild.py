"""A model of any backend becomes the same model on the TensorFlow backend, and is built there."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import cloudpickle
import keras

from keras_mrl_serving.index import ExactIndex

from .errors import ExportError
from .job import Job
from .travel import save
from .user_objects import user_modules, user_objects

_MODEL, _INDEX, _PACKED, _RESULT = "model.keras", "index", "job.pickle", "published"
_SHOWN_LINES = 15


def build_on_tensorflow(model: keras.Model, job: Job) -> Path:
    """Rebuild `model` on TensorFlow, build the SavedModel of `job` from it, and publish it.

    Raises:
        ExportError: If the model does not travel, or what was built does not equal it.
        FileExistsError: If the version exists.
    """
    with tempfile.TemporaryDirectory(prefix="keras-mrl-export-") as scratch:
        folder = Path(scratch)
        save(model, folder / _MODEL)
        objects = user_objects(model)
        if keras.backend.backend() == "tensorflow":
            from .build import build

            return build(folder / _MODEL, objects, job)
        if job.index is not None:
            job.index.save(folder / _INDEX)
            job = replace(job, index=None)
        _pack(folder, objects, job)
        return _build_elsewhere(folder)


def _pack(folder: Path, objects: dict[str, object], job: Job) -> None:
    modules = user_modules(objects)
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        (folder / _PACKED).write_bytes(cloudpickle.dumps((objects, job)))
    except Exception as error:
        raise ExportError(
            "Layers of your own travel to TensorFlow by value, so their code must be picklable. "
            f"Received: {', '.join(objects)}, refused with {type(error).__name__}: {error}. "
            "Move what they hold of open files, locks or devices into build() or call()."
        ) from error
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _build_elsewhere(folder: Path) -> Path:
    environment = {
        **os.environ,
        "KERAS_BACKEND": "tensorflow",
        "CUDA_VISIBLE_DEVICES": "-1",  # tracing needs no GPU, and the trainer may hold it
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
    }
    # -P: a folder of the user's named like a module of ours must not be imported in its place.
    done = subprocess.run(
        [sys.executable, "-P", "-m", "keras_mrl_export.rebuild", str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    result = folder / _RESULT
    if not result.exists():
        tail = "\n".join(done.stderr.splitlines()[-_SHOWN_LINES:])
        raise ExportError(
            "The model must be rebuilt on TensorFlow in a process of its own. "
            f"Received: that process ended with status {done.returncode} and said:\n{tail}\n"
            "Mend what it names; layers must use keras.ops, not the backend's own functions."
        )
    outcome: Path | Exception = pickle.loads(result.read_bytes())
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _main(folder: Path) -> None:
    from .build import build

    objects, job = pickle.loads((folder / _PACKED).read_bytes())
    try:
        if (folder / _INDEX).exists():
            job = replace(job, index=ExactIndex.open(folder / _INDEX, verify=False))
        outcome: Path | Exception = build(folder / _MODEL, objects, job)
    except (ExportError, OSError, ValueError) as error:
        outcome = error
    (folder / _RESULT).write_bytes(pickle.dumps(outcome))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
