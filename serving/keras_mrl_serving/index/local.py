"""What an index over a gallery in this process shares with the others."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

from ..results import Neighbors
from .arrays import Ids, Vectors, check_among, check_embeddings
from .facts import Described, IndexFacts


class LocalIndex(Described, ABC):
    """A gallery in this process, immutable once it is built.

    Args:
        facts: Schedule, metric and encoder.
        ids: Of the gallery rows, int64 `(rows,)`, all different.

    Examples:
        >>> from keras_mrl_serving.index import ExactIndex
        >>> issubclass(ExactIndex, LocalIndex)
        True
    """

    def __init__(self, facts: IndexFacts, ids: Ids) -> None:
        self.facts = facts
        self.ids = ids
        self._by_id: Ids | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        dims = " -> ".join(map(str, self.schedule.dims))
        return (
            f"{type(self).__name__}({len(self)} rows, {dims}, k={self.schedule.k}, {self.metric})"
        )

    def search(
        self, queries: npt.ArrayLike, k: int | None = None, among: npt.ArrayLike | None = None
    ) -> Neighbors:
        """Return the nearest gallery rows of each query, best first, ties in order of id.

        Args:
            queries: Embeddings `(batch, width)` or wider, raw or scaled.
            k: Neighbours wanted, no more than the funnel returns; None for as many.
            among: The only ids that may be returned, int64 `(n,)`; those that are not in the
                gallery are passed over, and fewer than `k` give fewer columns. None: all.

        Raises:
            ValueError: If queries, k or ids do not fit, or a value is not finite.
        """
        vectors = check_embeddings(queries, "queries", self.width)
        keep = self.facts.check_k(k)
        rows = None if among is None else self._rows_of(check_among(among))
        keep = min(keep, len(self) if rows is None else len(rows))
        if not len(vectors) or not keep:
            empty = np.empty((len(vectors), keep))
            return Neighbors(empty.astype(np.int64), empty.astype(np.float32))
        return self._nearest(vectors, keep, rows)

    @abstractmethod
    def _nearest(self, queries: Vectors, k: int, rows: Ids | None) -> Neighbors:
        """Return the `k` nearest of the gallery, or of some of its rows (at least `k`)."""

    def _rows_of(self, ids: Ids) -> Ids:
        """Return the gallery rows that have these sorted ids, in the gallery's order."""
        if self._by_id is None:
            self._by_id = np.argsort(self.ids)
        place = np.searchsorted(self.ids, ids, sorter=self._by_id)
        rows = self._by_id[np.minimum(place, len(self) - 1)]
        return np.sort(rows[self.ids[rows] == ids])
