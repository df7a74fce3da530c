"""Decoding of images inside the served graph, so that clients send files as they are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving.integers import as_int, is_positive_integer

_FORMATS = ("jpeg", "png", "gif", "bmp")  # which every TensorFlow decodes
_CHANNELS = (1, 3, 4)
_GREY = (19595, 38470, 7471)  # red, green and blue of 65536
_HEADER_BYTES = 26  # of a PNG, up to its colour type
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_PNG_COLOR_TYPE = 25  # its place
_PNG_PALETTE = 3


@dataclass(frozen=True, kw_only=True)
class ImageDecoder:
    """Turns the bytes of an image into the pixels the model was trained on.

    An image is decoded to pixels of 0..255, resized (bilinear, smoothed where it shrinks, its
    sides stretched as needed), then multiplied by `scale` and moved by `offset`. A JPEG or PNG has
    the pixels that `keras_mrl_serving.read_image` gives it, but is not turned as its EXIF says: the
    client does that, and sends a PNG in place of a file that is read otherwise. TensorFlow itself
    decodes GIF (of an animation the first frame, without its transparency) and BMP (without a
    palette). Another file fails its call; where the server merges calls into batches, also those
    that were merged with it.

    Args:
        height: Height of the model's input, in pixels.
        width: Width of the model's input, in pixels.
        channels: 3 for colour and 1 for grey, over white where an image is transparent; 4 for
            colour with the transparency.
        scale: Factor of the pixels: 1/255 gives 0..1. One number, or one per channel.
        offset: Added after scaling. One number, or one per channel.

    Raises:
        ValueError: If a size is no positive integer, or a number is not finite.

    Examples:
        ```
        decoder = ImageDecoder(height=32, width=32, scale=1 / 255)
        a_few = [path.read_bytes() for path in sorted(Path("birds").glob("*.jpg"))[:8]]
        export_saved_model(model, "models/birds", a_few, decoder=decoder)
        ```
    """

    height: int
    width: int
    channels: int = 3
    scale: float | tuple[float, ...] = 1.0
    offset: float | tuple[float, ...] = 0.0

    def __post_init__(self) -> None:
        """Check what TensorFlow would refuse later, inside the server."""
        sizes = {name: getattr(self, name) for name in ("height", "width", "channels")}
        if not all(map(is_positive_integer, sizes.values())) or self.channels not in _CHANNELS:
            raise ValueError(
                "An image has a height and a width in pixels, and 1, 3 or 4 channels. Received: "
                f"{', '.join(f'{name}={size!r}' for name, size in sizes.items())}. "
                "Give those of the model's input: ImageDecoder(height=32, width=32)."
            )
        for name, size in sizes.items():
            object.__setattr__(self, name, as_int(size))
        for name in ("scale", "offset"):
            object.__setattr__(self, name, self._numbers(name, getattr(self, name)))

    def _numbers(self, name: str, value: Any) -> float | tuple[float, ...]:
        try:
            numbers = np.asarray(value)
        except ValueError:  # rows of unequal length
            numbers = np.array(None)
        fits = numbers.shape in ((), (self.channels,)) and numbers.dtype.kind in "iuf"
        with np.errstate(over="ignore"):
            # In the graph they are float32: 1e300 becomes infinite, and 1e-50 zero.
            in_graph = numbers.astype(np.float32) if fits else np.array(np.nan)
        if not np.isfinite(in_graph).all():
            raise ValueError(
                f"{name} must be one finite number, or one per channel. "
                f"Received: {name}={value!r} for {self.channels} channels. "
                f"Give {name}=1 / 255, or a tuple of {self.channels}."
            )
        if name == "scale" and not in_graph.all():
            raise ValueError(
                "scale must not be 0, which makes every image the same. "
                f"Received: scale={value!r}. Give scale=1 / 255, or leave it out."
            )
        floats = numbers.astype(np.float64).tolist()
        return tuple(floats) if numbers.ndim else float(floats)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of a decoded image."""
        return self.height, self.width, self.channels

    def to_json(self) -> dict[str, Any]:
        """Return the decoder as the manifest describes it."""
        transparency = "kept" if self.channels == 4 else "white"
        return {
            **asdict(self),
            **{"formats": list(_FORMATS), "resize": "bilinear", "transparency": transparency},
        }

    def pixels(self, encoded: Iterable[bytes]) -> npt.NDArray[np.float32]:
        """Return images decoded in this process, as the served graph will decode them.

        Args:
            encoded: The bytes of some files.

        Returns:
            `(rows, height, width, channels)`.

        Raises:
            ValueError: If a file is no image.
        """
        import tensorflow as tf

        images = []
        for position, image in enumerate(encoded):
            try:
                if not isinstance(image, bytes):
                    raise TypeError("not bytes.")
                images.append(self._decode(tf.constant(image)).numpy())
            except (TypeError, ValueError, tf.errors.OpError) as error:
                start = f" {image[:16]!r}" if isinstance(image, bytes) else ""
                raise ValueError(
                    "A sample for a model with a decoder is a list of the bytes of images. "
                    f"Received: at {position}, {type(image).__name__}{start}: {_reason(error)} "
                    "Give [path.read_bytes() for path in a_few_images]."
                ) from error
        return np.stack(images) if images else np.zeros((0, *self.shape), np.float32)

    def decode(self, encoded: Any) -> Any:
        """Return float32 `(batch, height, width, channels)` of a tensor of strings `(batch,)`."""
        import tensorflow as tf

        spec = tf.TensorSpec(self.shape, tf.float32)
        return tf.map_fn(self._decode, encoded, fn_output_signature=spec)

    def _decode(self, image: Any) -> Any:
        import tensorflow as tf

        # A header of a file that is cut off is filled up, so that its decoder says so.
        start = tf.strings.join([tf.strings.substr(image, 0, _HEADER_BYTES), bytes(_HEADER_BYTES)])
        header = tf.io.decode_raw(start, tf.uint8)

        def begins_with(signature: bytes) -> Any:
            return tf.reduce_all(header[: len(signature)] == list(signature))

        def jpeg() -> Any:
            return self._of_colors(tf.io.decode_jpeg(image, 3, dct_method="INTEGER_ACCURATE"))

        def png() -> Any:
            return self._of_transparent(_decode_png(image, header[_PNG_COLOR_TYPE]))

        def other() -> Any:
            return self._of_colors(tf.io.decode_image(image, 3, expand_animations=False))

        decoded = tf.case([(begins_with(_JPEG), jpeg), (begins_with(_PNG), png)], other)
        resized = tf.image.resize(decoded, (self.height, self.width), antialias=True)
        scale, offset = (np.asarray(value, np.float32) for value in (self.scale, self.offset))
        return tf.ensure_shape(resized * scale + offset, self.shape)

    def _of_colors(self, colors: Any) -> Any:
        """The pixels of `channels` of opaque ones in three."""
        import tensorflow as tf

        if self.channels == 4:
            return tf.concat([colors, tf.fill(tf.shape(colors[..., :1]), np.uint8(255))], -1)
        if self.channels == 3:
            return colors
        # Pillow's weights, in its integers.
        grey = tf.tensordot(tf.cast(colors, tf.int32), tf.constant(_GREY), 1) + (1 << 15)
        return tf.cast(tf.bitwise.right_shift(grey, 16), tf.uint8)[..., tf.newaxis]

    def _of_transparent(self, pixels: Any) -> Any:
        """The pixels of `channels` of those in four: before white, but where transparency stays."""
        import tensorflow as tf

        if self.channels == 4:
            return pixels
        numbers = tf.cast(pixels, tf.int32)
        colors, alpha = numbers[..., :3], numbers[..., 3:]
        return self._of_colors(
            tf.cast((colors * alpha + 255 * (255 - alpha) + 127) // 255, tf.uint8)
        )


def _decode_png(image: Any, color_type: Any) -> Any:
    """The colours and the transparency of a PNG, uint8 `(height, width, 4)`."""
    import tensorflow as tf

    def of_palette() -> Any:  # three channels, or four if colours of the palette are transparent
        pixels = tf.io.decode_png(image)
        opaque = tf.fill(tf.shape(pixels[..., :1]), np.uint8(255))
        return tf.concat([pixels, opaque], -1)[..., :4]

    def of_others() -> Any:
        pixels = tf.io.decode_png(image, 4)
        # Where a PNG stores no transparency for each pixel, TensorFlow fills in the largest value
        # of the file's own bits: 1 in a bilevel one.
        alpha = pixels[..., 3:]
        is_stored = tf.bitwise.bitwise_and(color_type, np.uint8(4)) > 0
        return tf.concat(
            [pixels[..., :3], tf.where((alpha > 0) & ~is_stored, np.uint8(255), alpha)], -1
        )

    return tf.cond(tf.equal(color_type, _PNG_PALETTE), of_palette, of_others)


def _reason(error: Exception) -> str:
    """Return the first line of TensorFlow's error, without the names of graph nodes in it."""
    text = re.sub(r"\{\{.*?\}\}|\[Op:.*", "", str(error)).strip()
    return text.splitlines()[0].rstrip(".")[:120] + "."
