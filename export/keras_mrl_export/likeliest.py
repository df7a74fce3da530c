"""How sure a row is and its few best classes, in a graph, also where classes are many."""

from __future__ import annotations

import math
from typing import Any

import tensorflow as tf

from keras_mrl_serving.cascade.confidence import check_confidence

_MANY_CLASSES = 4096  # with fewer, TensorFlow's own top_k is as fast


class Likeliest:
    """Probabilities of rows, and the largest probability of each run of neighbouring classes.

    The largest probability of a row, and its few best classes, are then found among the runs.
    `top_k` alone would read all of 100,000 classes again, in one thread, after copying the rows.
    The answers are those of `top_k`: of equal classes the lower id comes first.

    Args:
        probabilities: `(rows, classes)`, with a static number of classes.
    """

    def __init__(self, probabilities: Any) -> None:
        self._probabilities = probabilities
        num_classes = int(probabilities.shape[-1])
        self._length = run_length(num_classes)
        self._num_runs = num_classes // self._length
        self._largest = self._probabilities  # (rows, runs)
        if self._length > 1:
            by_run = tf.reshape(self._probabilities, [-1, self._num_runs, self._length])
            self._largest = tf.reduce_max(by_run, axis=-1)

    @classmethod
    def of_logits(cls, logits: Any, temperature: Any = None) -> Likeliest:
        """Return those of a softmax of `logits (rows, classes)`, divided by a temperature."""
        return cls(tf.nn.softmax(logits if temperature is None else logits / temperature))

    def confidence(self, measure: str) -> Any:
        """Return the confidence of each row, `(rows,)`, as `keras_mrl_serving` computes it.

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
        if self._length == 1 or k >= self._num_runs:
            return tuple(tf.math.top_k(tf.gather(self._probabilities, rows), k))
        # The k best classes lie in the k runs with the largest maxima. The runs are sorted, so
        # that of equal classes the lower id comes first.
        runs = tf.sort(tf.math.top_k(tf.gather(self._largest, rows), k).indices, axis=-1)
        by_run = tf.reshape(self._probabilities, [-1, self._length])
        candidates = tf.gather(by_run, rows[:, None] * self._num_runs + runs)
        best, at = tf.math.top_k(tf.reshape(candidates, [-1, k * self._length]), k)
        run = tf.gather(runs, at // self._length, batch_dims=1)
        return best, run * self._length + at % self._length


def run_length(num_classes: int) -> int:
    """Return a divisor of the number of classes near its root; 1 if there is none, or no need.

    Examples:
        >>> run_length(100), run_length(10_000)
        (1, 100)
    """
    if num_classes < _MANY_CLASSES:
        return 1
    root = math.isqrt(num_classes)
    divisors = [n for n in range(root // 4, 4 * root) if num_classes % n == 0]
    return min(divisors, key=lambda n: abs(math.log(n / root)), default=1)
