"""Keras masks for the results of arithmetic, which drops them.

In Keras's public API only a layer sees the mask of a tensor and passes it on, so each function
here calls a layer made for it. The two layers are made once: PyTorch's compiler makes none in a
step. They have no state.
"""

from __future__ import annotations

from typing import Any

import keras


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


class _Mask(keras.layers.Layer):
    """Returns the mask of its input, or a scalar if it has none."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True

    def build(self, input_shape: Any) -> None:
        """There are no weights."""

    def call(self, tensor: Any, mask: Any = None) -> Any:
        del tensor
        return keras.ops.zeros(()) if mask is None else mask


_MASK_OF_FIRST = _MaskOfFirst(autocast=False, name="mask_of_first")
_MASK = _Mask(autocast=False, name="mask")


def with_mask_of(source: Any, target: Any) -> Any:
    """Return `target` with the mask that Keras put on `source`, if any."""
    return _MASK_OF_FIRST(source, target)


def mask_of(tensor: Any) -> Any:
    """Return the mask that Keras put on `tensor`; None without one."""
    mask = _MASK(tensor)
    return mask if len(mask.shape) else None
