"""Tokenizers of keras-hub in the served graph: texts in, the answers of the model out."""

import re
import subprocess
import sys
from inspect import isfunction as is_function
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_mrl import MatryoshkaClassifier, MatryoshkaEncoder, MatryoshkaHead, TextEncoder
from keras_mrl.text import tokenize
from keras_mrl_export import ExportError, ImageDecoder, export_saved_model
from keras_mrl_export.build import fingerprint_of
from keras_mrl_export.text import read_texts
from keras_mrl_serving import EncoderMismatchError, truncate
from keras_mrl_serving._session import SavedModelSession, operations_of
from keras_mrl_serving.cascade.policy import CascadePolicy
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex
from keras_mrl_serving.text_operations import TEXT_OPERATIONS
from tests.helpers import exit_models, small_bert
from tests.helpers import text_models as texts
from tests.helpers.export_models import (
    NAMES,
    Array,
    assert_equal_rows,
    outputs,
    read_manifest,
    warmup_records,
    with_fixed_weights,
)
from tests.helpers.text_models import KINDS, LENGTH, TEXTS, column

DIMS = (4, 8)
# Texts of every kind that a client may send, in UTF-8.
ODD = (
    "",
    " \t\n ",
    "x" * 10_000,
    "a cat " * 2_000,
    "a\0cat and \0",
    "\N{GRINNING FACE} cat \N{PARTY POPPER}",
    "\u05e9\u05dc\u05d5\u05dd cat",
    "\ufeffcat",
    "\ufb01ne \uff23\uff21\uff34",
    "cafe\u0301 caf\u00e9",
)


def tokens(preprocessor: Any, rows: Any) -> dict[str, Array]:
    """What a preprocessor gives for some texts as `tf.data` has it, outside of any export."""
    rows = [row.replace("\0", " ") for row in rows]
    dataset = tf.data.Dataset.from_tensor_slices(rows).batch(len(rows)).map(preprocessor)
    return {name: own.numpy() for name, own in next(iter(dataset)).items()}


def features(model: keras.Model, preprocessor: Any, rows: Any) -> Array:
    own = tokens(preprocessor, rows)
    return outputs(model, {name: own[name] for name in model.input})


@pytest.mark.backend
@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_served_as_the_model_embeds_their_tokens(kind: str, tmp_path: Path) -> None:
    model, preprocessor = texts.encoder(kind), texts.preprocessor(kind)
    path = export_saved_model(
        model,
        tmp_path,
        list(TEXTS),
        preprocessor=preprocessor,
        dims=DIMS,
        signatures=["embed_8"],
        prompts={"query": "the "},
        warmup_batch_sizes=(1, 3),
    )
    manifest = read_manifest(path)
    assert manifest.inputs == {"text": {"dtype": "string", "shape": [None]}}
    own: Any = manifest.preprocessor
    operations = own.pop("operations")
    assert own == {
        "kind": "text",
        "tokenizer": kind,
        "vocabulary_size": preprocessor.tokenizer.vocabulary_size(),
        "sequence_length": LENGTH,
        "lowercase": True if kind == "wordpiece" else None,
        "pooling": None,
        "prompts": {"query": "the "},
        "tensorflow_text": ".".join(tf.__version__.split(".")[:2]),
    }
    assert "TFText>RoundRobinTrim" in operations
    assert {*operations} <= {*TEXT_OPERATIONS}
    # The cache of keras-hub would grow by every new word that a server is asked.
    assert not [name for name in operations_of(path) if "Mutable" in name or "Insert" in name]
    rows = [*ODD, *TEXTS]
    expected = truncate(features(model, preprocessor, rows), 8)
    with SavedModelSession(path) as session:
        served = session.run("embed_8", {"text": column(rows)})["embedding"]
        assert_equal_rows(served, expected)
        one_by_one = [
            session.run("embed_8", {"text": column([row])})["embedding"][0] for row in rows[-3:]
        ]
        assert_equal_rows(np.stack(one_by_one), expected[-3:])
        assert session.run("embed_8", {"text": column([])})["embedding"].shape == (0, 8)
    for name, inputs in warmup_records(path):
        if name != "describe":
            assert inputs["text"].tolist() == column(TEXTS)[: len(inputs["text"])].tolist()


def test_bytes_that_are_no_utf8_are_read_as_replacement_characters(tmp_path: Path) -> None:
    """A client's own mistake fails no other's text in a batch."""
    path = export(tmp_path)
    with SavedModelSession(path) as session:
        served, expected = (
            session.run("embed_8", {"text": column(["a cat", text])})["embedding"]
            for text in (b"caf\xc3 \xff", "caf\ufffd \ufffd")
        )
    np.testing.assert_array_equal(served, expected)


