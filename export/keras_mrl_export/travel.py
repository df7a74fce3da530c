"""The form in which a model goes from one process, or one precision, to another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import keras

from .errors import ExportError


def save(model: keras.Model, file: Path) -> None:
    """Write `model` to `file` in Keras' own `.keras` form.

    Raises:
        ExportError: If a part of it cannot be saved.
    """
    try:
        model.save(file)
    except Exception as error:
        raise ExportError(
            "A model travels in Keras' own .keras form, so every part of it must be saveable. "
            f"Received: {type(error).__name__}: {error} "
            "Give layers of your own a get_config(), and activations a name."
        ) from error


def load(file: Path, objects: dict[str, Any]) -> keras.Model:
    """Read a model back on the backend of this process.

    Sublayers that a layer makes without naming a precision take the global one: float32, whatever
    the caller trains in.

    Args:
        file: What `save` wrote.
        objects: The user's own classes and functions in it.

    Raises:
        ExportError: If it does not load.
    """
    try:
        with _global_float32():
            return keras.models.load_model(file, custom_objects=objects, compile=False)
    except Exception as error:
        backend = {"tensorflow": "TensorFlow", "jax": "JAX"}.get(keras.backend.backend(), "torch")
        raise ExportError(
            f"The model must load on the {backend} backend from its .keras form. "
            f"Received: {type(error).__name__}: {error} "
            "Give layers of your own a get_config() and keras.ops; replace Lambda layers by them."
        ) from error


@contextmanager
def _global_float32() -> Iterator[None]:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
