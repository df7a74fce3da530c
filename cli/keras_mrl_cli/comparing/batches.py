"""Batches of an epoch: shuffled, shifted and mirrored, the same whenever they are asked for."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from .images import Images

SIZE = 128


class Batches(keras.utils.PyDataset):
    """The batches of one epoch.

    All that is random comes from the seed and the epoch's number, so that an epoch begun again
    after an interruption sees the same images.

    Args:
        part: What to draw from.
        seed: Of the net.
        epoch: Its number.
        flip: Whether half of the images are mirrored.
    """

    def __init__(self, part: Images, seed: int, epoch: int, flip: bool) -> None:
        super().__init__()
        self._part = part
        self._seed = (seed, epoch)
        self._flip = flip
        self._order = np.random.default_rng(self._seed).permutation(len(part.labels))

    def __len__(self) -> int:
        return -(-len(self._order) // SIZE)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        rows = self._order[index * SIZE : (index + 1) * SIZE]
        draw = np.random.default_rng((*self._seed, index))
        return moved(self._part.pixels[rows], draw, self._flip), self._part.labels[rows]


def moved(
    images: npt.NDArray[np.uint8], draw: np.random.Generator, flip: bool
) -> npt.NDArray[np.uint8]:
    """Return each image shifted by up to an eighth of its side and, maybe, mirrored."""
    rows, height, width, _ = images.shape
    most = max(height, width) // 8
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    down, right = draw.integers(0, 2 * most + 1, (2, rows))
    shifted: Any = windows[np.arange(rows), down, right].transpose(0, 2, 3, 1)
    if flip:
        mirrored = np.asarray(draw.random(rows) < 0.5)
        shifted = np.where(mirrored[:, None, None, None], shifted[:, :, ::-1], shifted)
    return np.asarray(shifted, np.uint8)
