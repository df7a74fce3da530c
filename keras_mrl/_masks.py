"""Keras masks for the results of arithmetic, which drops them.

In Keras's public API only a layer sees the mask of a tensor and passes it on, so each function
here calls a layer made for it.
"""

from __future__ import annotations

from typing import Any

import keras


def with_mask_of(source: Any, target: Any) -> Any:
    """Return `target` with the mask that Keras put on `source`, if any."""
    return _MaskOfFirst(autocast=False, name="mask_of_first")(source, target)


class _MaskOfFirst(keras.layers.Layer):
    """Returns the second argument, with the mask of the first."""

    def build(self, input_shape: Any) -> None:
        """There are no weights."""

    def call(self, source: Any, target: Any) -> Any:
        del source  # its mask goes through compute_mask
        return target

    def compute_mask(self, source: Any, previous_mask: Any) -> Any:
        del source
        return previous_mask


def mask_of(tensor: Any) -> Any:
    """Return the mask that Keras put on `tensor`; None without one."""
    reader = _MaskReader(autocast=False, name="mask_reader")
    reader(tensor)
    return reader.mask


class _MaskReader(keras.layers.Layer):
    """Stores the mask of its input as `mask`."""

    mask: Any = None

    def build(self, input_shape: Any) -> None:
        """There are no weights."""

    def call(self, tensor: Any) -> Any:
        del tensor
        return keras.ops.zeros(())  # Keras calls compute_mask only for an output without a mask

    def compute_mask(self, tensor: Any, previous_mask: Any) -> Any:
        del tensor
        self.mask = previous_mask
        return previous_mask
