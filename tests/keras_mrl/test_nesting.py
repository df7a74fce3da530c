"""What Matryoshka training is for, on real images, and that it can be done again."""

from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import MatryoshkaClassifier
from tests.helpers import digits

pytestmark = pytest.mark.backend


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


def test_a_seed_gives_the_same_weights_again() -> None:
    def weights(seed: int) -> list[Any]:
        keras.utils.set_random_seed(seed)
        return digits.learn(digits.nested(dims=(2, 8)), epochs=1).get_weights()

    first, again, other = weights(3), weights(3), weights(4)
    assert len(first) == 8
    for one, same, different in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(one, same)
        assert not np.array_equal(one, different)
