"""How far a SavedModel may be from the Keras model and still count as equal."""

from __future__ import annotations

import keras

TOLERANCE = 1e-5  # of a row's largest magnitude
# Where layers compute in half precision every backend rounds in places of its own. Two steps of the
# type were the widest seen, over all three; a deep model may drift by more.
HALF_TOLERANCE = {"bfloat16": 4 * 2**-7, "float16": 4 * 2**-10}


def tolerance_of(model: keras.Model) -> float:
    """Return by how much of a row's largest magnitude a signature may differ from `model`."""
    dtypes = {layer.compute_dtype for layer in model._flatten_layers()}
    return max(HALF_TOLERANCE.get(dtype, TOLERANCE) for dtype in dtypes)
