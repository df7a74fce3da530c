"""Scikit-learn's handwritten digits in three parts that share no image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True, eq=False)
class Part:
    """Some of the images.

    Args:
        images: float32 `(rows, 8, 8, 1)` in 0..1.
        labels: int64 `(rows,)`, 0..9.
    """

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


def load(seed: int) -> tuple[Part, Part, Part]:
    """Return the training half, the holdout and the test quarter, with equal shares of classes."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[..., None]
    labels = digits.target.astype(np.int64)
    rows = np.arange(len(labels))
    train, rest = train_test_split(rows, test_size=0.5, stratify=labels, random_state=seed)
    holdout, test = train_test_split(rest, test_size=0.5, stratify=labels[rest], random_state=seed)
    return _part(images, labels, train), _part(images, labels, holdout), _part(images, labels, test)


def with_shifts(part: Part) -> Part:
    """Return the images and their copies moved by one pixel to each of the four sides."""
    images = [part.images]
    for axis in (1, 2):
        rest = np.delete(part.images, 0, axis), np.delete(part.images, -1, axis)
        empty = np.zeros_like(np.take(part.images, [0], axis))
        images.append(np.concatenate([rest[0], empty], axis))
        images.append(np.concatenate([empty, rest[1]], axis))
    return Part(np.concatenate(images), np.tile(part.labels, len(images)))


def _part(images: Any, labels: Any, rows: Any) -> Part:
    return Part(images[rows], labels[rows])
