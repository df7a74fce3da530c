"""Python functions become signatures, traced for any batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from keras_mrl_serving.contract import Manifest

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
