"""Decoding images; the only place that needs Pillow."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from . import RefusalError

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_EIGHT_BITS = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}


def decode(file: str, height: int | None, width: int | None, channels: int) -> npt.NDArray[Any]:
    """Return the uint8 pixels `(height, width, channels)` of an image.

    It is resized bilinearly and not rotated by its EXIF orientation; where the height or the
    width is None the image's own stays.

    Args:
        file: The path.
        height: As the model takes it.
        width: As the model takes it.
        channels: 1, 3 or 4.

    Raises:
        RefusalError: If Pillow is not installed, or the image does not decode.
        OSError: If the file does not read.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise RefusalError(
            "Images for a model that takes pixels are decoded by Pillow. "
            f"Received: {error}. Install it: pip install 'keras-mrl[images]'."
        ) from error
    with open(file, "rb") as stream:  # so that only what is no image is an error of Pillow
        try:
            with Image.open(stream) as image:
                if image.mode not in _EIGHT_BITS:
                    raise ValueError(f"pixels of mode {image.mode}, not of 8 bits")
                pixels = image.convert(_MODES[channels])
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            why = "it is no image" if isinstance(error, UnidentifiedImageError) else error
            raise RefusalError(
                f"An image must be one that Pillow decodes. Received: {file} "
                f"({str(why).rstrip('.')}). Save it anew as an 8-bit PNG or JPEG, or leave it out."
            ) from error
    size = (width or pixels.width, height or pixels.height)
    if size != pixels.size:
        pixels = pixels.resize(size, Image.Resampling.BILINEAR)
    return np.asarray(pixels).reshape(size[1], size[0], channels)
