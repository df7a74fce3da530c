"""The form in which a model goes from one process, or one precision, to another."""

from __future__ import annotations

from pathlib import Path

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
