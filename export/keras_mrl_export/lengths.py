"""Lengths of vectors in the graph, the same to the last bit wherever in a batch they lie."""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf

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
