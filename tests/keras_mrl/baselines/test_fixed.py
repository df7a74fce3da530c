from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import MatryoshkaClassifier
from keras_mrl.baselines import fixed_features
from tests.helpers.laws import exactly
from tests.helpers.small_models import (
    NUM_CLASSES,
    X,
    Y,
    as_numpy,
    classifier,
    compiled,
    cross_entropy,
)

pytestmark = pytest.mark.backend


def body(dim: int) -> keras.Model:
    return keras.Sequential([keras.Input((5,)), keras.layers.Dense(dim)])


def train(model: MatryoshkaClassifier) -> None:
    compiled(model).fit(X, Y, epochs=2, batch_size=12, verbose=0)


def test_there_is_a_net_per_dim_each_as_if_trained_alone() -> None:
    initial: list[list[Any]] = []

    def watched(model: MatryoshkaClassifier) -> None:
        model(X)
        initial.append(model.get_weights())
        train(model)

    models = fixed_features(body, NUM_CLASSES, (2, 4), watched)
    assert [*models] == [2, 4]
    for (dim, model), weights in zip(models.items(), initial, strict=True):
        plain = keras.Sequential([*body(dim).layers, keras.layers.Dense(NUM_CLASSES)])
        plain.compile(keras.optimizers.SGD(0.1), cross_entropy())
        plain(X)
        plain.set_weights(weights)
        plain.fit(X, Y, epochs=2, batch_size=12, verbose=0)
        expected = plain.predict(X, verbose=0)
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(as_numpy(model(X))[:, 0], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(as_numpy(model.at(dim)(X)), expected, rtol=1e-4, atol=1e-5)


def test_the_recipe_is_that_of_a_nested_net() -> None:
    train(classifier())
    received: list[MatryoshkaClassifier] = []
    models = fixed_features(body, NUM_CLASSES, (2, 4), received.append)
    assert received == [*models.values()]


@pytest.mark.parametrize("width", [2, 8])
def test_a_backbone_of_another_width_is_refused_before_it_is_trained(width: int) -> None:
    sentence = (
        "make_backbone must return features of the width it is asked for. "
        f"Received: a backbone of width {width} for dim 4. End it with keras.layers.Dense(dim)."
    )
    trained: list[MatryoshkaClassifier] = []
    with pytest.raises(ValueError, match=exactly(sentence)):
        fixed_features(lambda _: body(width), NUM_CLASSES, (4,), trained.append)
    assert not trained


def test_dims_that_do_not_ascend_are_refused() -> None:
    sentence = (
        "dims must be strictly increasing positive integers. Received: dims=(4, 2). "
        "Sort them and drop repeats: dims=(2, 4)."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        fixed_features(body, NUM_CLASSES, (4, 2), train)
