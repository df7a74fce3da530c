"""A model with a convolution, whose kernel ends the process over an input of another rank."""

from pathlib import Path

import tensorflow as tf


class Model(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 1), name="x")])
    def embed(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": tf.reduce_sum(tf.nn.conv2d(x, tf.ones((3, 3, 1, 2)), 1, "SAME"), [1, 2])}

    @tf.function(input_signature=[tf.TensorSpec((4, None, None, 1), name="x")])
    def of_four(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": tf.reduce_sum(tf.nn.conv2d(x, tf.ones((3, 3, 1, 2)), 1, "SAME"), [1, 2])}

    @tf.function(input_signature=[tf.TensorSpec(None, name="x")])
    def any_rank(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": tf.identity(x)}

    @tf.function(input_signature=[tf.TensorSpec((), name="x")])
    def scalar(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": tf.identity(x)}


def save(path: Path) -> Path:
    """Writes the model as the folder of one version, and returns the folder."""
    model = Model()
    signatures = {
        "serving_default": model.embed,
        "of_four": model.of_four,
        "any_rank": model.any_rank,
        "scalar": model.scalar,
    }
    tf.saved_model.save(model, str(path), signatures=signatures)
    return path
