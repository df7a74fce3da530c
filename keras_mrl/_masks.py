"""Keras's masks, kept through arithmetic."""

from __future__ import annotations

from typing import Any

import keras


def with_mask_of(source: Any, target: Any) -> Any:
    """Return `target`, carrying the mask Keras put on `source`, if any.

    Arithmetic and slicing drop masks, and only a layer may hand one on in Keras's public API.
    """
    return _HandOn(autocast=False, name="hand_on")(source, target)


def mask_of(tensor: Any) -> Any:
    """Return the mask Keras put on `tensor`; None without one."""
    look = _Look(autocast=False, name="look")
    look(tensor)
    return look.seen


class _HandOn(keras.layers.Layer):
    """The mask of the first argument, on the second."""

    def build(self, input_shape: Any) -> None:
        """Nothing to make."""

    def call(self, source: Any, target: Any) -> Any:
        del source  # its mask goes through compute_mask
        return target

    def compute_mask(self, source: Any, previous_mask: Any) -> Any:
        del source
        return previous_mask


class _Look(keras.layers.Layer):
    """The mask of what it is called on, kept."""

    seen: Any = None

    def build(self, input_shape: Any) -> None:
        """Nothing to make."""

    def call(self, tensor: Any) -> Any:
        del tensor
        return keras.ops.zeros(())  # asked for masks only where what is returned has none

    def compute_mask(self, tensor: Any, previous_mask: Any) -> Any:
        del tensor
        self.seen = previous_mask
        return previous_mask
