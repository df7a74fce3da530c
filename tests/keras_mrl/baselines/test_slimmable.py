from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from keras_mrl import MatryoshkaLoss
from keras_mrl.baselines import Slimmable, Switchable, slimmable
from tests.helpers import digits
from tests.helpers.laws import exactly
from tests.helpers.small_models import (
    NUM_CLASSES,
    X,
    Y,
    accuracy,
    as_numpy,
    compiled,
    cross_entropy,
)

pytestmark = pytest.mark.backend

DIMS = (2, 4, 8)
IMAGES = np.random.default_rng(0).normal(size=(12, 4, 4, 2)).astype("float32")


def dense_body(depth: int = 1) -> keras.Model:
    """Width 16 inside, so that 2, 4 and 8 dims have 4, 8 and 16 hidden units."""
    hidden = [layers.Dense(16, activation="tanh") for _ in range(depth)]
    return keras.Sequential([keras.Input((5,)), *hidden, layers.Dense(8)], name="body")


def residual_body() -> keras.Model:
    inputs = keras.Input((4, 4, 2))
    x = layers.Conv2D(8, 3, padding="same", use_bias=False)(inputs)
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.5)(x))
    y = layers.Conv2D(8, 3, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization(momentum=0.5)(y) + x
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(8)(x), name="residual")


def randomised(model: keras.Model) -> keras.Model:
    random = np.random.default_rng(1)
    model.set_weights([random.uniform(0.1, 1, w.shape) for w in model.get_weights()])
    return model


def test_a_narrower_net_is_the_first_units_of_every_layer() -> None:
    model = randomised(slimmable(dense_body(2), NUM_CLASSES, DIMS))
    weights = [w.astype("float64") for w in model.get_weights()]
    logits = as_numpy(model(X))
    assert logits.shape == (12, 3, NUM_CLASSES)
    for m, dim in enumerate(DIMS):
        x = X.astype("float64")
        for kernel, bias, units in zip(weights[0:6:2], weights[1:6:2], (2, 2, 1), strict=True):
            width = units * dim
            x = x @ kernel[: x.shape[1], :width] + bias[:width]
            x = np.tanh(x) if units == 2 else x
        features = keras.Model(model.input, model.get_layer(f"features_{dim}").output)
        np.testing.assert_allclose(as_numpy(features(X)), x, rtol=1e-4, atol=1e-5)
        expected = x @ weights[6][:dim] + weights[7]
        np.testing.assert_allclose(logits[:, m], expected, rtol=1e-4, atol=1e-5)


