"""The likeliest of very many classes, without a pass over all of them for each question."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from keras_mrl_serving.cascade.confidence import check_confidence

_MANY = 4096  # classes; below, TensorFlow's own top_k is as fast


class Likeliest:
    """Probabilities of rows, with the largest of each run of classes.

    The largest probability of a row, and the few best ones, are then found among the runs: of
    100,000 classes `top_k` reads every one again, in one thread, and the rows it is asked for have
    to be copied first. The answers are those of `top_k`: of equal classes the lower id.

    Args:
        logits: `(rows, classes)`; the number of classes is known.
        temperature: What logits are divided by.
    """

    def __init__(self, logits: Any, temperature: float) -> None:
        self._probabilities = tf.nn.softmax(logits if temperature == 1 else logits / temperature)
        classes = int(logits.shape[-1])
        self._run = _run_length(classes)
        self._runs = classes // self._run
        self._largest = self._probabilities
        if self._run > 1:
            by_run = tf.reshape(self._probabilities, [-1, self._runs, self._run])
            self._largest = tf.reduce_max(by_run, axis=-1)

    def confidence(self, measure: str) -> Any:
        """Return how sure each row is, `(rows,)`: `keras_mrl_serving.cascade.confidence` in a graph.

        Args:
            measure: One of its `CONFIDENCES`.
        """
        if check_confidence(measure) == "max_probability":
            return tf.reduce_max(self._largest, axis=-1)
        if measure == "entropy":
            shares = self._probabilities
            return tf.reduce_sum(tf.math.xlogy(shares, shares), axis=-1)
        if self._probabilities.shape[-1] == 1:
            return self._probabilities[:, 0]
        first, second = tf.unstack(self.best(tf.range(tf.shape(self._largest)[0]), 2)[0], axis=1)
        return first - second

    def best(self, rows: Any, k: int) -> tuple[Any, Any]:
        """Return the `k` largest probabilities of some rows, and their classes.

        Args:
            rows: int32 `(chosen,)`.
            k: How many.

        Returns:
            Two of `(chosen, k)`, best first.
        """
        largest = tf.gather(self._largest, rows)
        if self._run == 1 or k >= self._runs:
            return tuple(tf.math.top_k(tf.gather(self._probabilities, rows), k))
        # The k best lie in the k runs whose largest are the largest. In order of the runs, so that
        # of equal classes the lower id comes first.
        runs = tf.sort(tf.math.top_k(largest, k).indices, axis=-1)
        by_run = tf.reshape(self._probabilities, [-1, self._run])
        among = tf.gather(by_run, rows[:, None] * self._runs + runs)
        best, at = tf.math.top_k(tf.reshape(among, [-1, k * self._run]), k)
        run = tf.gather(runs, at // self._run, batch_dims=1)
        return best, run * self._run + at % self._run


def _run_length(classes: int) -> int:
    """A divisor of the number of classes near its root; 1 where there is none, or no need."""
    root = math.isqrt(classes)
    near = range(root // 4, 4 * root)
    fitting = [n for n in near if n > 1 and classes % n == 0] if classes >= _MANY else []
    return min(fitting, key=lambda n: abs(math.log(n / root)), default=1)
