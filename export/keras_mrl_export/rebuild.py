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
from .orphan import end_with_parent
from .publish import Staged, publishing
from .travel import save
from .user_objects import user_modules, user_objects

_MODEL, _INDEX, _PACKED = "model.keras", "index", "job.pickle"
_RESULT, _SAID = "result.pickle", "said"
_SHOWN_LINES = 15


def build_on_tensorflow(model: keras.Model, job: Job) -> Path:
    """Rebuild `model` on TensorFlow, build the SavedModel of `job` from it, and publish it.

    It is published by this process alone, which may end before the other does.

    Raises:
        ExportError: If the model does not travel, or what was built does not equal it.
        FileExistsError: If the version exists.
    """
    with (
        tempfile.TemporaryDirectory(prefix="keras-mrl-export-") as scratch,
        publishing(job.base_path, job.version) as staged,
    ):
        folder = Path(scratch)
        save(model, folder / _MODEL)
        objects = user_objects(model)
        if keras.backend.backend() == "tensorflow":
            from .build import build

            build(folder / _MODEL, objects, job, staged)
        else:
            if job.index is not None:
                job.index.save(folder / _INDEX)
                job = replace(job, index=None)
            _pack(folder, objects, job, staged)
            _build_elsewhere(folder, staged)
    return staged.published


def _pack(folder: Path, objects: dict[str, object], job: Job, staged: Staged) -> None:
    modules = user_modules(objects)
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        (folder / _PACKED).write_bytes(cloudpickle.dumps((objects, job, staged)))
    except Exception as error:
        raise ExportError(
            "Layers of your own travel to TensorFlow by value, so their code must be picklable. "
            f"Received: {', '.join(objects)}, refused with {type(error).__name__}: {error}. "
            "Move what they hold of open files, locks or devices into build() or call()."
        ) from error
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _build_elsewhere(folder: Path, staged: Staged) -> None:
    environment = {
        **os.environ,
        "KERAS_BACKEND": "tensorflow",
        "CUDA_VISIBLE_DEVICES": "-1",  # tracing needs no GPU, and the trainer may hold it
        "PYTHONPATH": _search_path(),
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
    }
    # -P: a folder of the user's named like a module of ours must not be imported in its place.
    command = [sys.executable, "-P", "-m", "keras_mrl_export.rebuild"]
    status = _run([*command, str(folder), str(staged.folder.parent)], environment, folder / _SAID)
    result = folder / _RESULT
    if not result.exists():
        said = (folder / _SAID).read_text("utf-8", "replace")
        tail = "\n".join(said.splitlines()[-_SHOWN_LINES:])
        raise ExportError(
            "The model must be rebuilt on TensorFlow in a process of its own. "
            f"Received: that process ended with status {status} and said:\n{tail}\n"
            "Mend what it names; layers must use keras.ops, not the backend's own functions."
        )
    failure: Exception | None = pickle.loads(result.read_bytes())
    if failure is not None:
        raise failure


def _search_path() -> str:
    """Where this process finds modules; Python itself passes over what is no `str`."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path if isinstance(path, str))


def _run(command: list[str], environment: dict[str, str], said: Path) -> int:
    """Run a process that watches its standard input, and ends when this process does."""
    with (
        said.open("wb") as errors,
        subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        ) as process,
    ):
        try:
            return process.wait()
        except BaseException:  # what it wrote is removed here
            process.kill()
            raise


def _main(folder: Path) -> None:
    from .build import build

    objects, job, staged = pickle.loads((folder / _PACKED).read_bytes())
    failure: Exception | None = None
    try:
        if (folder / _INDEX).exists():
            job = replace(job, index=ExactIndex.open(folder / _INDEX, verify=False))
        build(folder / _MODEL, objects, job, staged)
    except (ExportError, OSError, ValueError) as error:
        failure = error
    (folder / _RESULT).write_bytes(pickle.dumps(failure))


if __name__ == "__main__":
    ending = end_with_parent([Path(argument) for argument in sys.argv[1:]])
    try:
        _main(Path(sys.argv[1]))
    finally:
        ending.acquire()
