"""Training one net of a comparison, an epoch at a time, so that it can go on where it stopped."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from .data import ComparisonError, Images
from .nets import SIZE, Batches, Net

# The folder of a comparison: files that are whole or not there, and one process at a time.

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder are not told apart
    fcntl = None  # type: ignore[assignment]

_NOTE = "plan.json"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to; it takes the place of `path` once all is written."""
    partial = path.with_name(f".partial-{path.name}")
    yield partial
    os.replace(partial, path)


def damaged(path: Path, error: Exception) -> ComparisonError:
    """Return the refusal of a file that is not as a comparison writes it."""
    return ComparisonError(
        "A comparison goes on from the files it wrote. "
        f"Received: {path}, which is damaged ({type(error).__name__}). "
        "Remove the folder and begin anew, or name another with --out."
    )


@contextmanager
def held(out: Path, data: list[str]) -> Iterator[None]:
    """Make the folder of a comparison and keep it to this process.

    Raises:
        ComparisonError: If it holds something else, lies in the images, or another process has it.
    """
    _check_place(out, data)
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ComparisonError(
                "One process compares in a folder at a time. "
                f"Received: {out}, where another is at work. Wait for it, or name another --out."
            ) from error
        yield


def _check_place(out: Path, data: list[str]) -> None:
    here = out.resolve()
    for place in map(Path, data):
        if place.is_dir() and place.resolve() in (here, *here.parents):
            raise ComparisonError(
                "--out must not lie in the images, where its figures would be a class. "
                f"Received: {out} in {place}. Name a folder elsewhere."
            )
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    # Hidden ones are the lock, and what was being written when a process was killed.
    others = {name for name in names if not name.startswith(".")} - {"splits.npz"}
    if others and _NOTE not in others:
        raise ComparisonError(
            "--out must be a new folder, an empty one, or one of a comparison. "
            f"Received: {out} with {sorted(others)[0]}. Name another."
        )


AT_ONCE = 500  # rows that a net is asked about


@dataclass(frozen=True)
class Recipe:
    """What all nets of a comparison share.

    Args:
        epochs: Passes over the training images.
        filters: Of the first convolution.
        flip: Whether half of the images are mirrored.
    """

    epochs: int
    filters: int
    flip: bool


def is_trained(folder: Path) -> bool:
    """Whether this net's folder is complete."""
    return bool(_read(folder / "net.json")) and (folder / "model.keras").exists()


def epochs_done(folder: Path) -> int:
    """How many whole epochs of this net are kept."""
    return len(_read(folder / "history.json") or [])


def _read(path: Path) -> Any:
    """What a JSON file holds; None where there is none, or it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def train(
    net: Net,
    folder: Path,
    parts: tuple[Images, Images],
    recipe: Recipe,
    say: Callable[[str], None],
) -> None:
    """Train a net and write its features and logits; goes on from the last finished epoch.

    Writes `train_<width>.npy` and `test_<width>.npy`, features `(rows, width)`, where neighbours
    are looked for among them, `test_logits.npy` `(rows, num_dims, num_classes)`, `model.keras`,
    and last `net.json`.

    Args:
        net: Which.
        folder: Its own.
        parts: Training and test images, of the classes that it may see.
        recipe: How.
        say: Takes a line after every epoch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    training, test = parts
    path, model, history = _resume(net, folder, recipe, say)
    if model is None:
        model = net.make(training.pixels.shape[1:], len(training.names), recipe.filters)
        compile_net(model, net, recipe.epochs, len(training.labels))
    for epoch in range(len(history), recipe.epochs):
        started = time.perf_counter()
        batches = Batches(training, net.seed, epoch, recipe.flip)
        logs = model.fit(batches, initial_epoch=epoch, epochs=epoch + 1, verbose=0).history
        history.append({"loss": logs["loss"][0], "seconds": time.perf_counter() - started})
        path = _keep(model, folder, history, path)
        shown = f"epoch {epoch + 1}/{recipe.epochs}, loss {logs['loss'][0]:.3f}"
        say(f"{net.name}: {shown}, {history[-1]['seconds']:.0f} s")
    _write_answers(net, model, folder, training, test)
    if path is not None:
        path.replace(folder / "model.keras")
    about = {"history": history, "parameters": int(model.count_params())}
    with replacing(folder / "net.json") as partial:
        partial.write_text(json.dumps(about))
    (folder / "history.json").unlink(missing_ok=True)


def compile_net(model: keras.Model, net: Net, epochs: int, rows: int) -> None:
    """Give a net its loss, and an optimizer whose rate ends with the last epoch."""
    steps = epochs * -(-rows // SIZE)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps, warmup_target=2e-3, warmup_steps=max(1, steps // 10)
    )
    model.compile(optimizer=keras.optimizers.AdamW(rate, weight_decay=0.02), loss=net.loss())


def _resume(
    net: Net, folder: Path, recipe: Recipe, say: Callable[[str], None]
) -> tuple[Path | None, Any, list[dict[str, float]]]:
    """The model after the last epoch that is whole, and what the epochs before it showed."""
    history = _read(folder / "history.json") or []
    path = folder / f"epoch-{len(history)}.keras"
    if not path.exists() and len(history) == recipe.epochs:  # stopped after it got its last name
        path = folder / "model.keras"
    if not path.exists():
        return None, None, []
    keras.utils.set_random_seed(net.seed)
    try:
        return path, keras.saving.load_model(path), history
    except Exception as error:  # whatever a damaged file raises; nothing else is lost
        say(f"{net.name}: {path.name} is damaged ({type(error).__name__}); it begins anew")
        return None, None, []


def _keep(
    model: keras.Model, folder: Path, history: list[dict[str, float]], before: Path | None
) -> Path:
    """Save the epoch; the one before goes only when the new one is what would be loaded."""
    path = folder / f"epoch-{len(history)}.keras"
    model.save(path)
    with replacing(folder / "history.json") as partial:
        partial.write_text(json.dumps(history))
    if before is not None:
        before.unlink(missing_ok=True)
    return path


def _write_answers(net: Net, model: Any, folder: Path, training: Images, test: Images) -> None:
    parts = (("train", training), ("test", test)) if net.is_searched else ()
    for name, part in parts:
        found = model.backbone.predict(part.pixels, batch_size=AT_ONCE, verbose=0)
        np.save(folder / f"{name}_{net.dims[-1]}.npy", np.asarray(found, np.float32))
    logits = model.predict(test.pixels, batch_size=AT_ONCE, verbose=0)
    np.save(folder / "test_logits.npy", np.asarray(logits, np.float32))
