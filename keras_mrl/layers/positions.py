"""Learned position vectors for the tokens of a Transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_mrl_serving.integers import check_positive_integer


@keras.saving.register_keras_serializable(package="keras_mrl")
class LearnedPositions(keras.layers.Layer):
    """Add a learned vector per position to embedded tokens.

    Args:
        length: Number of positions; an input may have fewer.
        initializer: Initializer of the vectors.
        **kwargs: Arguments of every Keras layer (`name`, `dtype`).

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
        remedy = "Give the most tokens the model shall read at once."
        self.length = check_positive_integer("length", length, remedy)
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
        """Return the embedded tokens plus the vectors of their positions."""
        static_time = embedded.shape[1]
        if static_time is not None and static_time > self.length:
            raise ValueError(
                "An input must not have more positions than were learned. "
                f"Received: {static_time} tokens for length={self.length}. "
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
