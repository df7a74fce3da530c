"""Exits of a model: any backbone, branches of one's own, models before it; saved, cut, refused."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import (
    ContrastiveLoss,
    MatryoshkaClassifier,
    MatryoshkaEncoder,
    MatryoshkaHead,
    measure_costs,
    segment,
    split,
)
from keras_mrl.evaluation import evaluate
from keras_mrl.models.exits import short_names
from tests.helpers.laws import exactly
from tests.helpers.small_bert import bert
from tests.helpers.small_models import DIMS, NUM_CLASSES, X, Y, as_numpy, compiled

pytestmark = pytest.mark.backend

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.normal(size=(12, 8, 8, 2)).astype("float32")
LENGTHS = np.arange(12) % 5 + 2
TOKENS = np.where(np.arange(6) < LENGTHS[:, None], RANDOM.integers(1, 20, (12, 6)), 0)
TEXTS = {
    "token_ids": TOKENS.astype("int32"),
    "segment_ids": np.zeros((12, 6), "int32"),
    "padding_mask": (TOKENS > 0).astype("int32"),
}
EAGERLY = keras.backend.backend() != "jax"  # which compiles one by one what it runs one by one
Part = Callable[[], Any]


def dense_net() -> keras.Model:
    inputs = keras.Input((5,), name="x")
    hidden = inputs
    for name in ("first_out", "second_out"):
        hidden = keras.layers.Dense(6, activation="tanh", name=name)(hidden)
    return keras.Model(inputs, keras.layers.Dense(8, name="features")(hidden), name="net")


def sequential() -> keras.Model:
    layers = [keras.layers.Dense(6, name="first_out"), keras.layers.Dense(8)]
    return keras.Sequential([keras.Input((5,)), *layers], name="net")


def conv_net() -> keras.Model:
    image = keras.Input((8, 8, 2), name="image")
    x = keras.layers.Conv2D(4, 3, padding="same", name="block1_conv")(image)
    x = keras.layers.BatchNormalization(name="block1_out")(x)
    x = keras.layers.Conv2D(8, 3, strides=2, name="block2_conv")(x)
    return keras.Model(image, keras.layers.BatchNormalization(name="block2_out")(x), name="net")


def text_net() -> keras.Model:
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    x = keras.layers.Embedding(20, 4, mask_zero=True, name="embedding")(tokens)
    x = keras.layers.LSTM(4, return_sequences=True, name="lstm")(x)
    mean = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(tokens, keras.layers.Dense(8)(mean), name="net")


@keras.saving.register_keras_serializable(package="tests")
class MeanOfTokens(keras.layers.Layer):
    """A pooling of several outputs."""

    def call(self, outputs: Any) -> Any:
        return outputs["pooled_output"] + keras.ops.mean(outputs["sequence_output"], axis=1)


def front() -> keras.Model:
    layers = [keras.layers.AveragePooling2D(4), keras.layers.Flatten(), keras.layers.Dense(8)]
    return keras.Sequential([keras.Input((8, 8, 2)), *layers], name="thumbnail")


def branch() -> keras.Model:
    return keras.Sequential([keras.layers.GlobalMaxPooling2D(), keras.layers.Dense(9)], name="mine")


def inside() -> keras.Model:
    """A backbone in a model, called for good without training, as transfer learning has it."""
    image = keras.Input((8, 8, 2), name="image")
    features = conv_net()(keras.layers.Rescaling(2.0)(image), training=False)
    return keras.Model(image, features, name="outer")


POOLED = {"pooling": keras.layers.GlobalAveragePooling2D}
MODELS: dict[str, tuple[Part, Part, dict[str, Part], Any, list[str]]] = {
    "dense": (dense_net, lambda: ("first_out", "second_out"), {}, X, ["first", "second"]),
    "sequential": (sequential, lambda: ["first_out"], {}, X, ["first_out"]),
    "images": (conv_net, lambda: ["block1_out"], POOLED, IMAGES, ["block1_out"]),
    "a front, a branch": (
        conv_net,
        lambda: [front(), ("block1_conv", branch()), "block2_conv"],
        POOLED,
        IMAGES,
        ["thumbnail", "block1", "block2"],
    ),
    "masked tokens": (text_net, lambda: ["embedding", "lstm"], {}, TOKENS, ["embedding", "lstm"]),
    "keras-hub": (
        bert,
        lambda: ["embeddings_dropout", "transformer_layer_0"],
        {"pooling": MeanOfTokens},
        TEXTS,
        ["embeddings_dropout", "transformer_layer_0"],
    ),
    "a model in a model": (inside, lambda: ["block1_out"], POOLED, IMAGES, ["block1_out"]),
}


def with_exits(body: Part, exits: Part, parts: dict[str, Part], **arguments: Any) -> Any:
    head = MatryoshkaHead(NUM_CLASSES, dims=DIMS)
    made = {name: make() for name, make in parts.items()}
    model = MatryoshkaClassifier(body(), head, exits=exits(), **made)
    return compiled(model, **({"metrics": ["accuracy"], "run_eagerly": EAGERLY} | arguments))


def numpy_by_exit(outputs: Any) -> dict[str, Any]:
    return {name: as_numpy(own) for name, own in outputs.items()}


@pytest.mark.parametrize(("body", "exits", "parts", "x", "short"), MODELS.values(), ids=MODELS)
def test_any_functional_backbone_trains_saves_and_is_cut(
    body: Part, exits: Part, parts: dict[str, Part], x: Any, short: list[str], tmp_path: Path
) -> None:
    model = with_exits(body, exits, parts)
    before = [as_numpy(weight) for weight in model.trainable_weights]
    log = model.fit(x, Y, verbose=0).history
    after = [as_numpy(weight) for weight in model.trainable_weights]
    assert not any(np.array_equal(*pair) for pair in zip(before, after, strict=True))
    names = [f"accuracy_{name}_{dim}" for name in short for dim in DIMS]
    assert set(log) == {"loss", *names, *(f"accuracy_{dim}" for dim in DIMS)}

    logits = numpy_by_exit(model.all_exits()(x))
    assert sorted(logits) == sorted([*model.exits, "last"])
    np.testing.assert_allclose(logits["last"], as_numpy(model(x)), 1e-6, 1e-6)
    assert {array.shape for array in logits.values()} == {(12, 3, NUM_CLASSES)}
    for name in model.exits:
        plain = model.at(exit=name, dim=4)
        np.testing.assert_allclose(as_numpy(plain(x)), logits[name][:, 1], 1e-5, 1e-6)
        body_and_head: Any = split(model, exit=name)
        nested = MatryoshkaClassifier(*body_and_head)
        np.testing.assert_allclose(as_numpy(nested(x)), logits[name], 1e-5, 1e-6)
    features = [as_numpy(own) for [own] in model.segments().run(x)]
    heads = {**model.exit_heads, "last": model.head}
    for own, name in zip(features, [*model.exits, "last"], strict=True):
        np.testing.assert_allclose(as_numpy(heads[name](own)), logits[name], 1e-5, 1e-6)

    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.exits == model.exits
    for name, array in numpy_by_exit(loaded.all_exits()(x)).items():
        np.testing.assert_array_equal(array, logits[name], err_msg=name)
    assert loaded.evaluate(x, Y, verbose=0)[0] == pytest.approx(model.evaluate(x, Y, verbose=0)[0])
    json.dumps(model.get_config())


def test_all_exits_predicts_from_shallow_to_deep(tmp_path: Path) -> None:
    # Neither the names nor their order are those of the alphabet, which is where "last" is early.
    features = keras.Input((6,))
    second = keras.layers.Dense(8, name="middle")(keras.layers.Dense(8, name="start")(features))
    backbone = keras.Model(features, keras.layers.Dense(8, name="out")(second))
    exits, x = ("start", "middle"), np.ones((3, 6), "float32")
    classifier = MatryoshkaClassifier(backbone, MatryoshkaHead(3, dims=(2, 4)), exits=exits)
    encoder = MatryoshkaEncoder(backbone, exits=exits)
    for model in (classifier, encoder):
        model.all_exits().save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        for own in (model.all_exits(), loaded):
            assert list(own.predict(x, verbose=0)) == ["start", "middle", "last"]


def test_layers_are_those_of_the_backbone_and_heads_are_like_the_head() -> None:
    backbone = dense_net()
    model = MatryoshkaClassifier(
        backbone,
        MatryoshkaHead(NUM_CLASSES, dims=DIMS, tied=True, use_bias=False),
        exits=["first_out"],
    )
    plain = MatryoshkaClassifier(dense_net(), MatryoshkaHead(NUM_CLASSES, dims=DIMS, tied=True))
    head = model.exit_heads["first_out"]
    assert (head.dims, head.tied, head.use_bias) == (DIMS, True, False)
    own = plain.count_params() - NUM_CLASSES + (6 + 1) * 8 + 8 * NUM_CLASSES  # no bias of a head
    assert model.count_params() == own
    np.testing.assert_array_equal(
        as_numpy(model.all_exits()(X)["last"]), as_numpy(model.head(backbone(X)))
    )


def test_a_mapping_gives_branches_by_the_names_of_layers() -> None:
    branch = keras.layers.Dense(9, name="mine")
    head = MatryoshkaHead(NUM_CLASSES, dims=DIMS)
    model = MatryoshkaClassifier(dense_net(), head, exits={"first_out": branch, "second_out": 0.5})
    assert model.exits == ("first_out", "second_out")
    assert model.exit_layers[0] is branch
    assert model.exit_layers[1].units == DIMS[-1]


def attention_net() -> keras.Model:
    tokens, mask = (keras.Input((None,), dtype="int32", name=n) for n in ("t", "attention_mask"))
    x = keras.layers.Embedding(20, 8, name="embedding")(tokens)
    mean = keras.layers.GlobalAveragePooling1D()(x, mask=mask)
    return keras.Model({"t": tokens, "attention_mask": mask}, keras.layers.Dense(8)(mean))


BY_INPUT = {"t": TEXTS["token_ids"], "attention_mask": TEXTS["padding_mask"]}
MASKED = {name: MODELS[name] for name in ("masked tokens", "keras-hub")}
MASKED["attention_mask"] = (attention_net, lambda: ["embedding"], {}, BY_INPUT, [])


@pytest.mark.parametrize("name", MASKED)
def test_an_exit_pools_over_the_steps_that_count(name: str) -> None:
    body, exits, parts, x, _ = MASKED[name]
    model = with_exits(body, exits, parts)
    width = int(LENGTHS[0])
    short = keras.tree.map_structure(lambda array: array[:1, :width], x)
    expected = model.all_exits()(short)
    for exit_name, padded in model.all_exits()(x).items():
        if exit_name != "last":  # `MeanOfTokens` reads no mask
            np.testing.assert_allclose(
                as_numpy(padded)[:1], as_numpy(expected[exit_name]), rtol=1e-5, atol=1e-6
            )


@keras.saving.register_keras_serializable(package="tests")
class MeanOfSteps(keras.layers.Layer):
    """A branch of one's own that reads the mask."""

    supports_masking = True

    def compute_mask(self, *_: Any) -> None:
        return None

    def call(self, steps: Any, mask: Any = None) -> Any:
        shares = keras.ops.cast(mask, steps.dtype)[..., None]
        return keras.ops.sum(steps * shares, axis=1) / keras.ops.sum(shares, axis=1)