def test_the_full_width_is_the_net_itself() -> None:
    body = randomised(residual_body())
    model = slimmable(body, NUM_CLASSES, (8,))
    model.set_weights([*body.get_weights(), np.eye(8)[:, :NUM_CLASSES], np.zeros(NUM_CLASSES)])
    expected = as_numpy(body(IMAGES))[:, :NUM_CLASSES]
    np.testing.assert_allclose(as_numpy(model(IMAGES))[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_every_width_has_statistics_of_its_own() -> None:
    model = compiled(slimmable(residual_body(), NUM_CLASSES, DIMS))
    switched = [layer for layer in model.layers if isinstance(layer, Switchable)]
    assert [len(layer.weights) for layer in switched] == [12, 12]
    shapes = [tuple(w.shape) for w in switched[0].trainable_weights]
    assert shapes == [(2,), (2,), (4,), (4,), (8,), (8,)]
    before = [as_numpy(w) for w in switched[0].non_trainable_weights]
    model.fit(IMAGES, Y, batch_size=12, verbose=0)
    after = [as_numpy(w) for w in switched[0].non_trainable_weights]
    assert not any(np.array_equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_loss_is_the_sum_over_widths_and_a_dim_is_learned_by_its_own_units() -> None:
    model = compiled(slimmable(dense_body(), NUM_CLASSES, DIMS), metrics=[accuracy(DIMS)])
    logits = as_numpy(model(X))
    inner = cross_entropy()
    expected = sum(float(inner(Y, logits[:, m])) for m in range(3))
    scores = model.evaluate(X, Y, verbose=0, return_dict=True)
    assert scores["loss"] == pytest.approx(expected, rel=1e-5)
    assert {"accuracy_2", "accuracy_4", "accuracy_8"} <= scores.keys()

    before = [as_numpy(w) for w in model.weights]
    compiled(model, loss=MatryoshkaLoss(inner, weights=(1, 0, 0))).fit(X, Y, verbose=0)
    after = [as_numpy(w) for w in model.weights]
    kernel = after[0] != before[0]
    assert kernel[:, :4].all()
    assert not kernel[:, 4:].any()


def test_it_learns_digits_at_every_width() -> None:
    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(64), layers.BatchNormalization(momentum=0.9), layers.ReLU()]
    body = keras.Sequential([keras.Input((64,)), *hidden, layers.Dense(16)])
    model = digits.learn(slimmable(body, digits.NUM_CLASSES, (4, 16)), epochs=10)
    logits = model.predict(digits.X[digits.TEST], batch_size=1000, verbose=0)
    right = (logits.argmax(-1) == digits.Y[digits.TEST][:, None]).mean(0)
    assert right[0] > 0.75
    assert right[1] > 0.93


def test_it_saves_and_loads(tmp_path: Path) -> None:
    model = randomised(slimmable(residual_body(), NUM_CLASSES, DIMS))
    model.save(tmp_path / "slim.keras")
    loaded = keras.saving.load_model(tmp_path / "slim.keras")
    np.testing.assert_allclose(as_numpy(loaded(IMAGES)), as_numpy(model(IMAGES)), rtol=1e-6)


def test_the_backbone_is_left_alone() -> None:
    body = dense_body()
    before = [as_numpy(w) for w in body.weights]
    compiled(slimmable(body, NUM_CLASSES, DIMS)).fit(X, Y, verbose=0)
    for was, now in zip(before, body.weights, strict=True):
        np.testing.assert_array_equal(as_numpy(now), was)


def test_dims_that_end_elsewhere_are_refused() -> None:
    sentence = (
        "dims of a slimmable net must end at the width of its features. "
        "Received: dims=(2, 4) for features of width 8. Add 8."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        slimmable(dense_body(), NUM_CLASSES, (2, 4))


@pytest.mark.parametrize(
    "layer",
    [
        layers.Flatten(),
        layers.Reshape((8,)),
        layers.DepthwiseConv2D(1),
        layers.Conv2D(2, 1, groups=2),
    ],
)
def test_a_layer_that_cannot_be_made_narrower_is_refused(layer: keras.layers.Layer) -> None:
    body = keras.Sequential([keras.Input((2, 2, 2)), layer])
    sentence = (
        "slimmable knows dense layers, 2D convolutions, batch and layer normalization, and "
        f"layers without weights that keep units apart. Received: {layer!r} in the backbone. "
        "Pool where it flattens, add where it concatenates, and write out nested models."
    )
    with pytest.raises(TypeError, match=exactly(sentence)):
        slimmable(body, NUM_CLASSES, (body.output_shape[-1],))


def test_a_model_whose_layers_cannot_be_seen_is_refused() -> None:
    body = keras.Sequential([keras.layers.Dense(8)])
    sentence = (
        "slimmable needs a model whose layers it can see, with one output. "
        f"Received: {body!r}. Give a functional model, or a sequential one with an Input."
    )
    with pytest.raises(TypeError, match=exactly(sentence)):
        slimmable(body, NUM_CLASSES, DIMS)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_a_slimmable_convolution_is_one_of_sliced_kernels(share: float) -> None:
    layer = Slimmable(layers.Conv2D(8, 3, strides=2, padding="same", activation="relu"))
    layer(IMAGES)
    kernel, bias = (np.random.default_rng(2).normal(size=w.shape) for w in layer.get_weights())
    layer.set_weights([kernel, bias])
    units = int(8 * share)
    plain = layers.Conv2D(units, 3, strides=2, padding="same", activation="relu")
    plain.build((None, 4, 4, 1))
    plain.set_weights([kernel[:, :, :1, :units], bias[:units]])
    narrow = IMAGES[..., :1]
    received = as_numpy(layer(narrow, share=share))
    np.testing.assert_allclose(received, as_numpy(plain(narrow)), rtol=1e-5, atol=1e-6)
    symbolic = layer(keras.Input((4, 4, 1)), share=share)
    assert tuple(symbolic.shape) == (None, 2, 2, units)


def test_a_share_rounds_and_leaves_one_unit() -> None:
    layer = Slimmable(layers.Dense(6))
    layer(X)
    shares = (0.01, 0.25, 0.45, 1.0)
    assert [layer(X, share=s).shape[-1] for s in shares] == [1, 2, 3, 6]


def test_a_share_nobody_named_is_refused() -> None:
    layer = Switchable(layers.BatchNormalization(), shares=(0.5, 1))
    layer(X)
    sentence = (
        "share must be one of the shares of the layer. "
        "Received: share=0.25 for shares=(0.5, 1.0). Choose one of those."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        layer.call(X[:, :1], share=0.25)


def test_inputs_of_unknown_width_are_refused() -> None:
    sentence = (
        "Switchable needs inputs of a known width. Received: inputs of shape (None, None). "
        "Give the layer before it a fixed number of units."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        Switchable(layers.BatchNormalization(), shares=(1,)).build((None, None))


def test_the_regularizer_of_a_shared_kernel_is_charged_once() -> None:
    layer = Slimmable(layers.Dense(6, kernel_regularizer="l2"))
    layer(X)
    layer(X[:, :2], share=0.5)
    kernel = as_numpy(layer.layer.kernel)
    assert [float(as_numpy(loss)) for loss in layer.losses] == pytest.approx(
        [0.01 * (kernel**2).sum()]
    )


def test_statistics_of_a_training_call_move_alone() -> None:
    layer = Switchable(layers.BatchNormalization(), shares=(0.4, 1))
    layer(X)
    moving: list[Any] = [as_numpy(w) for w in layer.non_trainable_weights]
    layer(X[:, :2] + 3, share=0.4, training=True)
    now = [as_numpy(w) for w in layer.non_trainable_weights]
    moved = [not np.array_equal(a, b) for a, b in zip(moving, now, strict=True)]
    assert moved == [True, True, False, False]
