"""The texts a user gives: words, lines of a file or of standard input, a column.

Texts stay the bytes that the file has: the model, not this command, says what is no UTF-8.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from keras_mrl_serving import Manifest
from keras_mrl_serving.untrusted import parse_json, read_bytes

from .shared import MISUSED, RefusalError
from .words import COLUMNS, STANDARD_INPUT, Text

_BYTES = 2**31 - 1
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_UTF_8_MARK = b"\xef\xbb\xbf"


def takes_texts(manifest: Manifest) -> bool:
    """Whether a model takes one text a row: strings that it does not decode as images."""
    inputs = [*manifest.inputs.values()]
    return (
        len(inputs) == 1
        and inputs[0]["dtype"] == "string"
        and inputs[0]["shape"] in ([None], [None, 1])
        and manifest.decoder is None
    )


def load_texts(file: str, manifest: Manifest, column: str | None) -> dict[str, npt.NDArray[Any]]:
    """Return texts as the rows of a model.

    Args:
        file: A text, or a file of texts.
        manifest: Of the model that takes them.
        column: The column of a file of columns, and the key of its objects in JSON Lines.

    Raises:
        RefusalError: If the model takes no texts, or the file holds none.
        UntrustedFileError: If the file is too long, or no file.
        OSError: If it does not read.
    """
    if not takes_texts(manifest):
        names_none = ", which names no file," if isinstance(file, Text) else ""
        specs = [f"{name} {spec['dtype']}" for name, spec in manifest.inputs.items()]
        raise RefusalError(
            "Texts can be sent to a model whose one input is of strings, which are no images. "
            f"Received: {file}{names_none} for model {manifest.name!r}, which takes "
            f"{', '.join(specs)}. Name files of rows, or a model of texts."
        )
    texts = [file.encode(errors="surrogateescape")] if isinstance(file, Text) else []
    if not isinstance(file, Text):
        if column is not None and _suffix(file) not in COLUMNS:
            raise RefusalError(
                f"--column is of files of columns: {', '.join(COLUMNS)}. "
                f"Received: {file} with --column {column}. Leave it out: a line is a text.",
                MISUSED,
            )
        texts = [*texts_of(file, column)]
    (name, spec), rows = next(iter(manifest.inputs.items())), np.empty(len(texts), object)
    rows[:] = texts
    return {name: rows.reshape(-1, *spec["shape"][1:])}


def count_texts(file: str) -> int:
    """Return about how many texts there are: the lines, of a file."""
    if isinstance(file, Text):
        return 1
    return len(_lines(file))


def texts_of(file: str, column: str | None = None) -> Iterator[bytes]:
    """Yield the texts of a file: its lines, or those of a column."""
    lines = _lines(file)
    if _suffix(file) == ".jsonl":
        yield from _of_objects(file, lines, column)
    elif _suffix(file) in COLUMNS:
        yield from _of_column(file, lines, column)
    else:
        yield from lines


def _lines(file: str) -> list[bytes]:
    """Return the lines of a file without their ends; the last line need not have one."""
    data = _standard_input() if file == STANDARD_INPUT else read_bytes(file, _BYTES)
    if data.startswith(_UTF_16):
        raise RefusalError(
            "A file of texts is of UTF-8. "
            f"Received: {file}, of UTF-16. Save it anew as UTF-8: iconv -f UTF-16 -t UTF-8."
        )
    lines = data.removeprefix(_UTF_8_MARK).split(b"\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix(b"\r") for line in lines]


_READ: WeakKeyDictionary[TextIO, bytes] = WeakKeyDictionary()


def _standard_input() -> bytes:
    """Return all of standard input, which can be read once."""
    if sys.stdin not in _READ:
        _READ[sys.stdin] = sys.stdin.buffer.read()
    return _READ[sys.stdin]


def _suffix(file: str) -> str:
    return Path(file).suffix.lower()


def _of_objects(file: str, lines: Sequence[bytes], key: str | None) -> Iterator[bytes]:
    for number, line in enumerate(lines, 1):
        try:
            value = parse_json(line)
        except ValueError as error:
            remedy = "Write an object or a text a line"
            raise _unfit(f"{file}, line {number} ({error})", remedy) from error
        if key is not None and isinstance(value, dict):
            value = value.get(key)
        if not isinstance(value, str):
            of_key = "which is no text" if key is None else f"which has no text {key!r}"
            keys = f": {', '.join(map(repr, value))}" if isinstance(value, dict) else ""
            raise _unfit(f"{file}, line {number}, {of_key}", f"Name a key with --column{keys}")
        yield value.encode()


def _of_column(file: str, lines: Sequence[bytes], column: str | None) -> Iterator[bytes]:
    text = "\n".join(line.decode(errors="surrogateescape") for line in lines)
    is_quoted = _suffix(file) == ".csv"
    rows = csv.reader(
        io.StringIO(text, newline=""),
        delimiter="," if is_quoted else "\t",
        quoting=csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE,
        strict=True,
    )
    csv.field_size_limit(_BYTES)
    try:
        names = next(rows, [])
        if column not in names:
            given = "no --column" if column is None else f"--column {column}"
            raise _unfit(f"{file} with {given}", f"Choose one of {', '.join(names) or 'none'}")
        place = names.index(column)
        for row in rows:
            if len(row) <= place:
                if not row:  # an empty line, such as the last
                    continue
                raise _unfit(f"{file}, line {rows.line_num}, without {column}", "Mend the line")
            yield row[place].encode(errors="surrogateescape")
    except csv.Error as error:
        raise _unfit(f"{file}, line {rows.line_num} ({error})", "Mend the line") from error


def _unfit(received: str, remedy: str) -> RefusalError:
    return RefusalError(
        "A file of columns has a header (.csv, .tsv) or an object a line (.jsonl), and --column "
        f"names the texts. Received: {received}. {remedy}."
    )
