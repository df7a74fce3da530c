import warnings

import keras
import numpy as np
import pytest
from keras import layers

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, freeze_before
from tests.helpers import digits
from tests.helpers.laws import exactly
from tests.helpers.small_models import X, Y, as_numpy, classifier, compiled

pytestmark = pytest.mark.backend

DIMS = (2, 64)
RECIPES = ("new heads alone", "a projection", "the last blocks", "all of it")


def pretrained() -> keras.Model:
    """Three blocks that learned digits 0 to 4 at full width; 5 to 9 are new to them."""
    body = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(64, activation="relu", name="block1"),
            layers.Dense(64, activation="relu", name="block2"),
            layers.Dense(64, name="block3"),
        ]
    )
    model = MatryoshkaClassifier(body, MatryoshkaHead(5, dims=(64,)))
    known = digits.Y[digits.TRAIN] < 5
    compiled(model, optimizer=keras.optimizers.Adam(0.01))
    x, y = digits.X[digits.TRAIN][known], digits.Y[digits.TRAIN][known]
    model.fit(x, y, batch_size=100, epochs=15, verbose=0)
    return body


def accuracy_after(recipe: str, body: keras.Model, epochs: int) -> dict[int, float]:
    if recipe in RECIPES[:2]:
        body.trainable = False
    if recipe == "the last blocks":
        freeze_before(body, "block2")
    if recipe == "a projection":
        body = keras.Sequential([keras.Input((64,)), body, layers.Dense(64)])
    model = MatryoshkaClassifier(body, MatryoshkaHead(10, dims=DIMS))
    compiled(model, optimizer=keras.optimizers.Adam(0.01))
    with warnings.catch_warnings():
        if recipe == "new heads alone":
            warnings.filterwarnings("ignore", message="A Matryoshka head needs features")
        model.fit(digits.X[digits.TRAIN], digits.Y[digits.TRAIN], 100, epochs, verbose=0)
    logits = as_numpy(model(digits.X[digits.TEST]))
    right = (logits.argmax(-1) == digits.Y[digits.TEST][:, None]).mean(0)
    return dict(zip(DIMS, right.tolist(), strict=True))


def test_which_recipes_nest_a_net_that_was_not() -> None:
    keras.utils.set_random_seed(0)
    source = pretrained()
    accuracy = {}
    for recipe in RECIPES:
        body = keras.models.clone_model(source)
        body.set_weights(source.get_weights())
        accuracy[recipe] = accuracy_after(recipe, body, epochs=10)
    heads, projection, last, everything = (accuracy[recipe][2] for recipe in RECIPES)
    assert heads < 0.55
    assert projection > heads + 0.02
    assert last > projection + 0.05
    assert everything > last + 0.02
    assert everything > heads + 0.3
    assert accuracy["all of it"][64] > 0.93


def test_what_comes_before_stays_and_what_comes_after_moves() -> None:
    names = ("first", "second", "third")
    body = keras.Sequential([keras.Input((5,)), *(layers.Dense(8, name=n) for n in names)])
    body.trainable = False
    freeze_before(body, "second")
    assert [layer.trainable for layer in body.layers] == [False, True, True]
    before = [as_numpy(w) for w in body.weights]
    classifier(body).fit(X, Y, verbose=0)
    moved = [not np.array_equal(as_numpy(w), b) for w, b in zip(body.weights, before, strict=True)]
    assert moved == [False, False, True, True, True, True]


def test_frozen_batch_statistics_stay() -> None:
    body = keras.Sequential(
        [
            keras.Input((5,)),
            layers.BatchNormalization(name="early"),
            layers.Dense(8, name="late"),
            layers.BatchNormalization(name="last"),
        ]
    )
    freeze_before(body, "late")
    before = [as_numpy(body.get_layer(name).moving_mean) for name in ("early", "last")]
    classifier(body).fit(X, Y, verbose=0)
    after = [as_numpy(body.get_layer(name).moving_mean) for name in ("early", "last")]
    assert np.array_equal(after[0], before[0])
    assert not np.array_equal(after[1], before[1])


def test_the_first_layer_freezes_nothing() -> None:
    body = keras.Sequential([keras.Input((5,)), layers.Dense(8, name="first")])
    freeze_before(body, "first")
    assert len(body.trainable_weights) == 2


def test_a_layer_that_is_not_there_is_refused() -> None:
    body = keras.Sequential([keras.Input((5,)), layers.Dense(8, name="first")], name="body")
    sentence = (
        "layer must be the name of one of the backbone's layers. "
        "Received: layer='block5' for 'body', whose last layers are ['first']. "
        "Print [layer.name for layer in backbone.layers]."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        freeze_before(body, "block5")