def export(folder: Path, model: Any = None, preprocessor: Any = None, **arguments: Any) -> Path:
    arguments = {"signatures": ["embed_8"], "dims": DIMS, **arguments}
    return export_saved_model(
        texts.encoder("wordpiece") if model is None else model,
        folder,
        list(TEXTS),
        preprocessor=texts.wordpiece() if preprocessor is None else preprocessor,
        **arguments,
    )


def test_a_classifier_of_texts_has_every_signature(tmp_path: Path) -> None:
    """A cascade, class names and a gallery: in one call from texts to neighbours."""
    backbone, preprocessor = texts.encoder("wordpiece"), texts.wordpiece()
    model = MatryoshkaClassifier(backbone, MatryoshkaHead(len(NAMES), DIMS))
    rows = [*TEXTS, "a dog", "the mat", "on", "ran ran"]
    taken = tokens(preprocessor, rows)
    gallery = outputs(backbone, taken)
    labels = np.arange(len(rows)) % len(NAMES)
    policy = CascadePolicy.learn(outputs(model, taken), labels, DIMS)
    path = export(
        tmp_path,
        model,
        preprocessor,
        policy=policy,
        labels=NAMES,
        index=ExactIndex.build(gallery, FunnelSchedule(DIMS, (6,), 2)),
        activation="softmax",
        signatures=None,
    )
    with SavedModelSession(path) as session:
        found = session.run("retrieve", {"text": column(rows)})["ids"]
        stored = session.run("search", {"embedding": gallery})["ids"]
        np.testing.assert_array_equal(found, stored)
        answer = session.run("classify_adaptive", {"text": column(rows)})
        assert len(answer["labels"]) == len(rows)
        assert {*answer["dim"].tolist()} <= {*DIMS}


@pytest.mark.backend
def test_a_cascade_over_exits_routes_texts_as_their_tokens(tmp_path: Path) -> None:
    tower = TextEncoder(small_bert.bert(), small_bert.preprocessor())
    head, exits = MatryoshkaHead(3, exit_models.DIMS), ("transformer_layer_0",)
    model = MatryoshkaClassifier(tower, head, exits=exits)
    with_fixed_weights(model, exit_models.TEXTS)
    rows = ["pay the bill", "call mum", "the bill at noon", "mum", "", "a b", "e", "pay \0 pay"]
    logits = exit_models.all_logits(model, tokenize(model.preprocessor, rows))
    policy = exit_models.halving(logits, [(exits[0], 2), (exits[0], 8), (None, 8)])
    path = export_saved_model(model, tmp_path, rows, policy=policy, activation="softmax")
    classes, stages = policy.route(logits)
    assert len({*stages.tolist()}) == 3
    with SavedModelSession(path) as session:
        answer = session.run("classify_adaptive", {"text": column(rows)})
    np.testing.assert_array_equal(answer["class_ids"][:, 0], classes)
    np.testing.assert_array_equal(answer["dim"], np.array([2, 8, 8])[stages])
    np.testing.assert_array_equal(answer["exit"], np.array([0, 0, 1])[stages])


def test_two_towers_may_take_texts(tmp_path: Path) -> None:
    queries, passages = texts.encoder("wordpiece"), texts.encoder("wordpiece")
    long = texts.wordpiece(6)
    model = MatryoshkaEncoder(queries, passages)
    arguments: dict[str, Any] = {"signatures": None, "dims": (8,), "identity": False}
    path = export(tmp_path, model, other_sample=list(TEXTS), other_preprocessor=long, **arguments)
    manifest = read_manifest(path)
    other: Any = manifest.other_tower
    assert other["inputs"] == manifest.inputs
    assert other["preprocessor"]["sequence_length"] == 6
    expected = truncate(features(passages, long, TEXTS), 8)
    with SavedModelSession(path) as session:
        served = session.run("embed_other_8", {"text": column(TEXTS)})["embedding"]
    assert_equal_rows(served, expected)


@pytest.mark.parametrize("towers", [1, 2])
@pytest.mark.parametrize("prompt", [None, "doc: "])
def test_a_gallery_without_the_prompt_of_the_model_is_refused(
    prompt: str | None, towers: int, tmp_path: Path
) -> None:
    own = [texts.encoder("wordpiece") for _ in range(towers)]
    index = ExactIndex.build(np.eye(8), FunnelSchedule(DIMS, (6,), 2), prompt=prompt)
    arguments: dict[str, Any] = {"prompts": {"passage": "the "}, "index": index, "signatures": None}
    if towers == 2:
        arguments |= {"other_sample": list(TEXTS), "other_preprocessor": texts.wordpiece()}
    model = MatryoshkaEncoder(*own)
    received = "none" if prompt is None else "'doc: '"
    with pytest.raises(
        EncoderMismatchError, match=f"Received: an index whose gallery had {received}"
    ):
        export(tmp_path, model, **arguments)
    assert not any(tmp_path.iterdir())