@pytest.mark.parametrize(
    "branch",
    [
        lambda: keras.Sequential([keras.layers.GlobalAveragePooling1D(), keras.layers.Dense(9)]),
        MeanOfSteps,
    ],
    ids=["sequential", "layer"],
)
def test_a_branch_of_ones_own_is_told_which_steps_count(branch: Part, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Layer .* was passed an input with a mask")
        model = with_exits(
            bert, lambda: [("transformer_layer_0", branch())], {"pooling": MeanOfTokens}
        )
        model.fit(TEXTS, Y, verbose=0)
        padded = as_numpy(model.all_exits()(TEXTS)["transformer_layer_0"])
    width = int(LENGTHS[0])
    short = {name: array[:1, :width] for name, array in TEXTS.items()}
    expected = as_numpy(model.all_exits()(short)["transformer_layer_0"])
    np.testing.assert_allclose(padded[:1], expected, rtol=1e-5, atol=1e-6)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(
        as_numpy(loaded.all_exits()(TEXTS)["transformer_layer_0"]), padded, rtol=1e-6, atol=1e-6
    )
    assert measure_costs(model, batch_sizes=(1,), sample=TEXTS, laps=1).branch[
        "transformer_layer_0"
    ]


@pytest.mark.parametrize("name", ["masked tokens", "keras-hub"])
def test_a_row_of_padding_alone_is_finite_and_so_are_the_weights_after_it(name: str) -> None:
    body, exits, parts, x, _ = MODELS[name]
    model = with_exits(body, exits, parts)
    masked = {**x, "padding_mask": np.zeros_like(TOKENS)} if isinstance(x, dict) else 0 * TOKENS
    empty = keras.tree.map_structure(lambda array: array[:4], masked)
    early = model.exits[0]
    backbone, head = model.parts(early)
    assert np.isfinite(keras.ops.convert_to_numpy(backbone(empty))).all()
    nested = MatryoshkaClassifier(backbone, head)  # the last exit of these models needs a token
    nested.compile("sgd", "sparse_categorical_crossentropy")
    nested.fit(empty, np.zeros(4, int), verbose=0)
    for weights in nested.get_weights():
        assert np.isfinite(weights).all()


def test_exits_alone_are_trained_on_a_frozen_model() -> None:
    model = with_exits(conv_net, lambda: [front(), "block1_out"], POOLED)
    model.backbone.trainable = model.head.trainable = False
    compiled(model, metrics=["accuracy"], run_eagerly=EAGERLY)
    before = {weight.path: as_numpy(weight) for weight in model.weights}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(IMAGES, Y, verbose=0)
    moved = {w.path for w in model.weights if not np.array_equal(before[w.path], as_numpy(w))}
    assert moved >= {weight.path for weight in model.trainable_weights}
    frozen = {weight.path for weight in (*model.backbone.weights, *model.head.weights)}
    assert not moved & frozen


def test_a_model_cut_at_an_exit_has_none_of_the_layers_behind_it() -> None:
    model = with_exits(dense_net, lambda: ["first_out"], {})
    plain = model.at(exit="first_out", dim=4)
    assert plain.count_params() == (5 + 1) * 6 + (6 + 1) * 8 + (4 + 1) * NUM_CLASSES
    assert not {layer.name for layer in plain._flatten_layers()} & {"second_out", "features"}


def test_one_model_of_parts_is_the_whole() -> None:
    model = with_exits(conv_net, lambda: ["block1_out"], POOLED)
    [first], [last] = model.segments().run(IMAGES)
    [_], [whole] = segment(model.backbone, ["block1_out"]).run(IMAGES)
    np.testing.assert_array_equal(
        as_numpy(last), as_numpy(keras.layers.GlobalAveragePooling2D()(whole))
    )
    assert tuple(first.shape) == (12, 8)


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["conv3_block4_out", "conv4_block6_out"], ["conv3_block4", "conv4_block6"]),
        (["transformer_layer_0", "transformer_layer_3"], ["layer_0", "layer_3"]),
        (["conv4_block6_out"], ["conv4_block6_out"]),
        (["a_last", "a_first"], ["a_last", "a_first"]),  # "last" is the head's
        (["block", "block_out"], ["block", "block_out"]),
        (["add", "add_1"], ["add", "add_1"]),
        (["stage1/out", "stage2/out"], ["stage1", "stage2"]),
        ([], []),
    ],
)
def test_names_in_the_log_are_short_and_differ(names: list[str], short: list[str]) -> None:
    assert short_names(names) == dict(zip(names, short, strict=True))


