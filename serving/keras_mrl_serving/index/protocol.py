"""What every index in this process can do."""

from __future__ import annotations

from typing import Protocol

import numpy.typing as npt

from ..funnel import FunnelSchedule
from ..results import Neighbors


class Index(Protocol):
    """A gallery that can be searched by embeddings of its width."""

    @property
    def schedule(self) -> FunnelSchedule:
        """The funnel that is searched."""

    @property
    def metric(self) -> str:
        """How embeddings are compared: "cosine", "dot" or "l2"."""

    @property
    def encoder_fingerprint(self) -> str | None:
        """Of the model the gallery was embedded with; None if nobody said."""

    @property
    def width(self) -> int:
        """Dim the queries are embedded at."""

    def __len__(self) -> int:
        """Return the number of gallery rows."""

    def search(
        self, queries: npt.ArrayLike, k: int | None = None, among: npt.ArrayLike | None = None
    ) -> Neighbors:
        """Return the nearest gallery rows of each query.

        Args:
            queries: Embeddings `(batch, width)` or wider, raw or scaled.
            k: Neighbours wanted, no more than the funnel returns; None for as many.
            among: The only ids that may be returned, int64 `(n,)`; those that are not in the
                gallery are passed over. None: all.
        """
