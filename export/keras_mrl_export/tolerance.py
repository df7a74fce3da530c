"""How far a SavedModel may be from the Keras model and still count as equal."""

from __future__ import annotations

import keras

TOLERANCE = 1e-5  # of a row's largest magnitude
# Where layers compute in half precision every backend rounds in places of its own. Measured on a
# small net in bfloat16, in steps of the type: 1.4 in the features, 0.9 in a head given the same
# features, up to 5.7 end to end where a prefix is small in its row: a sound model may be refused.
HALF_TOLERANCE = {"bfloat16": 4 * 2**-7, "float16": 4 * 2**-10}


def tolerance_of(model: keras.Model) -> float:
    """Return by how much of a row's largest magnitude a signature may differ from `model`."""
    dtypes = {layer.compute_dtype for layer in model._flatten_layers()}
    return max(HALF_TOLERANCE.get(dtype, TOLERANCE) for dtype in dtypes)
