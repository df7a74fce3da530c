"""Where a token stands, told to a Transformer by learned vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_mrl")
class LearnedPositions(keras.layers.Layer):
    """Add a learned vector per position to embedded tokens.

    Args:
        length: Most positions an input may have.
        initializer: Initializer of the vectors.
        **kwargs: What every Keras layer takes (`name`, `dtype`).

    Shapes:
        Input and output: `(batch, time, width)`, time at most `length`.

    Raises:
        ValueError: If `length` is not a positive integer, or an input is longer.

    Examples:
        >>> layer = LearnedPositions(16)
        >>> tuple(layer(keras.ops.zeros((2, 10, 4))).shape)
        (2, 10, 4)
    """

    def __init__(self, length: int, *, initializer: Any = "uniform", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise ValueError(
                "length must be a positive integer. "
                f"Received: length={length!r}. Give the most tokens the model shall read at once."
            )
        self.length = length
        self.initializer = keras.initializers.get(initializer)
        self.supports_masking = True

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Create one vector per position."""
        self._vectors = self.add_weight(
            name="positions",
            shape=(self.length, input_shape[-1]),
            initializer=self.initializer,
        )

    def call(self, embedded: Any) -> Any:
        """Return the embedded tokens, their positions added."""
        known = embedded.shape[1]
        if known is not None and known > self.length:
            raise ValueError(
                "An input must not have more positions than were learned. "
                f"Received: {known} tokens for length={self.length}. "
                "Give the last tokens alone, or make the model with a larger length."
            )
        time = ops.shape(embedded)[1]
        return embedded + ops.convert_to_tensor(self._vectors)[:time]

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """Return the shape of the input."""
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this layer again."""
        return {
            **super().get_config(),
            "length": self.length,
            "initializer": keras.initializers.serialize(self.initializer),
        }
