"""Encoded images in, the model's pixels out, inside the graph: clients send files as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_CHANNELS = (1, 3, 4)


@dataclass(frozen=True, kw_only=True)
class ImageDecoder:
    """What turns the bytes of a JPEG or PNG into what the model was trained on.

    An image is decoded to pixels of 0..255, resized (bilinear, smoothed where it shrinks, its
    sides stretched as needed), then multiplied by `scale` and moved by `offset`. GIF and BMP are
    decoded too, of an animation the first frame. A file that is none of these fails its call; where
    the server merges calls into batches, also those that were merged with it.

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
        sizes = (self.height, self.width)
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in sizes)
        if not whole or self.channels not in _CHANNELS:
            raise ValueError(
                "An image has a height and a width in pixels, and 1, 3 or 4 channels. Received: "
                f"height={self.height!r}, width={self.width!r}, channels={self.channels!r}. "
                "Give those of the model's input: ImageDecoder(height=32, width=32)."
            )
        for name in ("scale", "offset"):
            given = getattr(self, name)
            numbers = np.asarray(given, np.float64)
            if numbers.shape not in ((), (self.channels,)) or not np.isfinite(numbers).all():
                raise ValueError(
                    f"{name} must be one finite number, or one per channel. "
                    f"Received: {name}={given!r} for {self.channels} channels. "
                    f"Give {name}=1 / 255, or a tuple of {self.channels}."
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of what comes out."""
        return self.height, self.width, self.channels

    def to_json(self) -> dict[str, Any]:
        """Return what the manifest says of it."""
        return {**asdict(self), "formats": ["jpeg", "png", "gif", "bmp"], "resize": "bilinear"}

    def pixels(self, encoded: Sequence[bytes]) -> npt.NDArray[np.float32]:
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
                rows.append(self._decode(tf.constant(image)).numpy())
            except (TypeError, ValueError, tf.errors.OpError) as error:
                raise ValueError(
                    "A sample for a model with a decoder is a list of the bytes of images. "
                    f"Received: at {number}, {type(image).__name__} {str(image)[:20]!r}: "
                    f"{str(error).splitlines()[0][:120]} "
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
