"""One reading of an image file, for every room: which pixels a file holds.

A picture stands upright, as its EXIF or XMP orientation says. What is transparent shows white,
unless the transparency itself is wanted. Of sixteen bits the high eight count, of an animation the
first picture. Colour profiles are not applied. A served graph that decodes images (`ImageDecoder`)
reads JPEG and PNG by the same rules, bit for bit, but for the orientation: `served_image` turns
such a picture before it is sent, and makes a PNG of a file that the graph would read otherwise.

Pillow is imported where a file needs it: not at all for what `served_image` need not change.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .errors import UnreadableImageError

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

Pixels = npt.NDArray[np.uint8]  # (height, width, channels)

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")
MAX_PIXELS = 2**30 // 12  # 89 million, as Pillow's own limit: 256 MiB in three channels of a byte

_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_ORIENTATION = 0x0112  # the EXIF tag
_GREY_STEPS = {"L;2": 85, "L;4": 17}  # between two greys, by how Pillow calls two and four bits
_TURN = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_JPEG_END = b"\xff\xd9"
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive: what TensorFlow decodes
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_APP1, _SCAN = 0xE1, 0xDA  # the segment of EXIF and XMP; where the pixels begin
# What files that are no such images begin with.
_OTHER_FILES = {
    "it is empty": rb"\Z",
    "it is a TIFF": rb"II\*\0|MM\0\*",
    "it is a HEIF or AVIF": rb"(?s:.{4})ftyp(heic|heix|mif1|msf1|avif)",
    "it is a PDF": rb"%PDF",
    "it is text in HTML or XML": rb"\s*<[!?A-Za-z]",
}
# Chunks of a PNG that hold no orientation.
_PLAIN_CHUNKS = {
    *(b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"gAMA", b"cHRM", b"sRGB", b"iCCP"),
    *(b"sBIT", b"bKGD", b"hIST", b"pHYs", b"sPLT", b"tIME", b"acTL", b"fcTL", b"fdAT"),
}


def is_image(name: str) -> bool:
    """Whether the name of a file says that it is an image.

    Examples:
        >>> is_image("photo.JPG"), is_image("rows.npy")
        (True, False)
    """
    return PurePath(name).suffix.lower() in SUFFIXES


def read_image(data: bytes, channels: int = 3, name: str = "bytes") -> Pixels:
    """Return the pixels of an image file, upright.

    Args:
        data: The bytes of a JPEG, PNG, GIF, BMP or WebP.
        channels: 3 for colour and 1 for grey, both with white where the image is transparent; 4
            for colour and the transparency.
        name: What an error calls the file.

    Returns:
        uint8 `(height, width, channels)`.

    Raises:
        UnreadableImageError: If the file is no such image, or larger than 89 million pixels.
        ImportError: If Pillow is not installed.

    Examples:
        >>> from PIL import Image
        >>> file = io.BytesIO()
        >>> Image.new("RGBA", (2, 1), (200, 100, 0, 128)).save(file, "PNG")
        >>> read_image(file.getvalue()).tolist()
        [[[227, 177, 127], [227, 177, 127]]]
    """
    data = _as_bytes(data, name)
    with _opened(data, name) as image:
        pixels = _pixels(image)
        if channels != 4 and pixels.shape[2] in (2, 4):
            pixels = _over_white(pixels)
        if pixels.shape[2] == channels:
            return pixels
        converted = np.asarray(_from_array(pixels).convert(_MODES[channels]))
        return converted.reshape(*converted.shape[:2], channels)


def served_image(data: bytes, name: str = "bytes") -> bytes:
    """Return the bytes to send to a model that decodes images, so that it reads the right pixels.

    Most files are returned as they are. What the graph would read otherwise becomes a PNG of the
    same pixels: a picture to be turned upright, a CMYK JPEG, a GIF, BMP or WebP.

    Args:
        data: The bytes of an image file.
        name: What an error calls the file.

    Raises:
        UnreadableImageError: If the file is no image, cut off, or larger than 89 million pixels. A
            file that needs no change is not decoded: the server refuses it if its pixels are
            damaged.
        ImportError: If the file has to be changed, or looked into, and Pillow is not installed.

    Examples:
        >>> from PIL import Image
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (2, 1)).save(file, "JPEG")
        >>> served_image(file.getvalue()) == file.getvalue()
        True
    """
    data = _as_bytes(data, name)
    is_read_alike, has_tags = _look_at(data, name)
    if is_read_alike and not has_tags:
        return data
    with _opened(data, name) as image:
        if is_read_alike and _orientation(image) not in _TURN:
            return data
        file = io.BytesIO()
        _from_array(_pixels(image)).save(file, "PNG", compress_level=1)
        return file.getvalue()


def resize_image(pixels: Pixels, height: int, width: int) -> Pixels:
    """Return an image at another height and width: bilinear, and smoothed where it shrinks.

    Args:
        pixels: uint8 `(height, width, channels)`.
        height: The new height.
        width: The new width.

    Raises:
        ImportError: If Pillow is not installed.

    Examples:
        >>> resize_image(np.full((4, 6, 3), 7, np.uint8), 2, 2).shape
        (2, 2, 3)
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    pillow = _import_pillow()
    # Plane by plane, as a graph does: Pillow would weigh colours by their transparency.
    planes = [
        np.asarray(pillow.fromarray(plane).resize((width, height), pillow.Resampling.BILINEAR))
        for plane in np.moveaxis(pixels, -1, 0)
    ]
    return np.stack(planes, axis=-1)


