"""Segments of a model: the whole is the sum of its parts, and what cannot be cut is refused."""

import os
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from keras_mrl import segment
from tests.helpers import vision_backbones
from tests.helpers.laws import exactly
from tests.helpers.small_bert import bert
from tests.helpers.small_models import as_numpy
from tests.helpers.vision_backbones import imported

pytestmark = pytest.mark.backend

RANDOM = np.random.default_rng(0)
SOAK = bool(os.environ.get("KERAS_MRL_SOAK"))
SIDE = 64 if SOAK else 32
IMAGES = RANDOM.normal(size=(3, SIDE, SIDE, 3)).astype("float32")
SMALL_IMAGES = RANDOM.normal(size=(3, 32, 32, 3)).astype("float32")
TOKENS = {
    "token_ids": RANDOM.integers(1, 50, (3, 7)).astype("int32"),
    "segment_ids": np.zeros((3, 7), "int32"),
    "padding_mask": np.array([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5], "int32"),
}


def application(name: str) -> Callable[[], keras.Model]:
    make = getattr(keras.applications, name)
    return lambda: make(weights=None, include_top=False, input_shape=IMAGES.shape[1:])


def deep_bert() -> keras.Model:
    return bert(vocabulary_size=50, num_layers=3, max_sequence_length=12)


def residual() -> keras.Model:
    inputs = keras.Input((5,), name="x")
    first = keras.layers.Dense(6, name="first", activation="relu")(inputs)
    inner = keras.layers.Dense(6, name="inner")(first)
    last = keras.layers.Dense(6, name="outer")(inner)
    return keras.Model(inputs, keras.layers.Add(name="sum")([first, last, inputs[:, :1]]))


def masked() -> keras.Model:
    """Keras carries the mask of token 0 on the tensors, and no tensor says so."""
    tokens = keras.Input((7,), dtype="int32", name="tokens")
    x = keras.layers.Embedding(50, 4, mask_zero=True, name="embedding")(tokens)
    x = keras.layers.LSTM(5, return_sequences=True, name="lstm")(x)
    return keras.Model(tokens, keras.layers.GlobalAveragePooling1D(name="mean")(x))


def shared() -> keras.Model:
    """One layer is called on both sides of the cut."""
    inputs = keras.Input((5,), name="x")
    twice = keras.layers.Dense(5, name="twice", activation="tanh")
    cut = keras.layers.Dense(5, name="cut")(twice(inputs))
    return keras.Model(inputs, twice(cut))


def nested() -> keras.Model:
    """A model in a model: the usual way to put pretrained layers behind others."""
    inputs = keras.Input((5,), name="x")
    scaled = keras.layers.Rescaling(0.5)(inputs)
    return keras.Model(inputs, keras.layers.Dense(2, name="out")(residual()(scaled)))


def several_inputs_and_outputs() -> keras.Model:
    inputs = {name: keras.Input((5,), name=name) for name in ("left", "right")}
    left = keras.layers.Dense(4, name="of_left")(inputs["left"])
    both = keras.layers.Concatenate(name="both")([left, inputs["right"]])
    return keras.Model(inputs, {"left": left, "out": keras.layers.Dense(2, name="out")(both)})


X = RANDOM.normal(size=(3, 5)).astype("float32")
PADDED = np.where(TOKENS["padding_mask"] > 0, TOKENS["token_ids"], 0)
PARTS: dict[str, tuple[Callable[[], keras.Model], list[str], Any]] = {
    "inside a block": (residual, ["inner"], X),
    "masks": (masked, ["embedding", "lstm"], PADDED),
    "a shared layer": (shared, ["cut"], X),
    "a model in a model": (nested, ["first", "inner"], X),
    "inputs and outputs": (several_inputs_and_outputs, ["of_left"], {"left": X, "right": -X}),
    "keras-cv": (vision_backbones.keras_cv, ["v2_stack_0_block1_1_conv"], SMALL_IMAGES),
    "keras-hub, text": (deep_bert, ["embeddings_dropout", "transformer_layer_1"], TOKENS),
    "keras-hub, a key of the pyramid": (
        lambda: imported("keras_hub").models.ResNetBackbone(
            input_conv_filters=[64],
            input_conv_kernel_sizes=[3],
            stackwise_num_filters=[64, 8],
            stackwise_num_blocks=[1, 1],
            stackwise_num_strides=[1, 2],
            block_type="basic_block",
            image_shape=(32, 32, 3),
        ),
        ["P2"],
        SMALL_IMAGES,
    ),
    "MobileNetV2, inside a block": (
        application("MobileNetV2"),
        ["block_3_expand_relu", "block_5_project", "block_6_depthwise"],
        IMAGES,
    ),
}
LARGE = {
    "ResNet50": (application("ResNet50"), ["conv3_block4_out", "conv4_block6_out"], IMAGES),
    "EfficientNetB0": (application("EfficientNetB0"), ["block3b_add", "block5a_dwconv"], IMAGES),
    "DenseNet121": (application("DenseNet121"), ["pool2_conv", "conv4_block6_concat"], IMAGES),
    "NASNetMobile": (application("NASNetMobile"), ["activation_60"], IMAGES),
}


