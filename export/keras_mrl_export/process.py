"""A model of any backend becomes the same model on the TensorFlow backend, and is built there."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cloudpickle
import keras

from keras_mrl_serving.index import ExactIndex

from .job import ExportError, Job
from .model_file import save, user_modules, user_objects
from .publish import Staged, publishing

# A process that ends with the one that started it, and takes its temporary folders along.

_TRIES = 100


def end_with_parent(folders: Sequence[Path]) -> threading.Lock:
    """Watch standard input, a pipe nobody writes to: it ends when the parent does, however.

    Then the folders are removed, and this process ends.

    Args:
        folders: What the parent would have removed.

    Returns:
        What this process must acquire before it ends of itself, so that the folders are removed
        even where it failed because they went.
    """
    ending = threading.Lock()
    threading.Thread(target=_watch, args=(folders, ending), daemon=True).start()
    return ending


def _watch(folders: Sequence[Path], ending: threading.Lock) -> None:
    os.read(0, 1)
    with ending:
        for _ in range(_TRIES):  # TensorFlow may be writing there
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
            if not any(folder.exists() for folder in folders):
                break
        os._exit(1)


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
    command = [sys.executable, "-P", "-m", "keras_mrl_export.process"]
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
