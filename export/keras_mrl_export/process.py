"""The process that rebuilds a model of another backend on TensorFlow, and writes its SavedModel.

Only TensorFlow writes the SavedModels that TensorFlow Serving loads, and one process has one Keras
backend. So a model of any backend is saved as `.keras` and loaded on TensorFlow; where another
backend runs, that is done in a child process, which is this module run with `-m`. The user's own
classes travel by value (cloudpickle): importing them would run the training script again.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cloudpickle
import keras

from keras_mrl_serving.index import ExactIndex

from .job import ExportError, Job
from .model_file import save, user_modules, user_objects
from .publish import Staged, publishing

# The files that parent and child exchange.
_MODEL, _INDEX, _JOB = "model.keras", "index", "job.pickle"
_RESULT, _LOG = "result.pickle", "log"
_SHOWN_LINES = 15


def build_on_tensorflow(model: keras.Model, job: Job) -> Path:
    """Rebuild `model` on TensorFlow, build the SavedModel of `job` from it, and publish it.

    This process alone publishes: a child process whose parent is gone leaves nothing.

    Returns:
        The folder of the version.

    Raises:
        ExportError: If the model does not travel, or the SavedModel differs from it.
        FileExistsError: If the version exists.
    """
    with (
        tempfile.TemporaryDirectory(prefix="keras-mrl-export-") as scratch,
        publishing(job.base_path, job.version) as staged,
    ):
        folder = Path(scratch)
        save(model, folder / _MODEL)
        objects = user_objects(model)
        for text in (job.text, job.other_tower and job.other_tower.text):
            objects |= text.objects if text else {}
        if keras.backend.backend() == "tensorflow":
            from .build import build

            notes = build(folder / _MODEL, objects, job, staged)
        else:
            if job.index is not None:
                job.index.save(folder / _INDEX)
                job = replace(job, index=None)
            _write_job(folder, objects, job, staged)
            notes = _build_in_child(folder, staged)
    for note in notes:
        warnings.warn(note, UserWarning, stacklevel=3)
    return staged.published


def _write_job(folder: Path, objects: dict[str, object], job: Job, staged: Staged) -> None:
    modules = user_modules(objects)
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        (folder / _JOB).write_bytes(cloudpickle.dumps((objects, job, staged)))
    except Exception as error:
        raise ExportError(
            "Layers of your own travel to TensorFlow by value, so their code must be picklable. "
            f"Received: {', '.join(objects)}, refused with {type(error).__name__}: {error}. "
            "Move what they hold of open files, locks or devices into build() or call()."
        ) from error
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _build_in_child(folder: Path, staged: Staged) -> list[str]:
    environment = {
        **os.environ,
        "KERAS_BACKEND": "tensorflow",
        "CUDA_VISIBLE_DEVICES": "-1",  # tracing needs no GPU, and the trainer may hold it
        "PYTHONPATH": module_search_path(),
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
    }
    # -P: a folder of the user's named like a module of ours must not be imported in its place.
    command = [sys.executable, "-P", "-m", "keras_mrl_export.process"]
    log = folder / _LOG
    status = run_child([*command, str(folder), str(staged.folder.parent)], environment, log)
    result = folder / _RESULT
    if not result.exists():
        tail = "\n".join(log.read_text("utf-8", "replace").splitlines()[-_SHOWN_LINES:])
        raise ExportError(
            "The model must be rebuilt on TensorFlow in a process of its own. "
            f"Received: that process ended with status {status} and said:\n{tail}\n"
            "Mend what it names; layers must use keras.ops, not the backend's own functions."
        )
    failure: Exception | None
    notes: list[str]
    failure, notes = pickle.loads(result.read_bytes())
    if failure is not None:
        raise failure
    return notes


def module_search_path() -> str:
    """Return where this process finds modules, as PYTHONPATH; only a `str` counts for Python."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path if isinstance(path, str))


def run_child(command: list[str], environment: dict[str, str], log: Path) -> int:
    """Run a child process to its end and return its status; an interrupt here ends it.

    Its standard input is a pipe that closes when this process ends: see `end_with_parent`.

    Args:
        command: Program and arguments.
        environment: Its environment variables.
        log: File for its standard error.
    """
    with (
        log.open("wb") as errors,
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
        except BaseException:  # the caller removes the folders the child writes in
            process.kill()
            process.wait()
            raise


# From here on: the child.


def _build_here(folder: Path) -> None:
    from .build import build

    objects, job, staged = pickle.loads((folder / _JOB).read_bytes())
    failure: Exception | None = None
    notes: list[str] = []
    try:
        if (folder / _INDEX).exists():
            job = replace(job, index=ExactIndex.open(folder / _INDEX, verify=False))
        notes = build(folder / _MODEL, objects, job, staged)
    except (ExportError, OSError, ValueError) as error:
        failure = error
    (folder / _RESULT).write_bytes(pickle.dumps((failure, notes)))


def end_with_parent(folders: Sequence[Path]) -> threading.Lock:
    """Start a thread that ends this process as soon as its parent ends, even by SIGKILL.

    The thread reads standard input, a pipe that the parent never writes to and that closes with
    the parent. It then ends this process, and has the folders removed.

    Args:
        folders: Folders the parent would have removed.

    Returns:
        A lock that this process must acquire before it ends by itself: it could end while the
        thread is about to have the folders removed.
    """
    ending = threading.Lock()
    threading.Thread(target=_end_with_parent, args=(folders, ending), daemon=True).start()
    return ending


_REMOVE = """
import shutil, sys
sys.stdin.read()
for folder in sys.argv[1:]:
    shutil.rmtree(folder, ignore_errors=True)
"""


def _end_with_parent(folders: Sequence[Path], ending: threading.Lock) -> None:
    os.read(0, 1)
    with ending:
        # TensorFlow may be writing in the folders, and would make them again. So another process
        # removes them, once its standard input tells it that this one has ended.
        command = [sys.executable, "-I", "-c", _REMOVE, *map(str, folders)]
        subprocess.Popen(command, stdin=subprocess.PIPE)
        os._exit(1)


if __name__ == "__main__":
    ending = end_with_parent([Path(argument) for argument in sys.argv[1:]])
    try:
        _build_here(Path(sys.argv[1]))
    finally:
        ending.acquire()