def whole_minus_parts(model: keras.Model, layers: list[str], x: Any) -> list[float]:
    parts = segment(model, layers)
    assert len(parts.segments) == len(layers) + 1
    outputs = keras.tree.flatten(model(x))
    results = parts.run(x)[-1]
    assert len(outputs) == len(results)
    return [
        float(np.abs(as_numpy(output) - as_numpy(result)).max())
        for output, result in zip(outputs, results, strict=True)
    ]


@pytest.mark.parametrize(("make", "layers", "x"), PARTS.values(), ids=PARTS)
def test_the_whole_minus_its_parts_is_zero(
    make: Callable[[], keras.Model], layers: list[str], x: Any
) -> None:
    assert set(whole_minus_parts(make(), layers, x)) == {0.0}


@pytest.mark.soak
@pytest.mark.skipif(not SOAK, reason="large models: make soak")
@pytest.mark.parametrize(("make", "layers", "x"), LARGE.values(), ids=LARGE)
def test_the_whole_minus_its_parts_is_zero_of_large_models(
    make: Callable[[], keras.Model], layers: list[str], x: Any
) -> None:
    keras.backend.clear_session()  # NASNet's layers are numbered
    assert set(whole_minus_parts(make(), layers, x)) == {0.0}


@pytest.mark.parametrize(
    ("make", "layers", "x"),
    [PARTS["inside a block"], PARTS["masks"], PARTS["keras-hub, text"]],
    ids=["inside a block", "masks", "keras-hub, text"],
)
def test_rows_that_go_on_are_answered_as_all_rows_are(
    make: Callable[[], keras.Model], layers: list[str], x: Any
) -> None:
    model = make()
    parts, rows = segment(model, layers), np.array([2, 0])
    state = parts.start(x)
    for number, part in enumerate(parts.segments):
        results, state = part(state)
        if not number:
            state = {name: ops.take(entry, rows, axis=0) for name, entry in state.items()}
    expected = keras.tree.flatten(model(x))
    for result, right in zip(results, expected, strict=True):
        np.testing.assert_allclose(as_numpy(result), as_numpy(right)[rows], rtol=1e-5, atol=1e-6)


def test_only_what_later_parts_read_goes_on() -> None:
    first, last = segment(residual(), ["inner"]).segments
    assert set(first.keeps) == {"x", "first", "inner"}  # the sum reads all three
    assert last.keeps == ()
    assert [part.reads for part in segment(deep_bert(), ["transformer_layer_0"]).segments] == [
        ("token_ids", "segment_ids", "padding_mask"),
        ("transformer_layer_0", "padding_mask"),
    ]


def test_layers_are_those_of_the_model() -> None:
    model = residual()
    parts = segment(model, ["inner"])
    model.get_layer("inner").set_weights([np.zeros((6, 6)), np.full(6, 2.0)])
    np.testing.assert_array_equal(as_numpy(parts.run(X)[0][0]), np.full((3, 6), 2.0))


def fixed_batch() -> keras.Model:
    inputs = keras.Input(batch_shape=(3, 5), name="x")
    return keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Dense(4, name="cut")(inputs)))