def test_a_fingerprint_is_of_all_by_which_tokens_are_made(tmp_path: Path) -> None:
    model = texts.encoder("wordpiece")
    file = tmp_path / "model.keras"
    model.save(file)

    def fingerprint(own: Any, pooling: str = "mean", **prompts: str) -> str:
        text = read_texts(own, column(TEXTS), model.input, prompts, pooling)
        return fingerprint_of(model, file, {}, None, True, None, [text])

    other_word = texts.wordpiece()
    other_word.tokenizer.set_vocabulary(
        [word.replace("mat", "tom") for word in other_word.tokenizer.vocabulary]
    )
    prints = [
        fingerprint(texts.wordpiece()),
        fingerprint(texts.wordpiece(10)),
        fingerprint(texts.wordpiece(strip_accents=True)),
        fingerprint(other_word),
        fingerprint(texts.wordpiece(), query="the "),
        fingerprint(texts.wordpiece(), pooling="first"),
    ]
    assert len({*prints}) == len(prints)
    assert fingerprint(texts.wordpiece()) == prints[0]


# What is refused


def refusal(kind: type[Exception], folder: Path, **arguments: Any) -> str:
    given = {"sample": list(TEXTS), "preprocessor": texts.wordpiece(), **arguments}
    with pytest.raises(kind) as caught:
        export_saved_model(texts.encoder("wordpiece"), folder, dims=DIMS, **given)
    assert [*folder.iterdir()] == []
    return str(caught.value)


GIVE = "Give for example preprocessor=keras_hub.models.BertTextEmbedderPreprocessor(tokenizer)."
MUST = (
    "preprocessor must be a preprocessor of keras-hub, or a tokenizer of it with a "
    "sequence_length: WordPiece, byte-pair or SentencePiece. Received: "
)


def without_length() -> Any:
    return texts.wordpiece().tokenizer


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        ({"preprocessor": str.split}, TypeError, f"{MUST}method_descriptor. {GIVE}"),
        (
            {"preprocessor": without_length},
            TypeError,
            f"{MUST}BertTokenizer, which gives as many tokens as a text has. {GIVE}",
        ),
        (
            {"preprocessor": None, "prompts": {"query": "q: "}},
            ValueError,
            "prompts stand before texts, which a preprocessor makes tokens of. Received: "
            "prompts={'query': 'q: '} for a version that takes no texts. Give the preprocessor "
            "too, and a few texts as sample; or leave prompts out.",
        ),
        (
            {"prompts": ["query: "]},
            TypeError,
            "prompts must be texts by name. Received: prompts=['query: ']. Give for example "
            "{'query': 'query: ', 'passage': 'passage: '}, or leave it out.",
        ),
        (
            {"decoder": ImageDecoder(height=2, width=2)},
            ValueError,
            "A version takes texts or images. Received: a preprocessor and a decoder. Leave one "
            "of them out.",
        ),
        (
            {"sample": np.zeros((2, LENGTH), "int32")},
            ValueError,
            "A sample for a model with a preprocessor is a list of texts, str or bytes. Received: "
            "a ndarray. Give a few real ones: ['a first text', 'a second one']; or for token ids "
            "export without a preprocessor.",
        ),
        (
            {"sample": ["a", 5]},
            ValueError,
            "Texts must be strings. Received: a int in row 1. Leave the row out, or write ''.",
        ),
        (
            {"sample": ["a", "b \ud800"]},
            ValueError,
            "Texts must be UTF-8. Received: in row 1, 'utf-8' codec can't encode character "
            "'\\ud800' in position 2: surrogates not allowed. Repair it where it was read, for "
            "example by bytes.decode(errors='replace') or text.encode(errors='replace').decode().",
        ),
        (
            {"prompts": {"query": "q \ud800"}},
            ValueError,
            "Texts must be UTF-8. Received: in row 0, 'utf-8' codec can't encode character "
            "'\\ud800' in position 2: surrogates not allowed. Repair it where it was read, for "
            "example by bytes.decode(errors='replace') or text.encode(errors='replace').decode().",
        ),
        (
            {"prompts": {"query": "the ", "passage": "a cat " * 9}},
            ValueError,
            "A prompt must leave room for a text. Received: prompts['passage'], which fills all 12 "
            "tokens of a text. Shorten it, or give a preprocessor with a longer sequence_length.",
        ),
        (
            {"preprocessor": texts.bytepair},
            ValueError,
            "A preprocessor must give every input of the model. Received: a "
            "RobertaTextClassifierPreprocessor, which gives padding_mask, token_ids, for a model "
            "with padding_mask, segment_ids, token_ids. Give the preprocessor that the model was "
            "trained with.",
        ),
        (
            {"other_preprocessor": texts.wordpiece},
            ValueError,
            "other_preprocessor is of the other tower of a model of two. Received: "
            "other_preprocessor for Functional 'of_wordpiece', which has one. Leave it out, or "
            "export a MatryoshkaEncoder(tower, other_tower).",
        ),
    ],
)
def test_what_cannot_be_served_is_refused(
    arguments: dict[str, Any], kind: type[Exception], sentence: str, tmp_path: Path
) -> None:
    given = {name: own() if is_function(own) else own for name, own in arguments.items()}
    assert refusal(kind, tmp_path, **given) == sentence


