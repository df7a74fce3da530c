"""One reading of an image file: which pixels it holds, what is sent, what is refused and why."""

import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from keras_mrl_serving import UnreadableImageError, read_image, served_image
from keras_mrl_serving.images import MAX_PIXELS, SUFFIXES, is_image, resize_image
from tests.helpers.image_files import (
    ALPHA,
    COLORS,
    SIXTEEN,
    encode,
    exif,
    files,
    png_by_hand,
    png_chunk,
)

FILES = files()
REFUSED = {"tiff-called.png", "float-called.png", "transparent-sixteen.png"}
READ = sorted(set(FILES) - REFUSED)
# How a camera that was held so stores a picture: what undoes each orientation.
STORED_AS: dict[int, Any] = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels, -1),
}
OBLONG = COLORS[:9]


@pytest.mark.parametrize("orientation", STORED_AS)
@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "JPEG"])
def test_a_picture_stands_upright(orientation: int, file_format: str) -> None:
    settings: dict[str, Any] = {"lossless": True} if file_format == "WEBP" else {}
    image = Image.fromarray(np.ascontiguousarray(STORED_AS[orientation](OBLONG)))
    stored = read_image(encode(image, file_format, **settings))  # a JPEG changes the pixels
    upright = STORED_AS[{6: 8, 8: 6}.get(orientation, orientation)](stored)
    assert upright.shape == OBLONG.shape
    data = encode(image, file_format, exif=exif(orientation), **settings)
    for bytes_ in (data, served_image(data)):
        np.testing.assert_array_equal(read_image(bytes_), upright)
    if file_format != "JPEG":
        np.testing.assert_array_equal(upright, OBLONG)


def test_what_is_transparent_shows_white() -> None:
    opacity = ALPHA[..., None] / 255
    expected = np.floor(COLORS * opacity + 255 * (1 - opacity) + 0.5)
    np.testing.assert_array_equal(read_image(FILES["RGBA.png"]), expected)
    np.testing.assert_array_equal(read_image(FILES["transparent.webp"]), expected)
    kept = read_image(FILES["RGBA.png"], channels=4)
    np.testing.assert_array_equal(kept, np.dstack([COLORS, ALPHA]))


def test_one_color_that_is_transparent_shows_white() -> None:
    is_it = (COLORS == COLORS[3, 3]).all(-1, keepdims=True)
    expected = np.where(is_it, 255, COLORS)
    np.testing.assert_array_equal(read_image(FILES["transparent-color.png"]), expected)
    for bits in (1, 2, 4):
        opaque = read_image(FILES[f"grey-of-{bits}-bits.png"], 1)
        one = 255 // (2**bits - 1)
        transparent = read_image(FILES[f"transparent-grey-of-{bits}-bits.png"], 1)
        np.testing.assert_array_equal(transparent, np.where(opaque == one, 255, opaque))
        assert set(np.unique(opaque)) == {one * value for value in range(2**bits)}


def test_of_sixteen_bits_the_high_eight_count() -> None:
    high = SIXTEEN >> 8
    np.testing.assert_array_equal(read_image(FILES["sixteen-0.png"], 1), high[..., :1])
    np.testing.assert_array_equal(read_image(FILES["sixteen-2.png"]), high[..., :3])
    np.testing.assert_array_equal(read_image(FILES["sixteen-6.png"], 4), high)
    is_it = SIXTEEN[..., :1] == SIXTEEN[2, 2, 0]
    expected = np.where(is_it, 255, high[..., :1])
    np.testing.assert_array_equal(read_image(FILES["transparent-sixteen-grey.png"], 1), expected)
    turned = read_image(FILES["orientation-3-of-sixteen.png"], 1)
    np.testing.assert_array_equal(turned, high[::-1, ::-1, :1])


def test_of_several_pictures_the_first_counts() -> None:
    for name in ("animated.png", "animated.webp"):
        np.testing.assert_array_equal(read_image(FILES[name]), COLORS)
    np.testing.assert_array_equal(
        read_image(FILES["animated.gif"]), read_image(FILES["palette.gif"])
    )


