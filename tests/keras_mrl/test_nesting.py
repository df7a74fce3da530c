"""Why to train nested, on real images: what is learned does not depend on the backend.

That a model trains on every backend is in `test_laws.py`; that it trains alike again is here.
"""

import warnings
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, freeze_before
from tests.helpers import digits
from tests.helpers.small_models import as_numpy, compiled


def by_dim(model: MatryoshkaClassifier) -> dict[int, float]:
    gallery, queries = (digits.features(model, rows) for rows in (digits.TRAIN, digits.TEST))
    return {d: digits.nearest_accuracy(gallery[:, :d], queries[:, :d]) for d in digits.DIMS}


def test_small_dims_beat_the_first_coordinates_of_a_net_that_was_not_nested() -> None:
    """On digits 2 dims tell them apart: of 8 random directions any will do (96%)."""
    ours, first = by_dim(digits.trained()), by_dim(digits.trained(dims=(digits.WIDTH,)))
    assert first[2] < 0.55
    assert ours[2] > first[2] + 0.2
    assert ours[4] > first[4] + 0.02
    assert ours[64] > first[64] - 0.02  # and the full width pays next to nothing for it


def test_every_dim_of_one_net_classifies() -> None:
    logits = digits.trained().predict(digits.X[digits.TEST], batch_size=1000, verbose=0)
    right = (logits.argmax(-1) == digits.Y[digits.TEST][:, None]).mean(0)
    assert right[0] > 0.8
    assert (right[1:] > 0.93).all()


@pytest.mark.backend
def test_a_seed_gives_the_same_weights_again() -> None:
    def weights(seed: int) -> list[Any]:
        keras.utils.set_random_seed(seed)
        return digits.learn(digits.nested(dims=(2, 8)), epochs=1).get_weights()

    first, again, other = weights(3), weights(3), weights(4)
    assert len(first) == 8
    for one, same, different in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(one, same)
        assert not np.array_equal(one, different)


RECIPE_DIMS = (2, 64)
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
    is_old = digits.Y[digits.TRAIN] < 5
    compiled(model, optimizer=keras.optimizers.Adam(0.01))
    x, y = digits.X[digits.TRAIN][is_old], digits.Y[digits.TRAIN][is_old]
    model.fit(x, y, batch_size=100, epochs=15, verbose=0)
    return body


def accuracy_after(recipe: str, body: keras.Model, epochs: int) -> dict[int, float]:
    if recipe in RECIPES[:2]:
        body.trainable = False
    if recipe == "the last blocks":
        freeze_before(body, "block2")
    if recipe == "a projection":
        body = keras.Sequential([keras.Input((64,)), body, layers.Dense(64)])
    model = MatryoshkaClassifier(body, MatryoshkaHead(10, dims=RECIPE_DIMS))
    compiled(model, optimizer=keras.optimizers.Adam(0.01))
    with warnings.catch_warnings():
        if recipe == "new heads alone":
            warnings.filterwarnings("ignore", message="A Matryoshka head needs features")
        model.fit(digits.X[digits.TRAIN], digits.Y[digits.TRAIN], 100, epochs, verbose=0)
    logits = as_numpy(model(digits.X[digits.TEST]))
    right = (logits.argmax(-1) == digits.Y[digits.TEST][:, None]).mean(0)
    return dict(zip(RECIPE_DIMS, right.tolist(), strict=True))


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
