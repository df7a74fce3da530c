"""What is served computes in float32, whatever the model was trained in."""

from __future__ import annotations

import tempfile
from pathlib import Path

import keras

from .travel import load, save
from .user_objects import user_objects

_HALVES = ("float16", "bfloat16")


def in_float32(model: keras.Model) -> keras.Model:
    """Return `model`, or a copy of it that computes in float32 if a layer of it does not.

    The weights are the model's own: half precision is a matter of speed on the device that trains,
    and differs between backends by whole steps of the type.

    Raises:
        ExportError: If the model cannot be saved, or does not load again.
    """
    if not any(_computes_in_half(layer) for layer in model._flatten_layers()):
        return model
    with tempfile.TemporaryDirectory(prefix="keras-mrl-float32-") as folder:
        file = Path(folder) / "model.keras"
        objects = user_objects(model)
        # Twice: a policy that is set on a layer reaches neither its weights, if they are in half
        # precision themselves, nor what it was made with in half precision.
        for _ in range(2):
            save(model, file)
            model = load(file, objects)
            _set_float32(model)
    return model


def _set_float32(model: keras.Model) -> None:
    for layer in model._flatten_layers():
        if _computes_in_half(layer):
            layer.dtype_policy = "float32"


def _computes_in_half(layer: keras.Layer) -> bool:
    return layer.compute_dtype in _HALVES and layer.quantization_mode is None
