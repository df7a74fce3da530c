"""What a command prints: lines, JSON, tables whose rows come one by one, progress on a terminal.

All that reaches the terminal goes through here, and a test holds that nothing else prints. File
names, labels, and what a server or a file says are anybody's: a character that does not print is
shown as its escape, so that none of them moves the cursor, sets a title or makes a line of its own.
Errors keep the words they quote as they came; they are escaped here, when they are printed.
"""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any, Self

_CLEAR = "\r\x1b[K"


def print_line(text: str = "") -> None:
    """Print one line."""
    print(printable(text), flush=True)


def print_lines(text: str) -> None:
    """Print a text of several lines of the command's own."""
    for line in text.split("\n"):
        print_line(line)


def print_paragraph(text: str) -> None:
    """Print running text, indented, in lines of at most 100 characters."""
    print_lines(textwrap.fill(text, 100, initial_indent="  ", subsequent_indent="  "))


def print_note(text: str) -> None:
    """Print one line where errors and progress go."""
    print(printable(text), file=sys.stderr, flush=True)


def print_json(**fields: Any) -> None:
    """Print one object as a line in ASCII; NaN and infinity, which JSON has not, are null."""
    print(json.dumps(_finite(fields), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list) else value


# As in keras_mrl_serving.printable: what prints here may need no other room.
def printable(text: str) -> str:
    r"""Return one line that a terminal only shows: characters that do not print are escaped.

    Examples:
        >>> print(printable("birds\n\x1b]0;title\x07 \u202e"))
        birds\n\x1b]0;title\x07 \u202e
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def in_bytes(count: int) -> str:
    """Return a number of bytes for a person.

    Examples:
        >>> in_bytes(999), in_bytes(1_500), in_bytes(20_000_000)
        ('999 bytes', '1.5 kB', '20.0 MB')
    """
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return f"{count / 1000**power:.1f} {unit}"
    return f"{count} bytes"


class Table:
    """Columns of text; rows are printed as they come, the header before the first.

    Args:
        columns: Header to width, negative for columns of numbers, which stand at the right. The
            last column may be longer.
    """

    def __init__(self, columns: dict[str, int]) -> None:
        self._widths = [
            max(abs(width), len(name)) * (1 if width >= 0 else -1)
            for name, width in columns.items()
        ]
        self._header: Sequence[str] | None = list(columns)

    def row(self, *cells: object) -> None:
        """Print a row."""
        if self._header is not None:
            header, self._header = self._header, None
            self.row(*header)
        texts = [printable(str(cell)) for cell in cells]
        aligned = [
            text.ljust(width) if width >= 0 else text.rjust(-width)
            for text, width in zip(texts, self._widths, strict=True)
        ]
        sys.stdout.write("  ".join(aligned).rstrip() + "\n")


def file_width(files: Sequence[str]) -> int:
    """Return how wide a column of these names is."""
    return max(len(printable(file)) for file in files)


class Progress:
    """One line on stderr that shows the rows done; nothing where stderr is no terminal.

    Where the rows done become fewer, another pass over the rows begins, with a speed of its own.

    Args:
        count: Returns all rows; called only where they are shown.
    """

    def __init__(self, count: Callable[[], int]) -> None:
        self._is_shown = sys.stderr.isatty()
        self._total = count() if self._is_shown else 0
        self._start = 0.0
        self._first = 0
        self._last: int | None = None
        self._on_line = False

    def show(self, done: int) -> None:
        """Show how many rows are done."""
        if not self._is_shown:
            return
        # Rows of an earlier run, which this one goes on with, say nothing about its speed.
        if self._last is None or done <= self._last:
            self._first, self._start = done, time.monotonic()
        self._last = done
        rate = (done - self._first) / max(time.monotonic() - self._start, 1e-3)
        line = f"{_CLEAR}{done:,}/{self._total:,} rows, {rate:,.0f} rows/s"
        print(line, end="", file=sys.stderr, flush=True)
        self._on_line = True

    def clear(self) -> None:
        """Empty the line, for whatever is printed next."""
        if self._on_line:
            print(_CLEAR, end="", file=sys.stderr, flush=True)
            self._on_line = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
