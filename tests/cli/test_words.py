"""Which words of the command line are texts."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from keras_mrl_cli.words import Text, is_texts, place_of, take_texts


def taken(*words: str, text: tuple[str, ...] = ()) -> list[tuple[str, bool]]:
    """The words, and whether each is a text."""
    arguments = SimpleNamespace(files=words, text=text)
    take_texts(arguments)
    return [(str(word), isinstance(word, Text)) for word in arguments.files]


@pytest.mark.parametrize(
    "word", ["how do bees see?", "a\tb", "owls see. at night", "x" * 5000 + " y", "a b\0"]
)
def test_a_word_with_a_blank_is_a_text(word: str) -> None:
    assert taken(word) == [(word, True)]
    assert is_texts(Text(word))


@pytest.mark.parametrize("word", ["owls", "notes.txt", "-", "my photos/1.JPG", "my notes.csv", ""])
def test_a_word_that_may_be_a_file_is_none(word: str) -> None:
    assert taken(word) == [(word, False)]


def test_a_file_with_a_blank_in_its_name_is_none(folder: Path) -> None:
    assert taken("my notes")[0][1]
    (folder / "my notes").write_text("a")
    assert taken("my notes") == [("my notes", False)]


def test_any_word_is_a_text_by_its_flag() -> None:
    assert taken("a.npy", text=("owls", "b.npy", "")) == [
        *(("a.npy", False), ("owls", True), ("b.npy", True), ("", True))
    ]


def test_a_text_is_named_by_itself_and_a_row_by_its_file() -> None:
    assert place_of("a.txt", 3) == {"file": "a.txt", "row": 3}
    assert place_of(Text("a b"), 0) == {"text": "a b"}
    assert type(place_of(Text("a b"), 0)["text"]) is str
