"""Images that are files: decoded, turned upright, RGB and square."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

from ..asking import RefusalError
from .entries import entries

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
        RefusalError: If the place is neither, an image is damaged, or classes lie at several
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
        raise RefusalError(
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
        raise RefusalError(
            "Image files are decoded, and resized, by Pillow. "
            f"Received: {error}. Install it: pip install 'keras-mrl[images]'."
        ) from error
    return Image