def sequence_net() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            keras.layers.Embedding(9, 8, name="embedding"),
            keras.layers.Dense(8),
        ]
    )


PLAIN = {"body": dense_net, "exits": lambda: ["first_out"]}
WRONG: dict[str, tuple[Part, Any, type[Exception], str]] = {
    "a string": (
        dense_net,
        "first_out",
        TypeError,
        "exits must be a sequence of names of layers. Received: exits='first_out'. Write "
        "exits=('conv4_block6_out',) for one.",
    ),
    "a number": (
        dense_net,
        [3],
        TypeError,
        "An exit is the name of a layer, a pair of a name and a Keras layer from there to "
        "features, or a Keras model over the inputs. Received: 3. Write for example "
        "exits=('conv3_block4_out', 'conv4_block6_out').",
    ),
    "a string for a branch": (
        dense_net,
        {"first_out": "mean"},
        TypeError,
        "An exit is the name of a layer, a pair of a name and a Keras layer from there to "
        "features, or a Keras model over the inputs. Received: ('first_out', 'mean'). Write for "
        "example exits=('conv3_block4_out', 'conv4_block6_out').",
    ),
    "one name twice": (
        dense_net,
        ["first_out", "first_out"],
        ValueError,
        "Exits need names of their own, and 'last' is that of the head. Received: exits named "
        "['first_out', 'first_out']. Leave repeats out, or rename a layer.",
    ),
    "a front behind": (
        conv_net,
        ["block1_out", front()],
        ValueError,
        "A model over the inputs stands before the exits of the backbone. Received: "
        "exits=['block1_out', 'thumbnail']. Put 'thumbnail' first.",
    ),
    "too narrow a branch": (
        dense_net,
        [("first_out", keras.layers.Dense(7, name="mine"))],
        ValueError,
        "The layer of an exit must end in features (batch, 8) or wider. Received: 'first_out', "
        "which gives (None, 7). End it in keras.layers.Dense(8).",
    ),
    "steps of time": (
        sequence_net,
        ["embedding"],
        ValueError,
        "Exits classify whole rows by kernels of their own, from features (batch, width). "
        "Received: features of shape (None, 4, 8), a head with embedding=None. Leave exits out, or "
        "pool over time: pooling=keras.layers.GlobalAveragePooling1D().",
    ),
}


