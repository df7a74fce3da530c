"""What every index in this process can do."""

from __future__ import annotations

from typing import Protocol

import numpy.typing as npt

from ..results import Neighbors


class Index(Protocol):
    """A gallery that can be searched by embeddings of its width."""

    @property
    def width(self) -> int:
        """Dim the queries are embedded at."""

    @property
    def encoder_fingerprint(self) -> str | None:
        """Of the model the gallery was embedded with; None if nobody said."""

    def search(self, queries: npt.ArrayLike) -> Neighbors:
        """Return the nearest gallery rows of each query."""