def test_a_preprocessor_of_more_tokens_than_the_backbone_is_refused(tmp_path: Path) -> None:
    tower = TextEncoder(small_bert.bert())
    own = small_bert.preprocessor(words=[*small_bert.WORDS, *"cdfghijk"])
    sentence = (
        "A preprocessor must have the vocabulary that the backbone was trained with. Received: a "
        "tokenizer of 23 tokens for a BertBackbone of 20. Load both from one preset."
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        export_saved_model(tower, tmp_path, list(TEXTS), preprocessor=own, dims=DIMS)


def test_a_preprocessor_that_gives_labels_is_refused(tmp_path: Path) -> None:
    own = texts.hub().models.BertMaskedLMPreprocessor(
        texts.wordpiece().tokenizer, sequence_length=LENGTH
    )
    assert refusal(ValueError, tmp_path, preprocessor=own) == (
        "A preprocessor must give the inputs of a model alone. Received: a "
        "BertMaskedLMPreprocessor, which also gives labels, as for training. Give the one for "
        "embeddings or classes, or its tokenizer with a sequence_length."
    )


def test_a_tokenizer_that_does_not_travel_whole_is_refused(tmp_path: Path) -> None:
    """keras-hub leaves this setting out of the configuration."""
    own = texts.wordpiece(split_on_cjk=False)
    sample = ["a cat", "cat\u4e2dcat"]
    sentence = refusal(ExportError, tmp_path, preprocessor=own, sample=sample)
    assert re.fullmatch(
        r"The served tokenizer must give the tokens of the trained model's\. Received: other "
        r"token_ids for 1 of 2 texts, first b'cat.*': \[.*\] for \[.*\]\. Look for settings of the "
        r"tokenizer that its get_config\(\) leaves out\.",
        sentence,
    )


# Where tensorflow-text is missing


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("texts"))


def without_tensorflow_text(code: str) -> str:
    """What a process prints that has TensorFlow alone."""
    script = f"import sys\nsys.modules['tensorflow_text'] = None\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


MISSING = (
    r"A graph that makes tokens of texts runs where tensorflow-text is installed, of the version "
    r"of TensorFlow\. Received: import of tensorflow_text halted; None in sys\.modules "
    r"beside TensorFlow 2\.\d+\.\d+\. Install it: pip install 'keras-mrl\[text\]' "
    r"'tensorflow-text==2\.\d+\.\*'\."
)


def test_a_server_without_tensorflow_text_says_what_it_lacks(version: Path) -> None:
    said = without_tensorflow_text(
        f"""
from keras_mrl_serving.server.loading import LoadOptions, load
from keras_mrl_serving.server.status import StatusError
try:
    load({str(version)!r}, LoadOptions())
except StatusError as error:
    print(error.code.name, error.message)
"""
    )
    assert re.fullmatch(f"FAILED_PRECONDITION {MISSING}", said)


def test_a_server_imports_tensorflow_text_where_a_graph_needs_it(version: Path) -> None:
    script = f"""
import sys
import numpy as np
from keras_mrl_serving._session import SavedModelSession
assert "tensorflow_text" not in sys.modules
with SavedModelSession({str(version)!r}) as session:
    text = np.array([b"a cat"], dtype=object)
    print(session.run("embed_8", {{"text": text}})["embedding"].shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "(1, 8)"


def test_an_export_without_tensorflow_text_says_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow_text", None)
    assert re.fullmatch(MISSING, refusal(ImportError, tmp_path))