def rows_of_steps(steps: int | None) -> keras.Model:
    """A net whose middle has a row for each step of each row, and whose shapes do not say so."""
    inputs = keras.Input((steps, 3), name="x")
    x = keras.layers.Dense(4, name="cut")(keras.ops.reshape(inputs, (-1, 3)))
    sums = keras.layers.Dense(2, name="steps")(x)
    return keras.Model(inputs, sums)


def vit() -> keras.Model:
    return imported("keras_hub").models.ViTBackbone(
        image_shape=(32, 32, 3),
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        mlp_dim=16,
        name="vit",
    )


WRONG: dict[str, tuple[Callable[[], keras.Model], list[str], type[Exception], str]] = {
    "no layer of that name": (
        residual,
        ["nowhere"],
        ValueError,
        "An exit stands after a layer of the backbone. Received: 'nowhere', which 'wrong' does not "
        "have. Choose one of its layers, for example 'first', 'inner', 'outer', 'get_item'.",
    ),
    "inside one layer": (
        vit,
        ["transformer_block_1"],
        ValueError,
        "An exit stands after a layer of the backbone. Received: 'transformer_block_1', which "
        "stands inside 'vit_encoder', and to Keras that is one layer. Choose one of its layers, "
        "for example 'vit_patching_and_embedding'.",
    ),
    "not in order": (
        residual,
        ["outer", "first"],
        ValueError,
        "Exits go from shallow to deep, and each needs layers of its own before it. Received: "
        "'first', which is computed before 'outer' or with it. Put it earlier, or leave it out.",
    ),
    "the last layer": (
        residual,
        ["sum"],
        ValueError,
        "Exits go from shallow to deep, and each needs layers of its own before it. Received: "
        "'the output', which is computed before 'sum' or with it. Put it earlier, or leave it out.",
    ),
    "called twice": (
        shared,
        ["twice"],
        ValueError,
        "An exit stands after a layer that is called once and has one output. Received: 'twice', "
        "which has 2 calls. Choose the layer after it.",
    ),
    "rows that are not those of the inputs": (
        fixed_batch,
        ["cut"],
        ValueError,
        "What crosses a cut must have one row per input row. Received: a tensor of shape (3, 4) "
        "from 'cut', which crosses the cut at 'cut'. Cut before 'cut', or leave the batch size of "
        "the inputs open.",
    ),
    "several rows for a row of the inputs": (
        lambda: rows_of_steps(4),
        ["cut"],
        ValueError,
        "What crosses a cut must have one row per input row. Received: 'cut', which makes 12 rows "
        "of 3. Cut before it, or keep the rows: keras.layers.Reshape leaves their axis alone.",
    ),
    "several rows for a row of any length": (
        lambda: rows_of_steps(None),
        ["cut"],
        ValueError,
        "What crosses a cut must have one row per input row. Received: 'cut', which makes 48 rows "
        "of 3. Cut before it, or keep the rows: keras.layers.Reshape leaves their axis alone.",
    ),
    "not a graph": (
        lambda: keras.Sequential([keras.layers.Dense(3)], name="wrong"),
        ["dense"],
        TypeError,
        "Exits need a backbone whose layers Keras knows: a functional model, or a sequential one "
        "with an Input. Received: Sequential 'wrong'. Write it as keras.Model(inputs, features), "
        "with a layer for every part that an exit may follow.",
    ),
}


@pytest.mark.parametrize(("make", "layers", "error", "sentence"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_cut_is_refused_by_name(
    make: Callable[[], keras.Model], layers: list[str], error: type[Exception], sentence: str
) -> None:
    keras.backend.clear_session()  # so that operations are numbered anew
    model = make()
    if model.name.startswith("functional"):
        model.name = "wrong"
    with pytest.raises(error, match=exactly(sentence)):
        segment(model, layers)


def test_rows_may_be_reshaped_between_cuts() -> None:
    inputs = keras.Input((4, 3), name="x")
    folded = keras.layers.Dense(2, name="inside")(keras.ops.reshape(inputs, (-1, 3)))
    x = keras.layers.Dense(2, name="cut")(keras.ops.reshape(folded, (-1, 4, 2)))
    parts = segment(keras.Model(inputs, keras.layers.Flatten(name="flat")(x)), ["cut"])
    assert [part.results for part in parts.segments] == [("cut",), ("flat",)]
