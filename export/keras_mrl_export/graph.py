"""The pieces that the graphs of models and of galleries share: tracing, `describe`, lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from keras_mrl_serving.contract import MODEL_ID, Manifest
from keras_mrl_serving.embeddings import MIN_SQUARE

from . import constants

Tensors = dict[str, Any]
# A function of named tensors, and a TensorSpec for each of them.
Traceable = tuple[Callable[..., Tensors], Mapping[str, Any]]

_MIN_LENGTH = np.sqrt(MIN_SQUARE)


def trace(function: Callable[..., Tensors], specs: Mapping[str, Any]) -> Any:
    """Return a function of named tensors as a signature, for the batch sizes of `specs`."""
    # Only the backbone, a function of its own, may hold Python that needs to be rewritten.
    return tf.function(function, autograph=False).get_concrete_function(**specs)


def with_model_id(function: Callable[..., Tensors], model_id: int | None) -> Callable[..., Tensors]:
    """Return a function whose rows also carry the id of the model; None leaves it as it is."""
    if model_id is None:
        return function

    def identified(**inputs: Any) -> Tensors:
        rows = tf.shape(next(iter(inputs.values())))[:1]
        ids = tf.fill(rows, tf.constant(model_id, tf.int32, name=constants.MODEL_ID))
        return {**function(**inputs), MODEL_ID: ids}

    return identified


def trace_describe(manifest: Manifest) -> Any:
    """Return the signature `describe`, which answers every row with the manifest."""
    text = manifest.to_json()

    def describe(key: Any) -> Tensors:
        return {"manifest": tf.fill(tf.shape(key), tf.constant(text, name=constants.MANIFEST))}

    return trace(describe, {"key": tf.TensorSpec([None], tf.string, "key")})


def first_rows(tensor: Any, rows: Any) -> Any:
    """Return the first rows of a tensor, as a view of it.

    Args:
        tensor: `(batch, ...)`.
        rows: How many, an int32.

    Examples:
        >>> first_rows(tf.constant([[1, 2], [3, 4]]), tf.constant(1)).numpy().tolist()
        [[1, 2]]
    """
    first = tensor[:rows]
    first.set_shape([None, *tensor.shape[1:]])  # a slice of unknown length has forgotten it
    return first


def lengths(vectors: Any) -> Any:
    """Return the length of each vector, to divide by: never zero.

    Equal vectors have equal lengths to the last bit, wherever in a batch they lie. TensorFlow turns
    a division by a root, `1 / sqrt(x)` too, into an `rsqrt`, whose vector instructions round
    differently from those for the last rows of a batch. The maximum keeps the two apart.

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
