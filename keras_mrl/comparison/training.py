"""The training of one net of a comparison, which resumes after its last whole epoch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from .data import Part
from .folder import replacing
from .nets import Net, start_scaled

BATCH = 128
_PREDICTED = 500  # rows that a net predicts at once


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
    """Return whether this folder holds a net that is trained to the end."""
    return bool(_read_json(folder / "net.json")) and (folder / "model.keras").exists()


def count_epochs(folder: Path) -> int:
    """Return how many epochs of an unfinished net are saved."""
    return len(_read_json(folder / "history.json") or [])


def _read_json(path: Path) -> Any:
    """What a JSON file holds; None where there is none, or it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def train(
    net: Net,
    folder: Path,
    parts: tuple[Part, Part],
    recipe: Recipe,
    progress: Callable[[str], None],
) -> None:
    """Train a net, from its last whole epoch, and write its features and logits.

    Writes `train_<width>.npy` and `test_<width>.npy`, features `(rows, width)` of a net among whose
    features neighbours are searched, `test_logits.npy` `(rows, num_dims, num_classes)`,
    `model.keras`, and last `net.json`.

    Args:
        net: The net.
        folder: The folder of this net alone.
        parts: Training and test images, of the classes that the net may see.
        recipe: What all nets share.
        progress: Takes a line after every epoch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    training, test = parts
    epochs = net.epochs_of(recipe.epochs)
    path, model, history = _resume(net, folder, epochs, progress)
    if model is None:
        model = net.make(training.inputs.shape[1:], len(training.names), recipe.filters)
        if training.is_embedded:
            start_scaled(model, training.inputs)
        compile_net(model, net, epochs, len(training.labels))
    for epoch in range(len(history), epochs):
        started = time.perf_counter()
        batches = Batches(training, net.seed, epoch, recipe.flip)
        logs = model.fit(batches, initial_epoch=epoch, epochs=epoch + 1, verbose=0).history
        history.append({"loss": logs["loss"][0], "seconds": time.perf_counter() - started})
        path = _save_epoch(model, folder, history, path)
        progress(
            f"{net.name}: epoch {epoch + 1}/{epochs}, loss {logs['loss'][0]:.3f}, "
            f"{history[-1]['seconds']:.0f} s"
        )
    _write_answers(net, model, folder, training, test)
    if path is not None:
        path.replace(folder / "model.keras")
    with replacing(folder / "net.json") as partial:
        partial.write_text(
            json.dumps({"history": history, "parameters": int(model.count_params())})
        )
    (folder / "history.json").unlink(missing_ok=True)


class Batches(keras.utils.PyDataset):
    """The batches of one epoch: shuffled; images are shifted and mirrored, embeddings stay.

    All that is random comes from the seed and the epoch's number, so that an epoch begun again
    after an interruption sees the same images.

    Args:
        part: The images to draw from.
        seed: Of the net.
        epoch: Its number.
        flip: Whether half of the images are mirrored.
    """

    def __init__(self, part: Part, seed: int, epoch: int, flip: bool) -> None:
        super().__init__()
        self._part = part
        self._seed = (seed, epoch)
        self._flip = flip
        self._order = np.random.default_rng(self._seed).permutation(len(part.labels))

    def __len__(self) -> int:
        return -(-len(self._order) // BATCH)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        rows = self._order[index * BATCH : (index + 1) * BATCH]
        inputs, labels = self._part.inputs[rows], self._part.labels[rows]
        if self._part.is_embedded:
            return inputs, labels
        random = np.random.default_rng((*self._seed, index))
        return shift(inputs, random, self._flip), labels


def shift(
    images: npt.NDArray[np.uint8], random: np.random.Generator, flip: bool
) -> npt.NDArray[np.uint8]:
    """Return each image shifted by up to an eighth of its side and, half of them, mirrored."""
    rows, height, width, _ = images.shape
    most = max(height, width) // 8
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    down, right = random.integers(0, 2 * most + 1, (2, rows))
    shifted: Any = windows[np.arange(rows), down, right].transpose(0, 2, 3, 1)
    if flip:
        mirrored = np.asarray(random.random(rows) < 0.5)
        shifted = np.where(mirrored[:, None, None, None], shifted[:, :, ::-1], shifted)
    return np.asarray(shifted, np.uint8)


_RATE = 2e-3  # of nets on images, at its highest
# On `val` of CLINC150 twice as much is better for every net on embeddings and at every dim.
_EMBEDDED_RATE = 4e-3


def compile_net(
    model: keras.Model, net: Net, epochs: int, rows: int, rate: float | None = None
) -> None:
    """Give a net its loss, and an optimizer whose rate rises to `rate` and ends with training."""
    if rate is None:
        shape = getattr(model, "backbone", model).input_shape
        rate = _EMBEDDED_RATE if len(shape) == 2 else _RATE
    steps = epochs * -(-rows // BATCH)
    warmup = max(1, steps // 10)
    cycle = keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - warmup), warmup_target=rate, warmup_steps=warmup
    )
    model.compile(optimizer=keras.optimizers.AdamW(cycle, weight_decay=0.02), loss=net.loss())
    # TensorFlow traces the first step twice, for seconds, where it makes the optimizer's variables.
    model.optimizer.build(model.trainable_variables)


def _resume(
    net: Net, folder: Path, epochs: int, progress: Callable[[str], None]
) -> tuple[Path | None, Any, list[dict[str, float]]]:
    """Path and model of the last whole epoch, and loss and seconds of all epochs up to it."""
    history = _read_json(folder / "history.json") or []
    path = folder / f"epoch-{len(history)}.keras"
    if not path.exists() and len(history) == epochs:  # stopped after the last renaming
        path = folder / "model.keras"
    if not path.exists():
        return None, None, []
    keras.utils.set_random_seed(net.seed)
    try:
        return path, keras.saving.load_model(path), history
    except Exception as error:  # whatever a damaged file raises; nothing else is lost
        progress(f"{net.name}: {path.name} is damaged ({type(error).__name__}); it begins anew")
        return None, None, []


def _save_epoch(
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


def _write_answers(net: Net, model: Any, folder: Path, training: Part, test: Part) -> None:
    if net.is_searched:
        for name, part in (("train", training), ("test", test)):
            np.save(folder / f"{name}_{net.dims[-1]}.npy", predict(model.backbone, part))
    np.save(folder / "test_logits.npy", predict(model, test))


def predict(model: Any, images: Part) -> Any:
    """Return what a net makes of images, as float32."""
    outputs = model.predict(images.inputs, batch_size=_PREDICTED, verbose=0)
    return np.asarray(outputs, np.float32)
