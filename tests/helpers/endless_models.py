"""A model whose signatures do not end, and a version that does not load to its end."""

import os
from pathlib import Path

import tensorflow as tf


class Endless(tf.Module):
    """Answers at once, counts without an end, or waits for a pipe that nobody writes to."""

    @tf.function(input_signature=[tf.TensorSpec((None,), name="x")])
    def twice(self, x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"y": 2 * x}

    @tf.function(input_signature=[tf.TensorSpec((), tf.int64, name="steps")])
    def count(self, steps: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"steps": tf.while_loop(lambda i: i < steps, lambda i: [i + 1], [0 * steps])[0]}

    @tf.function(input_signature=[tf.TensorSpec((), tf.string, name="path")])
    def read(self, path: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"text": tf.io.read_file(path)}


def save_endless(path: Path) -> None:
    """Writes the model."""
    endless = Endless()
    signatures = {"serving_default": endless.twice, "count": endless.count, "read": endless.read}
    tf.saved_model.save(endless, str(path), signatures=signatures)


def put_endless_load(version: Path) -> None:
    """Makes a version whose load waits for a pipe that nobody writes to."""
    beside = version.with_name(f"making-{version.name}")
    beside.mkdir(parents=True)
    os.mkfifo(beside / "saved_model.pb")
    beside.rename(version)