@pytest.mark.parametrize(("body", "exits", "error", "sentence"), WRONG.values(), ids=WRONG)
def test_wrong_exits_are_refused(
    body: Part, exits: Any, error: type[Exception], sentence: str
) -> None:
    pooling = keras.layers.GlobalAveragePooling2D() if body is conv_net else None
    with pytest.raises(error, match=exactly(sentence)):
        MatryoshkaClassifier(
            body(), MatryoshkaHead(NUM_CLASSES, dims=DIMS), pooling=pooling, exits=exits
        )


def test_a_branch_that_cannot_take_the_layer_is_named() -> None:
    narrow = keras.Sequential([keras.Input((3,)), keras.layers.Dense(8)])
    with pytest.raises(ValueError, match="must take what stands before it, \\(None, 6\\)"):
        MatryoshkaClassifier(
            dense_net(), MatryoshkaHead(3, dims=DIMS), exits=[("first_out", narrow)]
        )


def test_exits_are_asked_of_models_that_have_them() -> None:
    model = MatryoshkaClassifier(dense_net(), MatryoshkaHead(3, dims=DIMS), name="plain")
    sentence = (
        "A MatryoshkaClassifier has the exits that it was made with. Received: 'plain', which was "
        "made without any. Write MatryoshkaClassifier(..., exits=('conv4_block6_out',))."
    )
    for asked in (model.all_exits, model.segments, lambda: model.at(4, exit="first_out")):
        with pytest.raises(ValueError, match=exactly(sentence)):
            asked()
    with pytest.raises(
        ValueError,
        match=exactly(
            "Only a MatryoshkaClassifier or MatryoshkaEncoder has exits. Received: "
            "exit='first_out' for Functional 'net'. Leave exit out."
        ),
    ):
        split(dense_net(), exit="first_out")
    model = MatryoshkaClassifier(dense_net(), MatryoshkaHead(3, dims=DIMS), exits=["first_out"])
    with pytest.raises(
        ValueError,
        match=exactly(
            "exit must be one of the model's exits. Received: exit='second_out' for "
            "exits=('first_out', 'last'). Choose one of those."
        ),
    ):
        model.at(4, exit="second_out")