def _as_bytes(data: object, name: str) -> bytes:
    if not isinstance(data, bytes | bytearray | memoryview):
        kind = type(data).__name__
        error = UnreadableImageError(
            "An image file is given as its bytes. "
            f"Received: {name}, a {kind}. Read the file: pathlib.Path(file).read_bytes()."
        )
        error.reason = f"it is a {kind}, not the bytes of a file"
        raise error
    return bytes(data)


# Pillow's images.


@contextmanager
def _opened(data: bytes, name: str) -> Iterator[ImageFile]:
    """Give Pillow's image of a file; any error meanwhile becomes an `UnreadableImageError`."""
    pillow = _import_pillow()
    try:
        with pillow.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_size(*image.size)
            yield image
    except Exception as error:  # damaged bytes make Pillow raise errors of many classes
        raise _unreadable(name, _reason(error, data)) from error


def _import_pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError(
            "Image files are read by Pillow. "
            f"Received: {error}. Install it: pip install 'keras-mrl[images]'."
        ) from error
    return Image


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ValueError("it has no pixels")
    if width * height > MAX_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, more than {MAX_PIXELS:,}")


def _reason(error: Exception, data: bytes) -> str:
    if type(error).__name__ == "UnidentifiedImageError":  # its text is the address of an object
        kinds = (kind for kind, start in _OTHER_FILES.items() if re.match(start, data))
        return next(kinds, "it is none")
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _unreadable(name: str, reason: str) -> UnreadableImageError:
    error = UnreadableImageError(
        "An image file must be a whole JPEG, PNG, GIF, BMP or WebP. "
        f"Received: {name} ({reason}). Save it anew as an 8-bit PNG or JPEG, or leave it out."
    )
    error.reason = reason
    return error


def _orientation(image: ImageFile) -> Any:
    """The EXIF orientation, or that of XMP; None where there is none, or the tags do not read."""
    try:
        return image.getexif().get(_ORIENTATION)
    except (SyntaxError, struct.error):  # what Pillow raises for tags it cannot read
        return None


def _pixels(image: ImageFile) -> Pixels:
    """The upright pixels with their transparency: 1 or 2 channels of grey, 3 or 4 of colour."""
    pillow = _import_pillow()
    step = max((_GREY_STEPS.get(str(tile.args), 1) for tile in image.tile), default=1)
    image.load()
    turn = _TURN.get(_orientation(image))
    transparent = image.info.get("transparency")
    if step > 1 and transparent is not None:  # Pillow spreads the values, and not this one
        image.info["transparency"] = transparent * step
    if image.mode.startswith("I"):  # grey of sixteen bits
        values = np.asarray(image)
        planes = (
            [values >> 8] if transparent is None else [values >> 8, 255 * (values != transparent)]
        )
        pixels = np.stack(planes, axis=-1).astype(np.uint8)
        turned = _from_array(pixels)
    elif isinstance(transparent, tuple) and max(transparent) > 255:
        raise ValueError("one colour of sixteen bits is transparent")
    elif image.has_transparency_data:
        turned = image.convert("RGBA")
    else:
        turned = image.convert("L" if image.mode in ("1", "L") else "RGB")
    if turn is not None:
        turned = turned.transpose(pillow.Transpose[turn])
    array = np.asarray(turned)
    return array.reshape(*array.shape[:2], -1)


def _from_array(pixels: Pixels) -> Any:
    """Pillow's image of pixels in 1 (L), 2 (LA), 3 (RGB) or 4 channels (RGBA)."""
    return _import_pillow().fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def _over_white(pixels: Pixels) -> Pixels:
    """The colours seen before white, without the transparency."""
    colors, alpha = pixels[..., :-1].astype(np.uint16), pixels[..., -1:].astype(np.uint16)
    return ((colors * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


# Headers, without Pillow.


def _look_at(data: bytes, name: str) -> tuple[bool, bool]:
    """Whether a graph reads these bytes alike, and whether there are tags that may turn them."""
    try:
        if data.startswith(_PNG):
            width, height = struct.unpack_from(">II", data, 16)
            kinds = set(_png_chunks(data))
            alike, has_tags = True, not kinds <= _PLAIN_CHUNKS
            is_whole = b"IEND" in kinds
        elif data.startswith(_JPEG):
            segments = list(_jpeg_segments(data))
            kind, start = next((k, s) for k, s in segments if k in _FRAMES)
            bits, height, width, components = struct.unpack_from(">BHHB", data, start)
            alike = kind in _HUFFMAN_FRAMES and bits == 8 and components in (1, 3)
            has_tags = any(kind == _APP1 for kind, _ in segments)
            is_whole = data.find(_JPEG_END, segments[-1][1]) >= 0  # a thumbnail ends before that
        else:
            return False, True
    except (struct.error, StopIteration):
        raise _unreadable(name, "its header is cut off or damaged") from None
    try:
        _check_size(width, height)
    except ValueError as error:
        raise _unreadable(name, str(error)) from None
    if not is_whole:  # no graph reads it
        raise _unreadable(name, "image file is truncated")
    return alike, has_tags


def _png_chunks(data: bytes) -> Iterator[bytes]:
    position, kind = len(_PNG), b""
    while kind != b"IEND" and position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        position += 12 + length
        if kind != b"IEND" or position <= len(data):
            yield kind


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Kind and start of the content of every segment before the pixels."""
    position = 2
    while True:
        while data[position : position + 2] == b"\xff\xff":  # filling
            position += 1
        mark, kind, length = struct.unpack_from(">BBH", data, position)
        if mark != 0xFF or kind == _SCAN:
            return
        yield kind, position + 4
        position += 2 + length
