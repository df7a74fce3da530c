"""Strings in `fit`, `evaluate` and `predict`: the same as their tokens, in every form of data."""

import functools
import gc
import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import (
    ContrastiveLoss,
    CorpusRecall,
    MatryoshkaClassifier,
    MatryoshkaEncoder,
    MatryoshkaHead,
    NeighborMetrics,
    TextEncoder,
    cut,
    split,
)
from keras_mrl.evaluation import evaluate, evaluate_retrieval, evaluate_similarity
from keras_mrl.text import pooling_of, preprocessor_of, tokenize
from tests.helpers import text_models
from tests.helpers.laws import exactly
from tests.helpers.small_bert import WORDS, bert
from tests.helpers.small_bert import preprocessor as new_preprocessor
from tests.helpers.vision_backbones import imported

backend = pytest.mark.backend

ANCHORS = ["pay the bill", "call mum", "the bill at noon", "mum", "pay a", "call b"]
POSITIVES = ["the bill pay", "mum call", "noon bill", "the mum", "a pay pay", "b"]
IDS = np.arange(6)
LABELS = np.array([0, 1, 0, 1, 0, 1])


@functools.cache
def preprocessor() -> Any:
    return new_preprocessor()


def encoder(tower: Any = None, **arguments: Any) -> MatryoshkaEncoder:
    keras.utils.set_random_seed(1)
    tower = TextEncoder(bert(), preprocessor()) if tower is None else tower()
    model = MatryoshkaEncoder(tower, **arguments)
    # What is compiled takes longer than what is trained; the doctests and the examples compile.
    model.compile(keras.optimizers.SGD(0.1), ContrastiveLoss(dims=(4, 8)), run_eagerly=True)
    return model


def classifier(**arguments: Any) -> MatryoshkaClassifier:
    keras.utils.set_random_seed(1)
    tower = TextEncoder(bert(), preprocessor())
    model = MatryoshkaClassifier(tower, MatryoshkaHead(2, dims=(4, 8)), **arguments)
    crossentropy = "sparse_categorical_crossentropy"
    model.compile("sgd", crossentropy, metrics=["accuracy"], run_eagerly=True)
    return model


def tokens(texts: Any) -> Any:
    return tokenize(preprocessor(), texts)


def log_of(x: Any, y: Any = None, **arguments: Any) -> dict[str, float]:
    arguments = {"batch_size": 6, "shuffle": False, "verbose": 0, **arguments}
    history = encoder().fit(x, y, **arguments).history
    return {name: values[0] for name, values in history.items()}


