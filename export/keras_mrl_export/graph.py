"""Lengths of vectors in the graph, the same to the last bit wherever in a batch they lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.embeddings import MIN_SQUARE

_MIN_LENGTH = np.sqrt(MIN_SQUARE)


def lengths(vectors: Any) -> Any:
    """Return the length of each vector, to divide by: never zero.

    TensorFlow makes a division by a root, `1 / sqrt(x)` too, an `rsqrt`, whose vector instructions
    round otherwise than those for the rows that are left over. The maximum keeps the two apart.

    Args:
        vectors: float32 `(..., width)`.

    Returns:
        float32 `(..., 1)`.

    Examples:
        >>> lengths(tf.constant([[3.0, 4.0], [0.0, 0.0]])).numpy().tolist()
        [[5.0], [9.999999974752427e-07]]
    """
    squares = tf.reduce_sum(tf.square(vectors), axis=-1, keepdims=True)
    return tf.maximum(tf.sqrt(squares), _MIN_LENGTH)


# Python functions become signatures, traced for any batch size.

Tensors = dict[str, Any]


def traced(function: Callable[..., Tensors], specs: Mapping[str, Any]) -> Any:
    """Return a function of named tensors as a signature."""
    # Only the backbone, a function of its own, may hold Python that needs to be rewritten.
    return tf.function(function, autograph=False).get_concrete_function(**specs)


def describing(manifest: Manifest) -> Any:
    """Return the signature `describe`: the manifest, once per row."""
    text = manifest.to_json()

    def describe(key: Any) -> Tensors:
        return {"manifest": tf.fill(tf.shape(key), text)}

    return traced(describe, {"key": tf.TensorSpec([None], tf.string, "key")})
