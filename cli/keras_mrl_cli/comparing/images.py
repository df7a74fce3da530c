"""Images and their classes: folders, zips, `.npz` files and Keras's own datasets."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from ..asking import RefusalError

KERAS_DATASETS = ("cifar10", "cifar100", "fashion_mnist", "mnist")
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}

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
            of `KERAS_DATASETS`.
        size: Height and width to resize to; None keeps the first image's.
        test: Whether the test part of an `.npz` or a Keras dataset is meant.

    Raises:
        RefusalError: If a place is none of those, or holds no images of classes.
    """
    pixels: list[Array] = []
    labels: list[str] = []
    for place in places:
        if place in KERAS_DATASETS and not Path(place).exists():
            found = _from_keras(place, test)
        elif place.endswith(".npz"):
            found = _from_arrays(place, test)
        else:
            found = _from_files(place, size or (pixels[0].shape[0] if pixels else None))
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
            "All images must have one size. "
            f"Received: sizes {', '.join(map(str, sorted(shapes)[:3]))}. Give --size."
        )
    names = tuple(sorted(set(labels), key=_in_order))
    of = {name: number for number, name in enumerate(names)}
    return Images(np.stack(pixels), np.array([of[name] for name in labels], np.int64), names)


def _in_order(name: str) -> tuple[bool, int, str]:
    """Numbers by value, then words."""
    return (not name.isdigit(), int(name) if name.isdigit() else 0, name)


def _from_files(place: str, size: int | None) -> Iterator[tuple[Array, str]]:
    for name, data in _entries(Path(place)):
        pixels = _decoded(name, data, size)
        size = size or pixels.shape[0]
        yield pixels, PurePosixPath(name).parent.name


def _entries(place: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every image file, in the order of the names."""
    if place.is_dir():
        for file in sorted(place.glob("*/*")):
            if file.suffix.lower() in _SUFFIXES:
                yield f"{file.parent.name}/{file.name}", file.read_bytes()
    elif zipfile.is_zipfile(place):
        with zipfile.ZipFile(place) as archive:
            for name in sorted(archive.namelist()):
                path = PurePosixPath(name)  # one that lies in no folder has no class
                if path.parent.name and path.suffix.lower() in _SUFFIXES:
                    yield name, archive.read(name)
    else:
        raise RefusalError(
            "Images come from a folder, a zip, an .npz or a Keras dataset. "
            f"Received: {place}, which is none of them. "
            f"Correct the path, or name one of {', '.join(KERAS_DATASETS)}."
        )


def _decoded(name: str, data: bytes, size: int | None) -> Array:
    try:
        from PIL import Image
    except ImportError as error:
        raise RefusalError(
            "Image files are decoded by Pillow. "
            f"Received: {error}. Install it: pip install 'keras-mrl[images]'."
        ) from error
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RefusalError(
            "An image must be one that Pillow decodes. "
            f"Received: {name} ({error}). Save it anew as PNG, or leave it out."
        ) from error
    side = size or pixels.height
    if pixels.size != (side, side):
        pixels = pixels.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(pixels)


def _from_arrays(place: str, test: bool) -> Iterator[tuple[Array, str]]:
    names = ("x_test", "y_test") if test else ("x_train", "y_train")
    try:
        with np.load(place, allow_pickle=False) as stored:
            found = [stored[name] for name in names]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise RefusalError(
            f"An .npz of images must hold {names[0]} and {names[1]}. "
            f"Received: {place} ({error}). Write it with np.savez_compressed."
        ) from error
    yield from _rows(found[0], found[1], place)


def _from_keras(name: str, test: bool) -> Iterator[tuple[Array, str]]:
    import keras

    try:
        parts = getattr(keras.datasets, name).load_data()
    except Exception as error:  # whatever a download raises
        raise RefusalError(
            "A Keras dataset is downloaded the first time. "
            f"Received: {name} ({error}). Connect to the network, or give a folder, zip or .npz."
        ) from error
    pixels, labels = parts[int(test)]
    yield from _rows(pixels, labels, name)


def _rows(pixels: Array, labels: Array, place: str) -> Iterator[tuple[Array, str]]:
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    labels = labels.reshape(len(labels), -1)
    if pixels.ndim != 4 or pixels.dtype != np.uint8 or labels.shape != (len(pixels), 1):
        raise RefusalError(
            "Images must be uint8 (rows, height, width, channels), with one label each. "
            f"Received: {pixels.dtype} {pixels.shape} and labels {labels.shape} in {place}. "
            "Scale pixels to 0..255, and give class ids or names."
        )
    yield from zip(pixels, map(str, labels[:, 0]), strict=True)


def split_classes(images: Images, unseen: Sequence[int]) -> tuple[Images, Images]:
    """Return the images of the other classes, numbered anew, and those of the `unseen`."""
    apart = np.isin(images.labels, unseen)
    return _of(images, ~apart), _of(images, apart)


def _of(images: Images, rows: npt.NDArray[np.bool]) -> Images:
    numbers, labels = np.unique(images.labels[rows], return_inverse=True)
    names = tuple(images.names[number] for number in numbers)
    return Images(images.pixels[rows], labels.astype(np.int64), names)