class Batches(keras.utils.PyDataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        del index
        return (ANCHORS, POSITIVES), IDS


def generated() -> Iterator[Any]:
    yield ANCHORS, POSITIVES


def of_tensorflow() -> Any:
    tensorflow = imported("tensorflow")
    imported("tensorflow_text")
    return tensorflow.data.Dataset.from_tensors(((ANCHORS, POSITIVES), IDS))


@backend
def test_strings_train_as_their_tokens_do_in_every_form_of_data() -> None:
    expected = log_of((tokens(ANCHORS), tokens(POSITIVES)))
    forms: dict[str, tuple[Any, ...]] = {
        "lists": ((ANCHORS, POSITIVES),),
        "arrays": ((np.array(ANCHORS), np.array(POSITIVES, object)),),
        "bytes": (([text.encode() for text in ANCHORS], POSITIVES),),
        "positives as labels": (ANCHORS, POSITIVES),
        "dict": ({"anchor": ANCHORS, "positive": POSITIVES},),
        "generator": (generated(),),
        "PyDataset": (Batches(),),
        "tf.data": (of_tensorflow(),),
    }
    for name, data in forms.items():
        history = log_of(*data, **({"steps_per_epoch": 1} if name == "generator" else {}))
        assert history == pytest.approx(expected, rel=1e-4), name


@backend
def test_hard_negatives_and_validation_are_texts_too() -> None:
    negatives = np.array([[text, "e"] for text in reversed(POSITIVES)])
    x = ANCHORS, POSITIVES, negatives
    as_tokens = tuple(map(tokens, x))
    expected = log_of(as_tokens, validation_data=(as_tokens, IDS))
    assert "val_loss" in expected
    assert log_of(x, validation_data=(x, IDS)) == pytest.approx(expected, rel=1e-4)


@backend
def test_a_classifier_trains_and_answers_on_strings() -> None:
    on_tokens = classifier().fit(tokens(ANCHORS), LABELS, shuffle=False, verbose=0).history
    model = classifier()
    data = (ANCHORS, list(LABELS))
    log = model.fit(*data, shuffle=False, verbose=0, validation_data=data).history
    assert log["loss"] == pytest.approx(on_tokens["loss"], rel=1e-4)
    assert "val_accuracy_4" in log
    logits = model.predict(ANCHORS, verbose=0)
    np.testing.assert_allclose(logits, model.predict(tokens(ANCHORS), verbose=0), rtol=1e-5)
    np.testing.assert_allclose(logits, model.predict_on_batch(ANCHORS), rtol=1e-4, atol=1e-6)
    scores = model.evaluate(ANCHORS, LABELS, verbose=0, return_dict=True)
    assert scores == pytest.approx(model.test_on_batch(*data, return_dict=True), rel=1e-4)
    assert np.isfinite(model.train_on_batch(*data)).all()


@backend
def test_every_judgment_takes_strings() -> None:
    model = encoder()
    as_tokens, others = tokens(ANCHORS), tokens(POSITIVES)
    qrels: Any = {i: {i} for i in range(6)}
    pairs: list[Callable[[Any, Any], Any]] = [
        lambda q, c: evaluate_retrieval(model, q, c, qrels, k=2, verbose=0),
        lambda q, c: evaluate_similarity(model, q, c, np.linspace(0, 1, 6), verbose=0),
        lambda q, c: evaluate(model, q, LABELS, gallery=(c, LABELS), k=2, verbose=0),
        lambda q, c: evaluate(classifier(), q, LABELS, gallery=(c, LABELS), k=2, verbose=0),
    ]
    for judge in pairs:
        expected, judged = judge(as_tokens, others), judge(ANCHORS, POSITIVES)
        for dim in expected:
            assert judged[dim] == pytest.approx(expected[dim], abs=1e-5)


@backend
def test_callbacks_search_among_strings() -> None:
    twice, labels = ANCHORS + POSITIVES, np.tile(LABELS, 2)
    callbacks = [
        CorpusRecall(corpus=(POSITIVES, IDS), queries=(ANCHORS, IDS), k=2),
        NeighborMetrics(gallery=(twice, labels), queries=(ANCHORS, LABELS)),
    ]
    log = log_of((ANCHORS, POSITIVES), callbacks=callbacks)
    callbacks = [
        CorpusRecall(corpus=(tokens(POSITIVES), IDS), queries=(tokens(ANCHORS), IDS), k=2),
        NeighborMetrics(gallery=(tokens(twice), labels), queries=(tokens(ANCHORS), LABELS)),
    ]
    expected = log_of((tokens(ANCHORS), tokens(POSITIVES)), callbacks=callbacks)
    assert {"val_recall@2_4", "val_1nn_8"} < set(expected)
    assert log == pytest.approx(expected, rel=1e-4)


def vectors_and_mask(backbone: Any) -> tuple[Any, Any]:
    given = tokens(ANCHORS)
    vectors = backbone.predict(given, verbose=0)["sequence_output"]
    return vectors, given["padding_mask"][..., None]


@backend
def test_poolings_are_what_their_names_say() -> None:
    backbone = bert()
    vectors, mask = vectors_and_mask(backbone)
    lengths = mask.sum(axis=1)[:, 0]
    expected = {
        "mean": (vectors * mask).sum(axis=1) / mask.sum(axis=1),
        "first": vectors[:, 0],
        "last": vectors[np.arange(6), lengths - 1],
    }
    assert len(set(lengths)) > 1
    for pooling, made in expected.items():
        tower = TextEncoder(backbone, preprocessor(), pooling=pooling)
        np.testing.assert_allclose(tower.predict(ANCHORS, verbose=0), made, rtol=1e-4, atol=1e-5)
        assert pooling_of(MatryoshkaEncoder(tower)) == pooling


# keras-hub's embedder of BERT holds the pooler, which its own pooling does not use.
@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@backend
def test_an_embedder_of_keras_hub_keeps_its_pooling_and_its_scale() -> None:
    models = imported("keras_hub").models
    tower = models.BertTextEmbedder(bert(), preprocessor(), pooling_mode="cls", normalize=True)
    model = encoder(lambda: tower)
    assert preprocessor_of(model) is tower.preprocessor
    assert pooling_of(model) == "first"
    vectors, _ = vectors_and_mask(tower.backbone)
    expected = vectors[:, 0] / np.linalg.norm(vectors[:, 0], axis=1, keepdims=True)
    np.testing.assert_allclose(model.predict(ANCHORS, verbose=0), expected, rtol=1e-4, atol=1e-5)
    assert model.fit((ANCHORS, POSITIVES), verbose=0).history["loss"]
    part, _ = split(model)  # of tokens, which the embedder itself would tokenize once more
    np.testing.assert_allclose(
        part.predict(tokens(ANCHORS), verbose=0), model.predict(ANCHORS, verbose=0), rtol=1e-5
    )
    qrels: Any = {i: {i} for i in range(6)}
    quality = evaluate_retrieval(tower, ANCHORS, POSITIVES, qrels, dims=(4, 8), k=2, verbose=0)
    assert list(quality) == [4, 8]


# keras-hub's tasks say on loading that they are not compiled.
@pytest.mark.filterwarnings("ignore:`compile..` was not called as part of model loading")
@backend
@pytest.mark.parametrize("kind", ["tower", "argument", "embedder", "classifier"])
def test_a_saved_model_tokenizes_as_before(kind: str, tmp_path: Path) -> None:
    models = imported("keras_hub").models
    kinds: dict[str, Callable[[], Any]] = {
        "tower": encoder,
        "argument": lambda: encoder(lambda: TextEncoder(bert()), preprocessor=preprocessor()),
        "embedder": lambda: encoder(lambda: models.BertTextEmbedder(bert(), preprocessor())),
        "classifier": classifier,
    }
    model = kinds[kind]()
    expected = model.predict(ANCHORS, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(ANCHORS, verbose=0), expected, rtol=1e-5)
    assert loaded.preprocessor.tokenizer.get_vocabulary() == WORDS


@backend
def test_exits_and_parts_of_a_text_model() -> None:
    model = classifier(exits=("transformer_layer_0",))
    log = model.fit(ANCHORS, LABELS, verbose=0).history
    assert "accuracy_transformer_layer_0_4" in log
    given = tokens(ANCHORS)
    answers = model.all_exits().predict(given, verbose=0)
    last = model.predict(ANCHORS, verbose=0)
    np.testing.assert_allclose(answers["last"], last, rtol=1e-4, atol=1e-5)
    plain = cut(model, 4).predict(given, verbose=0)
    np.testing.assert_allclose(plain, last[:, 0], rtol=1e-4, atol=1e-5)


def test_the_pooler_that_no_vector_needs_is_no_weight_of_the_encoder() -> None:
    tower = TextEncoder(bert())
    assert "pooled_dense" in [layer.name for layer in tower.backbone.layers]
    assert not [w for w in tower.weights if "pooled_dense" in w.path]
    assert tower.get_layer("transformer_layer_1").trainable


ODD = ["", "a\0b", "x" * 10_000, "pay " * 5000, "😀", "שלום עולם", "e\u0301", "\u200b", "\x01"]


@backend
def test_odd_text_trains_and_is_answered() -> None:
    model = encoder()
    positives = (POSITIVES * 2)[: len(ODD)]
    assert np.isfinite(model.fit((ODD, positives), verbose=0).history["loss"]).all()
    answers = model.predict(ODD, verbose=0)
    assert np.isfinite(answers).all()
    given = tokens(ODD)["token_ids"]
    assert given[0].tolist() == [2, 3, 0, 0, 0, 0]
    assert given[1].tolist() == [2, WORDS.index("a"), WORDS.index("b"), 3, 0, 0]
    assert given[2].tolist() == [2, 1, 3, 0, 0, 0]
    assert given[3].tolist() == [2, 5, 5, 5, 5, 3]


@backend
def test_a_data_set_reads_odd_bytes_as_a_served_model_does() -> None:
    tensorflow = imported("tensorflow")
    imported("tensorflow_text")
    model = encoder()
    data = tensorflow.data.Dataset.from_tensors([b"a\0b", b"pay \xff", b"\0mum"])
    expected = model.predict(["a b", "pay \ufffd", "mum"], verbose=0)
    np.testing.assert_allclose(model.predict(data, verbose=0), expected, rtol=1e-5)


def test_python_reads_odd_text_as_the_graph_does(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a\0b", "\0", *ODD]
    expected = tokens(texts)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    own = tokens(texts)
    for name in expected:
        np.testing.assert_array_equal(own[name], expected[name])


def test_a_seed_that_is_set_later_loses_no_tokenizer() -> None:
    own = text_models.sentencepiece()
    expected = tokenize(own, ANCHORS)["token_ids"]
    keras.utils.set_random_seed(0)
    np.testing.assert_array_equal(tokenize(own, ANCHORS)["token_ids"], expected)


def test_a_preprocessor_is_read_as_it_is_now_and_is_not_kept() -> None:
    own = new_preprocessor(6)
    assert tokenize(own, ["\u00e9"])["token_ids"][0, 1] == WORDS.index("[UNK]")
    own.tokenizer.strip_accents = True
    assert tokenize(own, ["\u00e9"])["token_ids"][0, 1] == WORDS.index("e")
    alive = weakref.ref(own)
    del own
    gc.collect()
    assert alive() is None


REFUSED_TEXTS: dict[str, tuple[Any, str]] = {
    "a string": (
        "pay",
        "Texts come in a list or an array. Received: one str. Write [text].",
    ),
    "a number": (
        ["pay", 3.0],
        "Texts must be strings. Received: a float in row 1. Leave the row out, or write ''.",
    ),
    "a lone surrogate": (
        ["pay", "\ud800"],
        "Texts must be UTF-8. Received: in row 1, 'utf-8' codec can't encode character "
        "'\\ud800' in position 0: surrogates not allowed. Repair it where it was read, for "
        "example by bytes.decode(errors='replace') or text.encode(errors='replace').decode().",
    ),
    "bytes that are no UTF-8": (
        [b"\xffpay"],
        "Texts must be UTF-8. Received: in row 0, 'utf-8' codec can't decode byte 0xff in "
        "position 0: invalid start byte. Repair it where it was read, for "
        "example by bytes.decode(errors='replace') or text.encode(errors='replace').decode().",
    ),
}


SHAPES: dict[str, tuple[Any, str]] = {
    "two axes": (
        np.array([["pay"], ["mum"]]),
        "Texts must be given in an array of one axis, a text a row. Received: an array of shape "
        "(2, 1). Write texts.ravel(), or (anchors, positives) for pairs.",
    ),
    "no axis": (
        np.array("pay"),
        "Texts come in a list or an array. Received: one ndarray. Write [text].",
    ),
    "no axis in a column": (
        np.array("pay", object),
        "Texts come in a list or an array. Received: one ndarray. Write [text].",
    ),
    "none": ([], "At least one text must be given. Received: none."),
    "none in a tuple": ((), "At least one text must be given. Received: none."),
    "gaps alone": (
        [None, None],
        "Texts must be strings. Received: a NoneType in row 0. Leave the row out, or write ''.",
    ),
    "none in an array": (
        np.array([], object),
        "At least one text must be given. Received: none.",
    ),
    "a gap first": (
        [None, "pay"],
        "Texts must be strings. Received: a NoneType in row 0. Leave the row out, or write ''.",
    ),
    "a gap first in a column": (
        np.array([np.nan, "pay"], object),
        "Texts must be strings. Received: a float in row 0. Leave the row out, or write ''.",
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_texts_in_another_shape_are_refused(name: str) -> None:
    texts, sentence = SHAPES[name]
    for model in (encoder(), classifier(), TextEncoder(bert(), preprocessor())):
        with pytest.raises(ValueError, match=exactly(sentence)):
            model.predict(texts, verbose=0)


def test_pairs_in_another_shape_are_refused() -> None:
    by_row = list(zip(ANCHORS, POSITIVES, strict=True))
    column = np.array(POSITIVES)[:, None]
    one_axis = (
        "Texts must be given in an array of one axis, a text a row. Received: an array of shape "
        "(6, 1). Write texts.ravel(), or (anchors, positives) for pairs."
    )
    pair = (ANCHORS, POSITIVES)
    sentences: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        (
            (by_row,),
            {},
            "Texts of pairs must be given side by side: (anchors, positives). Received: 6 rows of "
            "2 texts. Write tuple(zip(*rows)).",
        ),
        (((ANCHORS, column),), {}, one_axis),
        ((pair,), {"validation_data": ((ANCHORS, column), IDS)}, one_axis),
        (
            (pair, ANCHORS),
            {},
            "The ids of pairs must be integers. Received: texts as y, beside pairs of texts. "
            "Number them: numpy.unique(ids, return_inverse=True)[1].",
        ),
    ]
    for data, arguments, sentence in sentences:
        with pytest.raises(ValueError, match=exactly(sentence)):
            encoder().fit(*data, verbose=0, **arguments)


def test_nothing_to_tokenize_is_refused() -> None:
    with pytest.raises(
        ValueError, match=exactly("At least one text must be given. Received: none.")
    ):
        tokenize(preprocessor(), [])
    sentence = (
        "Tokens are made by a preprocessor. Received: None, as a model has that takes no texts. "
        "Give preprocessor= to the model, or one of keras-hub here."
    )
    with pytest.raises(TypeError, match=exactly(sentence)):
        tokenize(None, ANCHORS)


@pytest.mark.parametrize("kind", ["single texts", "ragged tensors"])
def test_a_dataset_without_batches_of_texts_is_refused(kind: str) -> None:
    tensorflow = imported("tensorflow")
    data = tensorflow.data.Dataset.from_tensor_slices(ANCHORS)
    if kind == "ragged tensors":
        ragged = tensorflow.ragged.constant([["pay"], ["call", "mum"]])
        data = tensorflow.data.Dataset.from_tensors(ragged)
    sentence = (
        f"A data set of texts must give batches of one text a row. Received: {kind}. "
        "Write dataset.batch(32), or join the texts of a row."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        encoder().predict(data, verbose=0)


@pytest.mark.parametrize("name", REFUSED_TEXTS)
def test_what_is_no_text_is_refused(name: str) -> None:
    texts, sentence = REFUSED_TEXTS[name]
    model = encoder()
    with pytest.raises(ValueError, match=exactly(sentence)):
        model.predict(texts, verbose=0)
    if isinstance(texts, list):
        with pytest.raises(ValueError, match=exactly(sentence)):
            model.fit((texts, texts), verbose=0)


def functional_of(output: Callable[[Any], Any]) -> keras.Model:
    ids = keras.Input((None,), dtype="int32", name="token_ids")
    return keras.Model({"token_ids": ids}, output(keras.layers.Embedding(9, 4)(ids)))


def two_tokenizers() -> MatryoshkaEncoder:
    towers = [TextEncoder(bert(), new_preprocessor(words=words)) for words in (WORDS, WORDS[:-1])]
    return MatryoshkaEncoder(*towers)


MANY = [*WORDS, *"cdfghijk"]
MORE_TOKENS = (
    "A preprocessor must have the vocabulary that the backbone was trained with. Received: a "
    f"tokenizer of {len(MANY)} tokens for a BertBackbone of 20. Load both from one preset."
)

REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no functional model": (
        lambda: TextEncoder("all_minilm_l6_v2_en"),
        TypeError,
        "A TextEncoder is made of a text backbone, a functional Keras model. Received: "
        "'all_minilm_l6_v2_en'. Give for example "
        "keras_hub.models.BertBackbone.from_preset(FOLDER), or write "
        "TextEncoder.from_preset(FOLDER).",
    ),
    "no vector a token": (
        lambda: TextEncoder(functional_of(lambda x: {"encoder": x, "decoder": x})),
        ValueError,
        "A text backbone must give one vector a token, (batch, time, width), alone or under "
        "'sequence_output'. Received: Functional with outputs {'encoder': (None, None, 4), "
        "'decoder': (None, None, 4)}. Make a model of the one to pool: "
        "keras.Model(backbone.input, backbone.output[...]).",
    ),
    "no mask": (
        lambda: TextEncoder(functional_of(lambda x: x)),
        ValueError,
        "pooling='mean' must know which tokens are padding, from an input 'padding_mask'. "
        "Received: Functional with inputs ['token_ids']. Use pooling='first'.",
    ),
    "no layer": (
        lambda: MatryoshkaEncoder(TextEncoder(bert()), preprocessor=str.split),
        TypeError,
        f"preprocessor must be a Keras layer from strings to the inputs of the model. Received: "
        f"preprocessor={str.split!r}. Give for example "
        "keras_hub.models.BertTextEmbedderPreprocessor.from_preset(FOLDER).",
    ),
    "more tokens than the backbone": (
        lambda: TextEncoder(bert(), new_preprocessor(words=MANY)),
        ValueError,
        MORE_TOKENS,
    ),
    "more tokens than the tower": (
        lambda: MatryoshkaEncoder(TextEncoder(bert()), preprocessor=new_preprocessor(6, MANY)),
        ValueError,
        MORE_TOKENS,
    ),
    "more places than the backbone": (
        lambda: TextEncoder(bert(), new_preprocessor(7)),
        ValueError,
        "A text must have no more tokens than the backbone has places. Received: "
        "sequence_length=7 for a BertBackbone of 6. Give sequence_length=6 or less.",
    ),
    "no length": (
        lambda: TextEncoder(bert(), new_preprocessor(0)),
        ValueError,
        "sequence_length must be a positive integer: how many tokens a text has. Received: "
        "sequence_length=0. Give for example 128.",
    ),
    "two tokenizers": (
        two_tokenizers,
        ValueError,
        "Both towers must read texts by one preprocessor. Received: towers with preprocessors "
        "that differ in vocabulary or settings. Give preprocessor=, the one for both, or towers "
        "without and tokens in fit.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_taken_is_refused_by_name(name: str) -> None:
    make, error, sentence = REFUSED[name]
    with pytest.raises(error, match=exactly(sentence)):
        make()


def test_a_loader_of_strings_is_refused() -> None:
    data = imported("torch").utils.data
    loader = data.DataLoader(list(zip(ANCHORS, POSITIVES, strict=True)), batch_size=6)
    sentence = (
        "A DataLoader of PyTorch must give tensors. Received: one whose batches hold strings. "
        "Give the texts as lists, or a keras.utils.PyDataset of them, or tokenize in its "
        "collate_fn."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        encoder().fit(loader, verbose=0)


@backend
def test_a_folder_is_all_that_is_named(tmp_path: Path) -> None:
    backbone, own = bert(), preprocessor()
    backbone.save_to_preset(str(tmp_path))
    own.save_to_preset(str(tmp_path))
    expected = TextEncoder(backbone, own).predict(ANCHORS, verbose=0)
    tower = TextEncoder.from_preset(tmp_path)
    assert tower.pooling == "mean"
    np.testing.assert_allclose(tower.predict(ANCHORS, verbose=0), expected, rtol=1e-5)
    short = TextEncoder.from_preset(tmp_path, sequence_length=4, pooling="first")
    assert tokenize(short.preprocessor, ANCHORS)["token_ids"].shape == (6, 4)
    assert short.pooling == "first"


@pytest.mark.parametrize(
    ("settings", "strips"),
    [
        ({"do_lower_case": True}, True),
        ({"do_lower_case": True, "strip_accents": None}, True),
        ({"do_lower_case": True, "strip_accents": False}, False),
        ({"do_lower_case": False}, False),
        ({"do_lower_case": False, "strip_accents": True}, True),
    ],
)
def test_accents_are_dropped_as_the_folder_says(
    settings: dict[str, Any], strips: bool, tmp_path: Path
) -> None:
    bert().save_to_preset(str(tmp_path))
    preprocessor().save_to_preset(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    own = TextEncoder.from_preset(tmp_path).preprocessor
    expected = WORDS.index("e" if strips else "[UNK]")
    assert tokenize(own, ["\u00e9"])["token_ids"][0].tolist() == [2, expected, 3, 0, 0, 0]


def test_the_pooling_of_a_family_without_embedders_must_be_given(tmp_path: Path) -> None:
    models = imported("keras_hub").models
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 8}
    models.DistilBertBackbone(vocabulary_size=20, **sizes).save_to_preset(str(tmp_path))
    models.DistilBertTokenizer(vocabulary=WORDS, lowercase=True).save_to_preset(str(tmp_path))
    assert TextEncoder.from_preset(tmp_path, pooling="mean").predict(["pay"], verbose=0).any()
    sentence = (
        "from_preset must know the pooling that the preset was trained with. Received: "
        f"pooling=None for {str(tmp_path)!r}, a DistilBertBackbone. Say one: pooling='mean', "
        "'first' or 'last'; or give keras_hub.models.TextEmbedder.from_preset(...) as the tower."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        TextEncoder.from_preset(tmp_path)


def test_a_family_without_a_preprocessor_of_one_text_is_refused(tmp_path: Path) -> None:
    models = imported("keras_hub").models
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 8}
    models.GPT2Backbone(vocabulary_size=20, **sizes).save_to_preset(str(tmp_path))
    sentence = (
        "keras-hub must have a preprocessor that makes one sequence of a text, of its "
        f"TextEmbedder or TextClassifier. Received: {str(tmp_path)!r}, a GPT2Backbone, which has "
        "neither. Give one: TextEncoder(backbone, preprocessor, pooling='last'), a Keras layer "
        "from strings to the inputs of the backbone."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        TextEncoder.from_preset(tmp_path, pooling="last")
