"""Words of the command line that are texts, where others name files; and the flags beside them.

No room of the project is imported with this module, so that help is quick and needs nothing
installed.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .shared import Option

STANDARD_INPUT = "-"
LINES = (".txt",)
COLUMNS = (".csv", ".tsv", ".jsonl")


class Text(str):
    """One text that was given as a word of the command line."""

    __slots__ = ()


def take_texts(arguments: SimpleNamespace) -> None:
    """Mark the words that are texts, and add those of `--text`.

    A word is a text if it has a blank, names no file and does not end as a file does.

    Args:
        arguments: Of the command; its `files` are changed.
    """
    words = [Text(word) if _is_sentence(word) else word for word in arguments.files]
    arguments.files = [*words, *map(Text, arguments.text)]
    arguments.text = ()


def _is_sentence(word: str) -> bool:
    from keras_mrl_serving.images import SUFFIXES

    names_a_file = word.lower().endswith((*SUFFIXES, *LINES, *COLUMNS, ".npy", ".npz"))
    return any(c.isspace() for c in word) and not names_a_file and not is_there(word)


def is_there(word: str) -> bool:
    """Whether a word names a file or a folder."""
    try:
        return Path(word).exists()
    except (OSError, ValueError):  # too long for a name, or with a zero byte
        return False


def is_texts(file: str) -> bool:
    """Whether a word is a text, or names a file of texts."""
    suffix = Path(file).suffix.lower()
    return isinstance(file, Text) or file == STANDARD_INPUT or suffix in LINES + COLUMNS


def place_of(file: str, row: int) -> dict[str, Any]:
    """Return where a row stands, as JSON names it: a text by itself, any other by file and row."""
    return {"text": str(file)} if isinstance(file, Text) else {"file": file, "row": row}


def text_options() -> list[Option]:
    """Return the flags that give texts, beside words and files."""
    return [
        Option(
            "--text",
            multiple=True,
            metavar="TEXT",
            help="a text, as words with a blank are; may be given again",
        ),
        Option(
            "--column",
            metavar="NAME",
            help="column of the texts in .csv and .tsv, or their key in .jsonl",
        ),
    ]


def prompt_option(text: str) -> Option:
    """Return the flag that names a prompt of the model."""
    return Option("--prompt", metavar="NAME", help=text)
