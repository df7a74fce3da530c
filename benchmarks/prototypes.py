"""Class-prototype data: a class is a point, a row is one of them with noise, the head is known.

Each block of coordinates between two dims has the same length for all classes, so that the best
head at every prefix is the prototypes themselves, without a bias: a tied head. Its probabilities
are the true ones, and how many dims a row needs differs from row to row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving.cascade.policy import CascadePolicy, CascadeReport
from keras_mrl_serving.cascade.search import search_cascades

DIMS = (8, 16, 32, 64, 128, 256, 512)
# Squared length of each block, in units of the noise: wide blocks add less per coordinate.
ENERGY = (36.0, 12.0, 14.0, 16.0, 14.0, 12.0, 12.0)  # for 100,000 classes; fewer need less
_OTHERS = 100  # enough that none is likelier than a class with a probability of 0.1
_AT_ONCE = 500  # rows, of as many logits as there are classes

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Prototypes:
    """The classes, `(classes, width)` float32."""

    points: Array

    @classmethod
    def of(cls, classes: int, seed: int = 0) -> Prototypes:
        """Draw them."""
        rng = np.random.default_rng(seed)
        share = np.log(classes) / np.log(100_000)
        points = rng.normal(size=(classes, DIMS[-1])).astype(np.float32)
        for start, stop, energy in zip((0, *DIMS), DIMS, ENERGY, strict=False):
            block = points[:, start:stop]
            block *= np.sqrt(energy * share) / np.linalg.norm(block, axis=1, keepdims=True)
        return cls(points)

    def rows(self, count: int, seed: int) -> tuple[Array, Array]:
        """Draw rows, `(count, width)`, and their classes."""
        rng = np.random.default_rng((seed, 1))
        labels = rng.integers(0, len(self.points), count)
        noise = rng.normal(size=(count, DIMS[-1])).astype(np.float32)
        return self.points[labels] + noise, labels

    def policy(self, rows: int, seed: int) -> CascadePolicy:
        """Search a cascade as accurate as the full dim on fresh rows, from the dim on that pays.

        Every stage is a pass over all classes, so of the cascades that start at each dim the one
        is taken that asks the fewest dims a row, added up.
        """
        logits, labels = self._scores(*self.rows(rows, seed))
        found = [
            search_cascades(logits[:, start:], labels, DIMS[start:]).cheapest_within(0.0)
            for start in range(len(DIMS))
        ]
        return min(found, key=lambda policy: policy.holdout.cumulative_dim)  # type: ignore[union-attr]

    def report(self, policy: CascadePolicy, rows: int, seed: int) -> CascadeReport:
        """Judge a cascade on other rows."""
        logits, labels = self._scores(*self.rows(rows, seed))
        return policy.evaluate(logits[:, [DIMS.index(dim) for dim in policy.dims]], labels)

    def _scores(self, rows: Array, labels: Array) -> tuple[Array, Array]:
        """Logits of a smaller problem that is the same to a cascade.

        A cascade looks at the largest probability and at whether its class is right. So the right
        class is 0, the likeliest is 0 or 1, and a hundred others share what is left.
        """
        parts = [
            self._compressed(rows[i : i + _AT_ONCE], labels[i : i + _AT_ONCE])
            for i in range(0, len(rows), _AT_ONCE)
        ]
        return np.concatenate(parts), np.zeros(len(rows), np.int64)

    def _compressed(self, rows: Array, labels: Array) -> Array:
        sums = np.zeros((len(rows), len(self.points)), np.float32)
        logits = np.zeros((len(rows), len(DIMS), 2 + _OTHERS), np.float32)
        for at, (start, stop) in enumerate(zip((0, *DIMS), DIMS, strict=False)):
            sums += rows[:, start:stop] @ self.points[:, start:stop].T
            share = 1 / np.exp(sums - sums.max(axis=1, keepdims=True)).sum(axis=1)
            right = sums.argmax(axis=1) == labels
            logits[:, at] = np.log(np.maximum((1 - share) / (1 + _OTHERS), 1e-30))[:, None]
            logits[np.arange(len(rows)), at, np.where(right, 0, 1)] = np.log(share)
        return logits