def test_the_content_and_not_the_name_says_what_a_file_is() -> None:
    np.testing.assert_array_equal(read_image(FILES["called-jpeg-but.jpg"]), COLORS)
    assert [name for name in ("a.JPG", "b.tif", "c.WebP", "d.npy", "jpg") if is_image(name)] == [
        "a.JPG",
        "c.WebP",
    ]
    assert SUFFIXES == (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")


@pytest.mark.parametrize("name", READ)
def test_what_is_sent_has_the_same_pixels(name: str) -> None:
    sent = served_image(FILES[name])
    assert served_image(sent) == sent
    for channels in (1, 3, 4):
        pixels = read_image(FILES[name], channels)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (*COLORS.shape[:2], channels)
        np.testing.assert_array_equal(read_image(sent, channels), pixels)


def test_what_the_graph_reads_alike_is_sent_as_it_is() -> None:
    rewritten = {name for name in READ if served_image(FILES[name]) != FILES[name]}
    formats = (".gif", ".bmp", ".webp")
    assert rewritten == {
        *(name for name in READ if name.endswith(formats)),
        *(f"orientation-{number}.jpg" for number in range(2, 9)),
        *("xmp-orientation-6.jpg", "orientation-6.png", "orientation-3-of-sixteen.png"),
        *("cmyk.jpg", "ycck.jpg", "not-inverted-cmyk.jpg"),
    }
    assert all(served_image(FILES[name]).startswith(b"\x89PNG") for name in rewritten)


WITHOUT_PILLOW = (
    "Image files are read by Pillow. Received: import of PIL halted; None in sys.modules. "
    "Install it: pip install 'keras-mrl[images]'."
)


def test_what_follows_a_picture_does_no_harm() -> None:
    for name in ("RGB.png", "baseline-0.jpg"):
        followed = FILES[name] + b"\n"
        assert served_image(followed) == followed
        np.testing.assert_array_equal(read_image(followed), read_image(FILES[name]))


def test_pillow_is_needed_only_for_what_must_be_looked_into(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    for name in ("baseline-2.jpg", "progressive-0.jpg", "grey.jpg", "RGBA.png", "sixteen-6.png"):
        assert served_image(FILES[name]) == FILES[name]
    for name in ("orientation-1.jpg", "words.png", "palette.gif", "cmyk.jpg"):
        with pytest.raises(ImportError) as caught:
            served_image(FILES[name])
        assert str(caught.value) == WITHOUT_PILLOW
    with pytest.raises(ImportError):
        read_image(FILES["RGB.png"])


def png_of_size(width: int, height: int) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"x") + png_chunk(b"IEND", b"")


JPEG = FILES["baseline-0.jpg"]
SIDE = int(MAX_PIXELS**0.5) + 1


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (b"no image", "it is none"),
        (FILES["tiff-called.png"], "it is a TIFF"),
        (FILES["float-called.png"], "it is a TIFF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "it is a HEIF or AVIF"),
        (b"%PDF-1.7\n", "it is a PDF"),
        (b"\n<!DOCTYPE html><p>404", "it is text in HTML or XML"),
        (FILES["transparent-sixteen.png"], "one colour of sixteen bits is transparent"),
        (FILES["RGB.png"][:800], "image file is truncated"),
    ],
)
def test_what_is_no_image_is_refused_by_name(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImageError) as caught:
        read_image(data, name="birds/ant.jpg")
    assert caught.value.reason == reason
    assert str(caught.value) == (
        "An image file must be a whole JPEG, PNG, GIF, BMP or WebP. Received: birds/ant.jpg "
        f"({reason}). Save it anew as an 8-bit PNG or JPEG, or leave it out."
    )


