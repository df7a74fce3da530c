"""Images of classes for a comparison: folders and zips of files, `.npz`, and Keras's datasets."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt


class ComparisonError(ValueError):
    """What a comparison cannot be made of, in one sentence: rule, received, remedy."""


# Which files of a folder or a zip are images of classes: one rule for both.

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}


def entries(place: Path) -> Iterator[tuple[str, bytes]]:
    """Give name and bytes of every image file, in the order of the names.

    A folder and the zip of it give the same.

    Raises:
        ComparisonError: If the place is neither, or the folders of classes lie at several depths.
        OSError: If a file or folder does not read.
    """
    if place.is_dir():
        for name in _images(place, _files(place)):
            yield name, (place / name).read_bytes()
    elif zipfile.is_zipfile(place):
        with zipfile.ZipFile(place) as archive:
            # Some programs write the separators of their system.
            stored = {name.replace("\\", "/"): name for name in archive.namelist()}
            for name in _images(place, stored):
                yield name, archive.read(stored[name])
    else:
        raise ComparisonError(
            "Images come from a folder, a zip, an .npz or a Keras dataset. "
            f"Received: {place}, which is none of them. "
            "Correct the path, or name cifar10, cifar100, fashion_mnist or mnist."
        )


def _files(folder: Path) -> Iterator[str]:
    """Names of all files in a folder, however deep, as a zip of it would have them."""

    def stop(error: OSError) -> None:
        raise error  # a folder that cannot be read is not an empty one

    for above, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        at = Path(above)
        folders[:] = [name for name in folders if not _leads_back(at / name)]
        yield from ((at / name).relative_to(folder).as_posix() for name in names)


def _leads_back(folder: Path) -> bool:
    """Whether a folder is a link to one that it lies in: there would be no end."""
    here = folder.parent.resolve()
    return folder.is_symlink() and folder.resolve() in (here, *here.parents)


def _images(place: Path, names: Iterable[str]) -> list[str]:
    """Which of the files of a place are images of classes, sorted."""
    kept = sorted(filter(_is_image, names))
    above = sorted({str(PurePosixPath(name).parent.parent) for name in kept})
    if len(above) > 1:
        raise ComparisonError(
            "The folders of the classes must lie side by side. "
            f"Received: {place} with classes in {', '.join(above[:3])}. "
            "Give one of them, the test images as --test for example."
        )
    return kept


def _is_image(name: str) -> bool:
    """Whether a file of a class is meant: hidden ones and those of no folder are not."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    is_file = not name.endswith("/")  # a zip lists folders, too
    return is_file and bool(path.parent.name) and path.suffix.lower() in _SUFFIXES and not hidden


# Images that are files: decoded, turned upright, RGB and square.

MOST = 64  # height and width where none was asked for: the net is small

_DAMAGED = (SyntaxError, struct.error)  # what Pillow raises where tags do not read

Array = npt.NDArray[Any]


def from_files(place: str, size: int | None) -> Iterator[tuple[Array, str]]:
    """Give the images of a folder or a zip, RGB and square, each with the name of its class.

    A folder and the zip of it give the same. The class is the folder an image lies in; those of
    the classes lie side by side, maybe with others around them all.

    Args:
        place: Of a folder, or of a zip.
        size: Height and width; None means the height of the first, but `MOST` at most.

    Raises:
        ComparisonError: If the place is neither, an image is damaged, or classes lie at several
            depths.
    """
    for name, data in entries(Path(place)):
        pixels = _decoded(name, data, size)
        size = pixels.shape[0]
        yield pixels, PurePosixPath(name).parent.name


def resized(pixels: Array, size: int) -> Array:
    """Return uint8 `(height, width, channels)` at another height and width."""
    if pixels.shape[:2] == (size, size):
        return pixels
    image, bilinear = _pillow(), _pillow().Resampling.BILINEAR
    planes = [
        np.asarray(image.fromarray(plane).resize((size, size), bilinear))
        for plane in np.moveaxis(pixels, -1, 0)
    ]
    return np.stack(planes, axis=-1)


def _decoded(name: str, data: bytes, size: int | None) -> Array:
    image = _pillow()
    try:
        with image.open(io.BytesIO(data)) as opened:
            pixels = _as_rgb(_upright(opened))
    except (*_DAMAGED, OSError, ValueError, image.DecompressionBombError) as error:
        raise ComparisonError(
            "An image must be one that Pillow decodes. "
            f"Received: {name} ({error}). Save it anew as PNG, or leave it out."
        ) from error
    side = size or min(pixels.height, MOST)
    if pixels.size != (side, side):
        pixels = pixels.resize((side, side), image.Resampling.BILINEAR)
    return np.asarray(pixels)


def _upright(opened: Any) -> Any:
    """As a viewer shows it: turned as its EXIF orientation says, if that reads."""
    from PIL import ImageOps

    try:
        opened.getexif()
    except _DAMAGED:
        return opened
    return ImageOps.exif_transpose(opened)


