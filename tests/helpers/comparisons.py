"""Random images for tests of a comparison, and one comparison of digits for many tests."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits

from keras_mrl.comparison import Plan, compare
from keras_mrl.comparison.data import Part
from keras_mrl.comparison.splits import load_parts

Array = npt.NDArray[Any]

PLAN = Plan(dims=(4, 12), epochs=6, filters=8, flip=False, unseen=True)
TRAINED = ("mrl-0", "mrl_seen-0")


def random_images(rows: int = 60, classes: int = 3, seed: int = 0) -> Part:
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, 8, 8, 1)).astype(np.uint8)
    return Part(pixels, np.arange(rows) % classes, tuple(map(str, range(classes))))


def write_npz(path: Path, training: Part, test: Part | None = None) -> list[str]:
    """Write images as `compare` reads them; return their place."""
    arrays: dict[str, Any] = {"x_train": training.inputs, "y_train": training.labels}
    if test is not None:
        arrays |= {"x_test": test.inputs, "y_test": test.labels}
    np.savez(path, allow_pickle=False, **arrays)
    return [str(path)]


@dataclass(frozen=True)
class Compared:
    """A finished comparison of handwritten digits."""

    place: str
    out: Path
    results: dict[str, Any]
    training: Part
    test: Part
    lines: list[str]

    def load(self, net: str, name: str) -> Array:
        """An array that a net left."""
        array: Array = np.load(self.out / "nets" / net / f"{name}.npy")
        return array


class Interrupted(Exception):
    """Ends a comparison before its first net is trained."""


def interrupt_training(line: str) -> None:
    """Take a line of progress; raise at the one that announces a net."""
    if line.startswith("["):
        raise Interrupted


def compare_digits(folder: Path) -> None:
    """Compare 8 x 8 digits: two nets are trained, the others keep their random weights.

    Beginning a net costs seconds. So the others are put there as an interruption after their last
    epoch leaves them, and the comparison goes on from that.
    """
    bunch = load_digits()
    rows = np.random.default_rng(0).permutation(1200)
    pixels = (bunch.images[rows] * 255 / 16).astype(np.uint8)
    place = folder / "digits.npz"
    np.savez(place, x_train=pixels, y_train=bunch.target[rows])
    out = folder / "out"
    with contextlib.suppress(Interrupted):
        compare(place, out, PLAN, progress=interrupt_training)
    for net in PLAN.nets:
        if net.name not in TRAINED:
            mine = out / "nets" / net.name
            mine.mkdir(parents=True)
            model = net.make((8, 8, 1), 10 if net.all_classes else 8, PLAN.filters)
            model.save(mine / f"epoch-{net.epochs_of(PLAN.epochs)}.keras")
            history = [{"loss": 2.0, "seconds": 6.0}] * net.epochs_of(PLAN.epochs)
            (mine / "history.json").write_text(json.dumps(history))
    lines: list[str] = []
    compare(place, out, PLAN, progress=lines.append)
    (folder / "lines.json").write_text(json.dumps(lines))


def load_comparison(folder: Path) -> Compared:
    place, out = str(folder / "digits.npz"), folder / "out"
    training, test, _ = load_parts([place], None, None)
    results, lines = (
        json.loads(path.read_text()) for path in (out / "results.json", folder / "lines.json")
    )
    return Compared(place, out, results, training, test, lines)
