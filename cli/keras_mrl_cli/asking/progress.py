"""How far it is, on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

_CLEAR = "\r\x1b[K"


class Progress:
    """One line on stderr that shows the rows done; nothing where stderr is no terminal.

    Args:
        count: Returns all rows; called only where they are shown.
    """

    def __init__(self, count: Callable[[], int]) -> None:
        self._shown = sys.stderr.isatty()
        self._total = count() if self._shown else 0
        self._start = time.monotonic()
        self._first: int | None = None
        self._on_line = False

    def show(self, done: int) -> None:
        """Say that so many rows are done."""
        if not self._shown:
            return
        if self._first is None:
            self._first = done
        # What was done before this run began says nothing of how fast it is.
        rate = (done - self._first) / max(time.monotonic() - self._start, 1e-3)
        print(
            f"{_CLEAR}{done:,}/{self._total:,} rows, {rate:,.0f} rows/s",
            end="",
            file=sys.stderr,
            flush=True,
        )
        self._on_line = True

    def clear(self) -> None:
        """Leave the line to whatever is printed next."""
        if self._on_line:
            print(_CLEAR, end="", file=sys.stderr, flush=True)
            self._on_line = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.clear()
