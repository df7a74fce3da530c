"""Rows on stdout: JSON lines, or a table whose columns are known before the first answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from math import isfinite
from typing import Any


def print_json(**fields: Any) -> None:
    """Print one object as a line; numbers that JSON has not are null."""
    print(json.dumps(_finite(fields), allow_nan=False))


def printable(text: str) -> str:
    """Return text that cannot break a table: what is not printable is escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class Table:
    """Columns of text; rows are printed as they come.

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
        """Print a row, and the header before the first."""
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


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list) else value
