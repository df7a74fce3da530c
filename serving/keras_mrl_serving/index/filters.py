"""Filters: the rows of one index that its searches may return, prepared once."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .ids import Ids


class Filter:
    """Rows of one index that a search may return; made by its `prepare_filter`.

    Args:
        index: The index.
        rows: Numbers of the rows, int64 `(n,)`, increasing.

    Examples:
        >>> from keras_mrl_serving import ExactIndex, FunnelSchedule
        >>> index = ExactIndex.build(np.eye(4), FunnelSchedule((4,), (), 1))
        >>> only = index.prepare_filter([2, 3])
        >>> len(only), index.search(np.eye(4)[:2], filter=only).ids.tolist()
        (2, [[2], [2]])
    """

    def __init__(self, index: Any, rows: Ids) -> None:
        self.rows = rows
        self.num_rows = len(index)
        self.prepared: dict[Any, Any] = {}  # what an engine has made of it
        self._index = weakref.ref(index)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Filter({len(self)} of {self.num_rows} rows)"

    @property
    def share(self) -> float:
        """Share of the rows that may be returned."""
        return len(self.rows) / self.num_rows

    @cached_property
    def mask(self) -> npt.NDArray[np.bool_]:
        """Which rows may be returned, `(rows,)`."""
        mask = np.zeros(self.num_rows, bool)
        mask[self.rows] = True
        return mask

    def check(self, index: object) -> None:
        """Raise `ValueError` unless this index has made the filter."""
        if self._index() is not index:
            raise ValueError(
                "A filter is for the index that prepared it. "
                f"Received: {self!r} of another index. Prepare it anew: index.prepare_filter(...)."
            )


def as_filters(index: Any, filter: Any, queries: int) -> Filter | Sequence[Filter] | None:
    """Return the filter of a search, or one per query, once they are checked.

    Args:
        index: The index that is searched.
        filter: What the caller gave.
        queries: Number of queries.

    Raises:
        ValueError: If they are not one per query, or another index has made one.
        TypeError: If they are no filters.

    Examples:
        >>> as_filters(None, None, 3)
    """
    if filter is None:
        return None
    given = filter if isinstance(filter, list | tuple) else [filter]
    for some in given:
        if not isinstance(some, Filter):
            raise no_filter(some)
        some.check(index)
    if not isinstance(filter, list | tuple):
        return given[0]
    if len(given) != queries:
        raise ValueError(
            "A list of filters has one per query. "
            f"Received: {len(given)} filters for {queries} queries. Give one for all."
        )
    return given


def no_filter(received: object) -> TypeError:
    """Return the error for what is no filter.

    Examples:
        >>> "Received: ndarray" in str(no_filter(np.arange(3)))
        True
    """
    return TypeError(
        "filter must be a prepared one, or a list with one per query. "
        f"Received: {type(received).__name__}. Give index.prepare_filter(ids)."
    )
