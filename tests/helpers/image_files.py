"""Image files of many formats, modes and orientations: by Pillow, and some by hand."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

RNG = np.random.default_rng(16)
HEIGHT = WIDTH = 21  # square, so that a picture keeps its size when it is turned
COLORS = np.clip(
    np.add.outer(np.arange(HEIGHT) * 7, np.arange(WIDTH) * 9)[..., None]
    + RNG.integers(-40, 41, (HEIGHT, WIDTH, 3)),
    0,
    255,
).astype(np.uint8)
ALPHA = RNG.integers(0, 256, (HEIGHT, WIDTH), np.uint8)
SIXTEEN = RNG.integers(0, 2**16, (HEIGHT, WIDTH, 4), np.uint16)
ORIENTATION = 0x0112


def encode(image: Image.Image, file_format: str, **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **settings)
    return file.getvalue()


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags.tobytes()


def png_by_hand(
    pixels: Any, color_type: int, bits: int, *chunks: tuple[bytes, bytes], interlaced: bool = False
) -> bytes:
    """A PNG of integers `(height, width, channels)`, of kinds that Pillow does not write."""
    height, width, channels = pixels.shape

    def scanlines(part: Any) -> bytes:
        rows = []
        for row in part.reshape(len(part), -1):
            if bits == 16:
                packed = row.astype(">u2").tobytes()
            else:
                digits = "".join(f"{value:0{bits}b}" for value in row.tolist())
                digits += "0" * (-len(digits) % 8)
                packed = int(digits, 2).to_bytes(len(digits) // 8, "big")
            rows.append(b"\0" + packed)
        return b"".join(rows)

    passes = [pixels]
    if interlaced:
        adam7 = [(0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2)]
        adam7.append((1, 2, 0, 1))
        passes = [pixels[top::down, left::right] for top, down, left, right in adam7]
    data = b"".join(scanlines(part) for part in passes if part.size)
    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, int(interlaced))
    del channels
    written = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(png_chunk, *zip(*written, strict=True)))


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def files() -> dict[str, bytes]:
    """The bytes of some sixty files by a name that says what each is."""
    return dict([*_jpegs(), *_pngs(), *_others()])


def _jpegs() -> Iterator[tuple[str, bytes]]:
    image = Image.fromarray(COLORS)
    for subsampling in (0, 1, 2):
        for progressive in (False, True):
            kind = "progressive" if progressive else "baseline"
            settings = {"subsampling": subsampling, "progressive": progressive, "quality": 90}
            yield f"{kind}-{subsampling}.jpg", encode(image, "JPEG", **settings)
    yield "grey.jpg", encode(image.convert("L"), "JPEG")
    yield "rgb.jpg", encode(image, "JPEG", keep_rgb=True)
    yield "restarts.jpg", encode(image, "JPEG", restart_marker_blocks=1)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    yield "profile.jpg", encode(image, "JPEG", icc_profile=profile)
    cmyk = encode(image.convert("CMYK"), "JPEG")
    yield "cmyk.jpg", cmyk
    at = cmyk.index(b"Adobe") + 11  # the transform: 0 for CMYK, 2 for YCCK
    yield "ycck.jpg", cmyk[:at] + b"\2" + cmyk[at + 1 :]
    yield "not-inverted-cmyk.jpg", cmyk.replace(b"\xff\xee\0\x0eAdobe", b"\xff\xed\0\x0eAdobe")
    for orientation in range(1, 9):
        yield f"orientation-{orientation}.jpg", encode(image, "JPEG", exif=exif(orientation))
    yield "orientation-0.jpg", encode(image, "JPEG", exif=exif(0))
    yield "damaged-tags.jpg", encode(image, "JPEG", exif=b"Exif\0\0no tags")
    xmp = b'<x:xmpmeta><rdf tiff:Orientation="6"/></x:xmpmeta>'
    yield "xmp-orientation-6.jpg", encode(image, "JPEG", xmp=xmp)
    pair = [image.rotate(90)]
    yield "two-pictures.jpg", encode(image, "MPO", save_all=True, append_images=pair)
    yield "called-png-but.png", encode(image, "JPEG")


def _pngs() -> Iterator[tuple[str, bytes]]:
    image = Image.fromarray(COLORS)
    transparent = image.copy()
    transparent.putalpha(Image.fromarray(ALPHA))
    for mode in ("RGB", "L", "1", "P"):
        yield f"{mode}.png", encode(image.convert(mode), "PNG")
    yield "RGBA.png", encode(transparent, "PNG")
    yield "LA.png", encode(transparent.convert("LA"), "PNG")
    few = image.quantize(11)
    yield "palette-of-11.png", encode(few, "PNG")
    levels = bytes(RNG.integers(0, 256, 11).tolist())
    yield "transparent-palette-of-11.png", encode(few, "PNG", transparency=levels)
    yield "transparent-color-of-palette.png", encode(few, "PNG", transparency=3)
    red = tuple(COLORS[3, 3].tolist())
    yield "transparent-color.png", encode(image, "PNG", transparency=red)
    grey = image.convert("L")
    yield "transparent-grey.png", encode(grey, "PNG", transparency=grey.getpixel((3, 3)))
    yield "transparent-black.png", encode(image.convert("1"), "PNG", transparency=0)
    for bits in (1, 2, 4):
        values = RNG.integers(0, 2**bits, (HEIGHT, WIDTH, 1))
        yield f"grey-of-{bits}-bits.png", png_by_hand(values, 0, bits)
        one = struct.pack(">H", 1)
        yield f"transparent-grey-of-{bits}-bits.png", png_by_hand(values, 0, bits, (b"tRNS", one))
    for color_type, channels in {0: 1, 2: 3, 4: 2, 6: 4}.items():
        yield f"sixteen-{color_type}.png", png_by_hand(SIXTEEN[..., :channels], color_type, 16)
    grey16, color16 = (struct.pack(f">{n}H", *SIXTEEN[2, 2, :n].tolist()) for n in (1, 3))
    yield "transparent-sixteen-grey.png", png_by_hand(SIXTEEN[..., :1], 0, 16, (b"tRNS", grey16))
    yield "transparent-sixteen.png", png_by_hand(SIXTEEN[..., :3], 2, 16, (b"tRNS", color16))
    yield "interlaced.png", png_by_hand(COLORS, 2, 8, interlaced=True)
    yield "gamma.png", png_by_hand(COLORS, 2, 8, (b"gAMA", struct.pack(">I", 100000)))
    yield "orientation-6.png", encode(transparent, "PNG", exif=exif(6))
    yield (
        "orientation-3-of-sixteen.png",
        encode(Image.fromarray(SIXTEEN[..., 0]), "PNG", exif=exif(3)),
    )
    text = PngInfo()
    text.add_text("Title", "words")
    yield "words.png", encode(image, "PNG", pnginfo=text)
    more = {"save_all": True, "append_images": [image.rotate(180)]}
    yield "animated.png", encode(image, "PNG", **more)
    yield "called-jpeg-but.jpg", encode(image, "PNG")


def _others() -> Iterator[tuple[str, bytes]]:
    image = Image.fromarray(COLORS)
    transparent = image.copy()
    transparent.putalpha(Image.fromarray(ALPHA))
    more = {"save_all": True, "append_images": [image.rotate(180)]}
    yield "palette.gif", encode(image, "GIF")
    yield "grey.gif", encode(image.convert("L"), "GIF")
    yield "transparent.gif", encode(transparent, "GIF")
    yield "animated.gif", encode(image, "GIF", **more)
    small = encode(image.crop((0, 0, WIDTH - 4, HEIGHT - 2)), "GIF")
    canvas = struct.pack("<HH", WIDTH, HEIGHT)
    yield "smaller-than-its-canvas.gif", small[:6] + canvas + small[10:]
    for mode in ("RGB", "L", "1", "P", "RGBA"):
        yield f"{mode}.bmp", encode((transparent if mode == "RGBA" else image).convert(mode), "BMP")
    yield "lossless.webp", encode(image, "WEBP", lossless=True)
    yield "lossy.webp", encode(image, "WEBP")
    yield "transparent.webp", encode(transparent, "WEBP", lossless=True)
    yield "animated.webp", encode(image, "WEBP", lossless=True, **more)
    yield "orientation-8.webp", encode(image, "WEBP", lossless=True, exif=exif(8))
    yield "tiff-called.png", encode(image, "TIFF")
    yield "float-called.png", encode(Image.fromarray(COLORS[..., 0] / np.float32(255)), "TIFF")
