"""A model whose answers show how its requests were batched."""

from pathlib import Path

import tensorflow as tf


class Model(tf.Module):
    """Answers each row with the number of rows that ran with it, and their width."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = tf.Variable(tf.reshape(tf.range(12.0), (4, 3)))

    @tf.function(input_signature=[tf.TensorSpec((None, None), name="x")])
    def rows(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        count, width = tf.unstack(tf.shape(x))
        return {
            "count": tf.fill([count], count),
            "width": tf.fill([count], width),
            "total": tf.reduce_sum(x, 1),
            "sum": tf.reduce_sum(x),
            "first": x[:1],
        }

    @tf.function(input_signature=[tf.TensorSpec((None, 4), name="x")])
    def project(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": x @ self.weights}

    @tf.function(
        input_signature=[
            tf.TensorSpec((None,), name="a"),
            tf.TensorSpec((None,), tf.string, name="b"),
        ]
    )
    def pair(self, a: tf.Tensor, b: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"twice": a + a, "text": tf.identity(b)}

    @tf.function(input_signature=[tf.TensorSpec((), name="x")])
    def scalar(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"x": tf.identity(x)}

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.int64, name="steps")])
    def spin(self, steps: tf.Tensor) -> dict[str, tf.Tensor]:
        """Computes for as many steps as the largest row says."""
        last = tf.reduce_max(steps)
        done = tf.while_loop(lambda i: i < last, lambda i: [i + 1], [0 * last])[0]
        return {"steps": tf.fill(tf.shape(steps), done)}


def save(path: Path) -> Path:
    """Writes the model as the folder of one version, and returns the folder."""
    model = Model()
    names = ("rows", "project", "pair", "scalar", "spin")
    signatures = {name: getattr(model, name) for name in names}
    tf.saved_model.save(model, str(path), signatures=signatures)
    return path