def _as_rgb(opened: Any) -> Any:
    """Three channels of eight bits: sixteen are scaled, what is transparent shows white."""
    image = _pillow()
    if opened.mode.startswith(("I", "F")):
        values = np.asarray(opened)
        if values.dtype.kind == "f" or values.min() < 0 or values.max() >= 1 << 16:
            raise ValueError(f"pixels of mode {opened.mode} without a scale")
        opened = image.fromarray((values >> 8).astype(np.uint8))
    if opened.has_transparency_data:
        opened = opened.convert("RGBA")
        opened = image.alpha_composite(image.new("RGBA", opened.size, "white"), opened)
    return opened.convert("RGB")


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ComparisonError(
            "Image files are decoded, and resized, by Pillow. "
            f"Received: {error}. Install it: pip install 'keras-mrl[images]'."
        ) from error
    return Image


KERAS_DATASETS = ("cifar10", "cifar100", "fashion_mnist", "mnist")


def is_keras(place: str) -> bool:
    """Whether a place is one of Keras's datasets; a folder of that name comes first."""
    return place in KERAS_DATASETS and not Path(place).exists()


def is_arrays(place: str) -> bool:
    """Whether a place is an `.npz`, by its name."""
    return place.lower().endswith(".npz")


def has_test(place: str) -> bool:
    """Whether a place holds test images of its own."""
    return is_keras(place) or (is_arrays(place) and "x_test" in _stored(place))


def from_arrays(place: str, size: int | None, test: bool) -> Iterator[tuple[Array, str]]:
    """Give the images of an `.npz`, each with the name of its class.

    Raises:
        ComparisonError: If it does not read, or holds no images.
    """
    names = ("x_test", "y_test") if test else ("x_train", "y_train")
    stored = _stored(place)
    if not set(names) <= set(stored):
        raise _no_arrays(place, f"only {', '.join(stored) or 'nothing'}", names)
    yield from _rows(stored[names[0]], stored[names[1]], place, size)


def from_keras(name: str, size: int | None, test: bool) -> Iterator[tuple[Array, str]]:
    """Give the images of a dataset that Keras downloads, each with the number of its class.

    Raises:
        ComparisonError: If it cannot be downloaded.
    """
    import keras

    try:
        parts = getattr(keras.datasets, name).load_data()
    except Exception as error:  # whatever a download raises
        raise ComparisonError(
            "A Keras dataset is downloaded the first time. "
            f"Received: {name} ({error}). Connect to the network, or give a folder, zip or .npz."
        ) from error
    pixels, labels = parts[int(test)]
    yield from _rows(pixels, labels, name, size)


def _stored(place: str) -> dict[str, Array]:
    try:
        with open(place, "rb") as file:
            stored = np.load(file, allow_pickle=False)
            if isinstance(stored, np.ndarray):
                raise ValueError("one array without a name")
            return {name: stored[name] for name in stored.files if name[:2] in ("x_", "y_")}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _no_arrays(place, str(error), ("x_train", "y_train")) from error


def _no_arrays(place: str, received: str, names: tuple[str, str]) -> ComparisonError:
    return ComparisonError(
        f"An .npz of images must hold {names[0]} and {names[1]}. "
        f"Received: {place} ({received}). Write it with np.savez_compressed."
    )


def _rows(
    pixels: Array, labels: Array, place: str, size: int | None
) -> Iterator[tuple[Array, str]]:
    pixels = pixels[..., None] if pixels.ndim == 3 else pixels
    named = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if pixels.ndim != 4 or pixels.dtype != np.uint8 or named.shape != (len(pixels),):
        raise ComparisonError(
            "Images must be uint8 (rows, height, width, channels), with one label each. "
            f"Received: {pixels.dtype} {pixels.shape} and labels {labels.shape} in {place}. "
            "Scale pixels to 0..255, and give class ids or names."
        )
    names = _names(named, place)
    for image, name in zip(pixels, names, strict=True):
        yield (image if size is None else resized(image, size)), name


def _names(labels: Array, place: str) -> list[str]:
    if labels.dtype.kind == "f" and np.array_equal(labels, np.floor(labels)):  # not NaN
        labels = labels.astype(np.int64)
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8")
    if labels.dtype.kind not in "iuUb":
        raise ComparisonError(
            "Labels must be class ids or names. "
            f"Received: {labels.dtype} in {place}. Give integers or strings."
        )
    return [str(label) for label in labels]


# Images and their classes: folders, zips, `.npz` files and Keras's own datasets.


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
        ComparisonError: If a place is none of those, or holds no images of classes.
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
        raise ComparisonError(
            "--data must hold images in one sub-folder per class. "
            f"Received: {', '.join(places)}, without any. "
            "Name the folder above those of the classes."
        )
    shapes = {image.shape for image in pixels}
    if len(shapes) > 1:
        raise ComparisonError(
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
