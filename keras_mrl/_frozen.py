"""The warning for a nested head on features that cannot learn to nest."""

from __future__ import annotations

import warnings
from typing import Any

import keras

_SENTENCE = (
    "A Matryoshka head needs features that can learn to nest. "
    "Received: features none of whose weights can be trained; a new head on a frozen backbone "
    "gives about 5% at 8 dims (the paper's own finding). "
    "Unfreeze the last blocks of the backbone, or put a trainable layer before the head, "
    "e.g. keras.layers.Dense(width)."
)


def has_frozen_source(layer: keras.layers.Layer) -> bool:
    """Whether `layer` stands in a functional model with nothing to train before it."""
    try:
        features = layer.input
    except AttributeError:  # never called symbolically: whoever calls it knows its source
        return False
    source = keras.Model(keras.utils.get_source_inputs(features), features)
    return not source.trainable_weights


def warn_frozen(owner: Any) -> None:
    """Warn once per `owner` (a training step runs in Python on every batch under torch)."""
    if not getattr(owner, "_warned_frozen", False):
        owner._warned_frozen = True
        warnings.warn(_SENTENCE, UserWarning, stacklevel=2)
