"""Images and their classes: folders, zips, `.npz` files and Keras's own datasets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..asking import RefusalError
from .arrays import from_arrays, from_keras, is_arrays, is_keras
from .pictures import from_files

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Images:
    """Images of one size, and the class of each.

    Args:
        pixels: uint8 `(rows, height, width, channels)`.
        labels: int64 `(rows,)`, positions in `names`.
        names: Of the classes.
    """

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    names: tuple[str, ...]

    def take(self, rows: Any) -> Images:
        """Return these rows alone."""
        return Images(self.pixels[rows], self.labels[rows], self.names)


def read(places: Sequence[str], size: int | None, test: bool = False) -> Images:
    """Read the images of all `places`, taken together.

    Args:
        places: Folders or zips with one sub-folder per class, `.npz` files, or the name of one
            of `arrays.KERAS_DATASETS`.
        size: Height and width to resize to; None keeps that of arrays, and of files the height of
            the first, up to `pictures.MOST`.
        test: Whether the test part of an `.npz` or a Keras dataset is meant.

    Raises:
        RefusalError: If a place is none of those, or holds no images of classes.
    """
    pixels: list[Array] = []
    labels: list[str] = []
    for place in places:
        if is_keras(place):
            found = from_keras(place, size, test)
        elif is_arrays(place):
            found = from_arrays(place, size, test)
        else:
            found = from_files(place, size or (pixels[0].shape[0] if pixels else None))
        for image, label in found:
            pixels.append(image)
            labels.append(label)
    if not pixels:
        raise RefusalError(
            "--data must hold images in one sub-folder per class. "
            f"Received: {', '.join(places)}, without any. "
            "Name the folder above those of the classes."
        )
    shapes = {image.shape for image in pixels}
    if len(shapes) > 1:
        raise RefusalError(
            "All images must have one size and as many channels. "
            f"Received: {', '.join(map(str, sorted(shapes)[:3]))}. Give --size, or leave some out."
        )
    names = tuple(sorted(set(labels), key=_in_order))
    of = {name: number for number, name in enumerate(names)}
    return Images(np.stack(pixels), np.array([of[name] for name in labels], np.int64), names)


def _in_order(name: str) -> tuple[bool, int, str]:
    """Numbers by value, then words."""
    return (not name.isdigit(), int(name) if name.isdigit() else 0, name)


def split_classes(images: Images, unseen: Sequence[int]) -> tuple[Images, Images]:
    """Return the images of the other classes, numbered anew, and those of the `unseen`."""
    classes = np.arange(len(images.names))
    hidden = np.isin(classes, unseen)
    return _of(images, classes[~hidden]), _of(images, classes[hidden])


def _of(images: Images, numbers: npt.NDArray[np.int64]) -> Images:
    """Those of some classes, numbered in their order, whether all of them have images or not."""
    rows = np.isin(images.labels, numbers)
    names = tuple(images.names[number] for number in numbers)
    labels = np.searchsorted(numbers, images.labels[rows]).astype(np.int64)
    return Images(images.pixels[rows], labels, names)
