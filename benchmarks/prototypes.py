"""Class-prototype data: a class is a point, a row is one of them with noise, the head is known.

Each block of coordinates between two dims has the same length for all classes, so that the best
head at every prefix is the prototypes themselves, without a bias: a tied head. Rows differ in how
noisy they are, so that some can be told at few dims and some at none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving.cascade import CascadePolicy, CascadeReport

DIMS = (8, 16, 32, 64, 128, 256, 512)
# Squared length of each block, in units of the noise: wide blocks add less per coordinate.
ENERGY = (30.0, 25.0, 25.0, 20.0, 20.0, 15.0, 15.0)
SPREAD = 0.45  # of the logarithm of a row's own noise
_OTHERS = 2000  # enough that none of them is likelier than a class with a probability of 0.1

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Prototypes:
    """The classes, `(classes, width)` float32."""

    points: Array

    @classmethod
    def of(cls, classes: int, seed: int = 0) -> Prototypes:
        """Draw them."""
        rng = np.random.default_rng(seed)
        points = rng.normal(size=(classes, DIMS[-1])).astype(np.float32)
        for start, stop, energy in zip((0, *DIMS), DIMS, ENERGY, strict=False):
            block = points[:, start:stop]
            block *= np.sqrt(energy) / np.linalg.norm(block, axis=1, keepdims=True)
        return cls(points)

    def rows(self, count: int, seed: int) -> tuple[Array, Array]:
        """Draw rows, `(count, width)`, and their classes."""
        rng = np.random.default_rng((seed, 1))
        labels = rng.integers(0, len(self.points), count)
        noise = rng.normal(size=(count, DIMS[-1])).astype(np.float32)
        own = np.exp(SPREAD * rng.normal(size=(count, 1))).astype(np.float32)
        return self.points[labels] + own * noise, labels

    def policy(self, rows: int, seed: int) -> CascadePolicy:
        """Learn a cascade on fresh rows, by the paper's procedure."""
        logits, labels = self._scores(*self.rows(rows, seed))
        return CascadePolicy.learn(logits, labels, DIMS)

    def report(self, policy: CascadePolicy, rows: int, seed: int) -> CascadeReport:
        """Judge a cascade on other rows."""
        return policy.evaluate(*self._scores(*self.rows(rows, seed)))

    def _scores(self, rows: Array, labels: Array) -> tuple[Array, Array]:
        """Logits of a smaller problem that is the same to a cascade.

        A cascade looks at the largest probability and at whether its class is right. So the right
        class is 0, the likeliest is 0 or 1, and 2,000 others share what is left.
        """
        sums = np.zeros((len(rows), len(self.points)), np.float32)
        logits = np.zeros((len(rows), len(DIMS), 2 + _OTHERS), np.float32)
        for at, (start, stop) in enumerate(zip((0, *DIMS), DIMS, strict=False)):
            sums += rows[:, start:stop] @ self.points[:, start:stop].T
            largest = sums.max(axis=1, keepdims=True)
            share = 1 / np.exp(sums - largest).sum(axis=1)
            right = sums.argmax(axis=1) == labels
            logits[:, at] = np.log(np.maximum((1 - share) / (1 + _OTHERS), 1e-30))[:, None]
            logits[np.arange(len(rows)), at, np.where(right, 0, 1)] = np.log(share)
        return logits, np.zeros(len(rows), np.int64)