def two_inputs(exits: Any = ("hidden",)) -> Any:
    a, b = (keras.Input((3,), name=name) for name in "ab")
    hidden = keras.layers.Dense(4, name="hidden")(keras.layers.Concatenate()([a, 2 * b]))
    net = keras.Model({"a": a, "b": b}, keras.layers.Dense(8)(hidden))
    return MatryoshkaClassifier(net, MatryoshkaHead(NUM_CLASSES, DIMS), exits=exits)


def test_a_dict_with_a_key_that_is_no_input_is_refused() -> None:
    """Keras would give the arrays to the inputs in the order of the keys."""
    model = compiled(two_inputs())
    rows = {"a": np.ones((12, 3), "float32"), "b": np.zeros((12, 3), "float32")}
    labels = np.arange(12) % NUM_CLASSES
    model.fit(rows, labels, verbose=0)
    before = model.get_weights()
    more = {"A": np.full((12, 3), 9, "float32"), **rows}
    text = (
        "A dict of inputs has the keys that a model with exits names its inputs by. "
        "Received: 'A' beside inputs named 'a', 'b'. Leave such keys out."
    )
    for method in (model.fit, model.evaluate):
        with pytest.raises(ValueError, match=exactly(text)):
            method(more, labels, verbose=0)
    for own, kept in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(own, kept)
    encoder = MatryoshkaEncoder(model.backbone, exits=("hidden",))
    encoder.compile("sgd", ContrastiveLoss(dims=DIMS))
    for pairs in ((rows, more), {"anchor": more, "positive": rows}):
        with pytest.raises(ValueError, match=re.escape(text)):
            encoder.fit(pairs, verbose=0)
    encoder.fit((rows, rows), verbose=0)
    with pytest.raises(ValueError, match=re.escape(text)):
        model.predict(more, verbose=0)


def test_evaluation_judges_any_exit() -> None:
    model = two_inputs()
    rows = {"a": RANDOM.normal(size=(12, 3)), "b": RANDOM.normal(size=(12, 3))}
    labels = np.arange(12) % NUM_CLASSES
    judged = evaluate(model, rows, labels, exit="hidden", verbose=0)
    backbone, head = split(model, exit="hidden")
    assert head is not None
    nested = MatryoshkaClassifier(backbone, head)
    assert judged == evaluate(nested, rows, labels, verbose=0)
    assert judged != evaluate(model, rows, labels, verbose=0)
    with pytest.raises(ValueError, match="exit must be one of the model's exits"):
        evaluate(model, rows, labels, exit="nowhere", verbose=0)