def test_a_jpeg_of_twelve_bits_is_not_sent_as_it_is() -> None:
    """Neither Pillow nor the graph reads one; only a reader of its frame can say so in time."""
    twelve = JPEG.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c")
    assert twelve != JPEG
    with pytest.raises(UnreadableImageError):
        served_image(twelve)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"no image", "it is none"),
        (JPEG[:60], "its header is cut off or damaged"),
        (FILES["RGB.png"][:20], "its header is cut off or damaged"),
        (png_of_size(SIDE, SIDE), f"it has {SIDE} x {SIDE} pixels, more than 89,478,485"),
        (png_of_size(2**31 - 1, 1), "it has 2147483647 x 1 pixels, more than 89,478,485"),
        (png_of_size(0, 3), "it has no pixels"),
        *[(JPEG[:-cut], "image file is truncated") for cut in (1, 2, 3, 60)],
        *[(FILES["RGB.png"][:-cut], "image file is truncated") for cut in (1, 12, 500)],
        (FILES["progressive-0.jpg"][:-2], "image file is truncated"),
        (FILES["grey.jpg"][:-2], "image file is truncated"),
    ],
)
def test_what_need_not_be_sent_is_refused_by_name(
    data: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason != "it is none":  # which Pillow says
        monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UnreadableImageError) as caught:
        served_image(data, name="row 3")
    assert caught.value.reason == reason


@pytest.mark.parametrize("read", [read_image, served_image])
def test_a_path_is_no_file_s_bytes(read: Callable[..., Any]) -> None:
    for path in ("up.jpg", Path("up.jpg")):
        with pytest.raises(UnreadableImageError) as caught:
            read(path, name="row 3")
        assert str(caught.value) == (
            "An image file is given as its bytes. "
            f"Received: row 3, a {type(path).__name__}. "
            "Read the file: pathlib.Path(file).read_bytes()."
        )
    whole = read(JPEG)
    for data in (bytearray(JPEG), memoryview(JPEG)):
        np.testing.assert_array_equal(read(data), whole)


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "BMP", "WEBP"])
def test_a_size_is_read_before_its_pixels(
    file_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encode(Image.fromarray(COLORS), file_format)
    assert read_image(data).shape == COLORS.shape
    if file_format in ("PNG", "BMP"):  # of the others Pillow opens no half
        data = data[: len(data) // 2]
    monkeypatch.setattr("keras_mrl_serving.images.MAX_PIXELS", COLORS[..., 0].size - 1)
    for read in (read_image, served_image):
        with pytest.raises(UnreadableImageError, match=r"it has 21 x 21 pixels, more than 440"):
            read(data)


def test_resizing_weighs_no_color_by_its_transparency() -> None:
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0] = (200, 100, 0, 0)
    np.testing.assert_array_equal(resize_image(pixels, 1, 1), [[[100, 50, 0, 0]]])
    assert resize_image(pixels, 2, 2) is pixels
    assert resize_image(COLORS, 7, 5).shape == (7, 5, 3)


def damaged_files(count: int) -> Iterator[tuple[str, bytes]]:
    """Every file cut at every eighth, and with bytes changed at random, `count` of them."""
    random = np.random.default_rng(8)
    for name, data in FILES.items():
        for eighth in range(8):
            yield name, data[: len(data) * eighth // 8]
    for number in range(count):
        name = sorted(FILES)[number % len(FILES)]
        changed = bytearray(FILES[name])
        for place in random.integers(0, len(changed), random.integers(1, 5)):
            changed[place] = random.integers(256)
        yield name, bytes(changed)


def outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns, or the sentence by which it refuses."""
    try:
        return function(*arguments)
    except UnreadableImageError as error:
        return str(error)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")  # Pillow's, of tags it cannot read
def test_damaged_files_are_read_or_refused_by_name() -> None:
    read = refused = 0
    for name, data in damaged_files(20_000 if os.environ.get("KERAS_MRL_SOAK") else 400):
        sent = outcome(served_image, data, name)
        is_image = sent == data or (isinstance(sent, bytes) and sent.startswith(b"\x89PNG"))
        assert is_image or f"Received: {name} (" in sent
        for channels in (3, 4):
            pixels = outcome(read_image, data, channels, name)
            if isinstance(pixels, str):
                assert f"Received: {name} (" in pixels
                refused += 1
            else:
                assert (pixels.dtype, pixels.shape[2]) == (np.uint8, channels)
                assert pixels.size <= channels * MAX_PIXELS
                read += 1
    assert min(read, refused) > 0.1 * (read + refused)


def test_an_image_by_hand_is_what_pillow_writes() -> None:
    for interlaced in (False, True):
        by_hand = png_by_hand(COLORS, 2, 8, interlaced=interlaced)
        np.testing.assert_array_equal(read_image(by_hand), COLORS)
