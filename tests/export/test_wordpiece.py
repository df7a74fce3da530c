"""WordPiece by operations of TensorFlow alone: the tokens of tensorflow-text."""

import json
import string
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_mrl_export import export_saved_model
from keras_mrl_export.text import TextGraph
from keras_mrl_export.wordpiece import CoreWordPiece, runs_in_core
from keras_mrl_serving._session import SavedModelSession, operations_of
from keras_mrl_serving.text_operations import TEXT_OPERATIONS
from tests.helpers import text_models
from tests.helpers.export_models import read_manifest
from tests.helpers.text_models import column

ODD_FILE = Path(__file__).parents[1] / "data/odd_unicode.json"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LETTERS = [*string.ascii_letters, *string.digits, *string.punctuation, *"éßäøшл中文한日の"]
PIECES = [*LETTERS, *(f"##{letter}" for letter in LETTERS), "the", "##ing", "word", "##words"]


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    else:
        for own in value.values() if isinstance(value, dict) else value:
            yield from strings(own)


def odd_texts() -> list[bytes]:
    own = [*strings(json.loads(ODD_FILE.read_text("utf-8"))), "the words doing " * 9, "qqq " * 40]
    return [*(text.encode() for text in own), b"caf\xc3 \xff", b"a\0b", b"x" * 10_000]


@pytest.mark.parametrize(
    ("lowercase", "accents", "chinese"),
    [(True, True, True), (False, False, False), (False, True, True)],
)
def test_tokens_are_those_of_tensorflow_text(lowercase: bool, accents: bool, chinese: bool) -> None:
    models = text_models.hub().models
    settings = {"lowercase": lowercase, "strip_accents": accents, "split_on_cjk": chinese}
    bert = models.BertTokenizer(SPECIAL + PIECES, **settings)
    kinds = [models.BertTextEmbedderPreprocessor(bert, sequence_length=30)]
    if lowercase:
        other = models.DistilBertTokenizer(SPECIAL + PIECES, **settings)
        kinds.append(models.DistilBertTextClassifierPreprocessor(other, sequence_length=9))
    for own in kinds:
        expected = TextGraph(own).eager(odd_texts())
        made = TextGraph(CoreWordPiece(own)).eager(odd_texts())
        assert {*expected} <= {*made}
        for name, rows in expected.items():
            np.testing.assert_array_equal(made[name], rows)


@pytest.mark.parametrize(
    ("settings", "runs"),
    [
        ({"strip_accents": True}, True),
        ({"strip_accents": False}, False),
        ({"strip_accents": True, "special_tokens_in_strings": True}, False),
    ],
)
def test_only_a_tokenizer_whose_tokens_are_alike_is_replaced(
    settings: dict[str, Any], runs: bool
) -> None:
    assert runs_in_core(text_models.wordpiece(**settings)) is runs


def test_a_version_made_without_tensorflow_text_answers_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, own = text_models.encoder("wordpiece"), text_models.wordpiece(strip_accents=True)
    settings: dict[str, Any] = {"dims": (8,), "signatures": ["embed_8"], "preprocessor": own}
    rows = [*text_models.TEXTS, "Cafe\u0301 \u00fcber", "a\0cat"]
    paths = [export_saved_model(model, tmp_path / "with", rows, **settings)]
    monkeypatch.setitem(sys.modules, "tensorflow_text", None)
    paths.append(export_saved_model(model, tmp_path / "without", rows, **settings))
    assert TEXT_OPERATIONS.keys().isdisjoint(operations_of(paths[1]))
    preprocessor = read_manifest(paths[1]).preprocessor
    assert preprocessor is not None
    assert (preprocessor["operations"], preprocessor["tensorflow_text"]) == ([], None)
    monkeypatch.undo()
    answers = []
    for path in paths:
        with SavedModelSession(path) as session:
            answers.append(session.run("embed_8", {"text": column(rows)})["embedding"])
            assert session.run("embed_8", {"text": column([])})["embedding"].shape == (0, 8)
    np.testing.assert_array_equal(answers[0], answers[1])
