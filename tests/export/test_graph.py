"""Lengths in the graph: equal rows have equal ones, wherever they lie."""

import numpy as np
import tensorflow as tf

from keras_mrl_export.graph import lengths
from keras_mrl_serving.embeddings import truncate


def test_equal_rows_stay_equal_wherever_they_lie() -> None:
    """As a graph: what TensorFlow rewrites there, it leaves alone outside."""

    @tf.function(input_signature=[tf.TensorSpec([None, 8], tf.float32)])
    def scaled(vectors: tf.Tensor) -> tf.Tensor:
        return vectors / lengths(vectors)

    for vector in np.random.default_rng(0).normal(size=(100, 8)).astype(np.float32):
        rows = scaled(np.tile(vector, (301, 1))).numpy()
        assert len(np.unique(rows, axis=0)) == 1
        np.testing.assert_allclose(rows[0], truncate(vector, 8), rtol=3e-7)


def test_a_zero_vector_stays_zero() -> None:
    zeros = np.zeros((2, 3), np.float32)
    np.testing.assert_array_equal((zeros / lengths(zeros)).numpy(), zeros)
