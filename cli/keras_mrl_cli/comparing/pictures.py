"""Images that are files, in a folder or a zip with one sub-folder per class."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from ..asking import RefusalError

MOST = 64  # height and width where none was asked for: the net is small

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}

Array = npt.NDArray[Any]


def from_files(place: str, size: int | None) -> Iterator[tuple[Array, str]]:
    """Give the images of a folder or a zip, RGB and square, each with the name of its class.

    Args:
        place: Of the folder above those of the classes, or of the zip of it.
        size: Height and width; None means the height of the first, but `MOST` at most.

    Raises:
        RefusalError: If the place is neither, or an image is damaged.
    """
    for name, data in _entries(Path(place)):
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


def _entries(place: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every image file, in the order of the names."""
    if place.is_dir():
        names = [f"{file.parent.name}/{file.name}" for file in place.glob("*/*") if file.is_file()]
        for name in sorted(filter(_is_image, names)):
            yield name, (place / name).read_bytes()
    elif zipfile.is_zipfile(place):
        with zipfile.ZipFile(place) as archive:
            # Some programs write the separators of their system, and files of their own.
            names = [name for name in archive.namelist() if _is_image(name.replace("\\", "/"))]
            _check_depth(place, {PurePosixPath(name.replace("\\", "/")) for name in names})
            for name in sorted(names):
                yield name.replace("\\", "/"), archive.read(name)
    else:
        raise RefusalError(
            "Images come from a folder, a zip, an .npz or a Keras dataset. "
            f"Received: {place}, which is none of them. "
            "Correct the path, or name cifar10, cifar100, fashion_mnist or mnist."
        )


def _is_image(name: str) -> bool:
    """Whether a file of a class is meant: hidden ones and those of no folder are not."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return bool(path.parent.name) and path.suffix.lower() in _SUFFIXES and not hidden


def _check_depth(place: Path, paths: set[PurePosixPath]) -> None:
    above = sorted({str(path.parent.parent) for path in paths})
    if len(above) > 1:
        raise RefusalError(
            "The folders of the classes must lie side by side. "
            f"Received: {place} with classes in {', '.join(above[:3])}. "
            "Pack one of them, the test images as --test for example."
        )


def _decoded(name: str, data: bytes, size: int | None) -> Array:
    image = _pillow()
    try:
        with image.open(io.BytesIO(data)) as opened:
            pixels = _as_rgb(opened)
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        raise RefusalError(
            "An image must be one that Pillow decodes. "
            f"Received: {name} ({error}). Save it anew as PNG, or leave it out."
        ) from error
    side = size or min(pixels.height, MOST)
    if pixels.size != (side, side):
        pixels = pixels.resize((side, side), image.Resampling.BILINEAR)
    return np.asarray(pixels)


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
        raise RefusalError(
            "Image files are decoded, and resized, by Pillow. "
            f"Received: {error}. Install it: pip install 'keras-mrl[images]'."
        ) from error
    return Image
