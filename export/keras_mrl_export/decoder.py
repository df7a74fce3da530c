"""Encoded images in, the model's pixels out, inside the graph: clients send files as they are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving.contract import as_int

# Which integers count as such.


def is_positive(value: object) -> bool:
    """Whether `value` is an integer of at least 1, of Python or of NumPy."""
    try:
        return as_int(value) > 0
    except TypeError:
        return False


# What TensorFlow decodes to a number of channels.
_FORMATS = {1: ("jpeg", "png"), 3: ("jpeg", "png", "gif", "bmp"), 4: ("png", "bmp")}


@dataclass(frozen=True, kw_only=True)
class ImageDecoder:
    """What turns the bytes of a JPEG or PNG into what the model was trained on.

    An image is decoded to pixels of 0..255, resized (bilinear, smoothed where it shrinks, its
    sides stretched as needed), then multiplied by `scale` and moved by `offset`. TensorFlow decodes
    JPEG and PNG to 1 channel; these, GIF (of an animation the first frame) and BMP to 3; PNG and
    BMP to 4. A BMP must have no palette, a JPEG for 1 channel no CMYK. Another file fails its
    call; where the server merges calls into batches, also those that were merged with it.

    Args:
        height: Of the model's input, in pixels.
        width: Of the model's input, in pixels.
        channels: 3 for colour, 1 for grey, 4 with transparency.
        scale: What pixels are multiplied by: 1/255 gives 0..1. One number, or one per channel.
        offset: What is added then. One number, or one per channel.

    Raises:
        ValueError: If a size or a number is none.

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
        """Check what TensorFlow would refuse only inside the server."""
        sizes = {name: getattr(self, name) for name in ("height", "width", "channels")}
        if not all(map(is_positive, sizes.values())) or self.channels not in _FORMATS:
            raise ValueError(
                "An image has a height and a width in pixels, and 1, 3 or 4 channels. Received: "
                f"{', '.join(f'{name}={given!r}' for name, given in sizes.items())}. "
                "Give those of the model's input: ImageDecoder(height=32, width=32)."
            )
        for name, size in sizes.items():
            object.__setattr__(self, name, as_int(size))
        for name in ("scale", "offset"):
            object.__setattr__(self, name, self._numbers(name, getattr(self, name)))

    def _numbers(self, name: str, given: Any) -> float | tuple[float, ...]:
        try:
            numbers = np.asarray(given)
        except ValueError:  # of no one shape
            numbers = np.array(None)
        fits = numbers.shape in ((), (self.channels,)) and numbers.dtype.kind in "iuf"
        with np.errstate(over="ignore"):
            # In the graph they are float32, of which 1e300 is none and 1e-50 is zero.
            in_graph = numbers.astype(np.float32) if fits else np.array(np.nan)
        if not np.isfinite(in_graph).all():
            raise ValueError(
                f"{name} must be one finite number, or one per channel. "
                f"Received: {name}={given!r} for {self.channels} channels. "
                f"Give {name}=1 / 255, or a tuple of {self.channels}."
            )
        if name == "scale" and not in_graph.all():
            raise ValueError(
                "scale must not be 0, which makes every image the same. "
                f"Received: scale={given!r}. Give scale=1 / 255, or leave it out."
            )
        known = numbers.astype(np.float64).tolist()
        return tuple(known) if numbers.ndim else float(known)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of what comes out."""
        return self.height, self.width, self.channels

    def to_json(self) -> dict[str, Any]:
        """Return what the manifest says of it."""
        return {**asdict(self), "formats": list(_FORMATS[self.channels]), "resize": "bilinear"}

    def pixels(self, encoded: Iterable[bytes]) -> npt.NDArray[np.float32]:
        """Decode here what the graph will decode there.

        Args:
            encoded: The bytes of some files.

        Returns:
            `(rows, height, width, channels)`.

        Raises:
            ValueError: If one is no image.
        """
        import tensorflow as tf

        rows = []
        for number, image in enumerate(encoded):
            try:
                if not isinstance(image, bytes):
                    raise TypeError("not bytes.")
                rows.append(self._decode(tf.constant(image)).numpy())
            except (TypeError, ValueError, tf.errors.OpError) as error:
                shown = f" {image[:16]!r}" if isinstance(image, bytes) else ""
                raise ValueError(
                    "A sample for a model with a decoder is a list of the bytes of images. "
                    f"Received: at {number}, {type(image).__name__}{shown}: {_plain(error)} "
                    "Give [path.read_bytes() for path in a_few_images]."
                ) from error
        return np.stack(rows) if rows else np.zeros((0, *self.shape), np.float32)

    def decode(self, encoded: Any) -> Any:
        """Return the graph's `(batch, height, width, channels)` of strings `(batch,)`."""
        import tensorflow as tf

        spec = tf.TensorSpec(self.shape, tf.float32)
        return tf.map_fn(self._decode, encoded, fn_output_signature=spec)

    def _decode(self, image: Any) -> Any:
        import tensorflow as tf

        raw = tf.io.decode_image(image, self.channels, expand_animations=False)
        sized = tf.image.resize(raw, (self.height, self.width), antialias=True)
        scale, offset = (np.asarray(given, np.float32) for given in (self.scale, self.offset))
        return tf.ensure_shape(sized * scale + offset, self.shape)


def _plain(error: Exception) -> str:
    """What TensorFlow says, without the places in the graph it says it of."""
    text = re.sub(r"\{\{.*?\}\}|\[Op:.*", "", str(error)).strip()
    return text.splitlines()[0].rstrip(".")[:120] + "."
