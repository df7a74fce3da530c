"""The prefix of an embedding, scaled to unit length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from .._dims import check_dims, check_width


@keras.saving.register_keras_serializable(package="keras_mrl")
class Truncate(keras.layers.Layer):
    """Keep the first `dim` coordinates, *then* scale to unit length.

    The order matters: the prefix of a unit vector is not a unit vector. Lengths are taken in
    float32 whatever the layer's dtype, and an all-zero prefix stays zero with a finite gradient.

    Args:
        dim: Number of coordinates to keep.
        normalize: Whether the prefix is scaled to unit length.
        **kwargs: Arguments of every Keras layer (`name`, `dtype`).

    Shapes:
        Input: `(..., width)`. Output: `(..., dim)`.

    Raises:
        ValueError: If `dim` is not a positive integer or exceeds the input's width.

    Examples:
        >>> prefix = Truncate(2)(keras.ops.array([[3.0, 4.0, 12.0]]))
        >>> [round(float(x), 3) for x in prefix[0]]
        [0.6, 0.8]
    """

    def __init__(self, dim: int, normalize: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        (self.dim,) = check_dims((dim,))
        self.normalize = normalize
        self.supports_masking = True

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Check that there are `dim` coordinates to keep."""
        if input_shape[-1] is not None:
            check_width((self.dim,), input_shape[-1])

    def call(self, embedding: Any) -> Any:
        """Return the prefix `(..., dim)`."""
        prefix = embedding[..., : self.dim]
        return unit_length(prefix) if self.normalize else prefix

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """Return `(..., dim)`."""
        return (*input_shape[:-1], self.dim)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this layer again."""
        return {**super().get_config(), "dim": self.dim, "normalize": self.normalize}


def unit_length(vectors: Any) -> Any:
    """Return vectors `(..., dim)` scaled to unit length in float32; an all-zero vector stays zero.

    The square is bounded from below before its root is taken, so the gradient at zero is finite.
    """
    precise = ops.cast(vectors, "float32")
    square = ops.sum(ops.square(precise), axis=-1, keepdims=True)
    return ops.cast(precise * ops.rsqrt(ops.maximum(square, 1e-12)), vectors.dtype)
