"""Backbones of others, from their constructor to a trained, cut and saved classifier.

One of them on every backend: the others differ in their own code, not in ours.
"""

from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead
from tests.helpers.small_models import NUM_CLASSES, accuracy, as_numpy, compiled
from tests.helpers.vision_backbones import SHAPE, keras_cv, keras_hub

# What these packages do at import and at load is theirs.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*compile.* was not called as part of model loading"),
]

DIMS = (2, 4, 8)
IMAGES = np.random.default_rng(0).uniform(0, 255, size=(12, *SHAPE)).astype("float32")
LABELS = np.arange(12) % NUM_CLASSES


def pooled(body: keras.Model) -> keras.Model:
    return keras.Sequential([body, layers.GlobalAveragePooling2D(), layers.Dense(DIMS[-1])])


def classifier(body: keras.Model) -> MatryoshkaClassifier:
    model = MatryoshkaClassifier(body, MatryoshkaHead(NUM_CLASSES, dims=DIMS))
    return compiled(model, optimizer=keras.optimizers.Adam(0.01), metrics=[accuracy(DIMS)])


@pytest.mark.parametrize("make", [keras_cv, pytest.param(keras_hub, marks=pytest.mark.backend)])
def test_a_convolutional_backbone_trains_is_cut_and_saved(
    make: Callable[[], keras.Model], tmp_path: Path
) -> None:
    body = make()
    model = classifier(pooled(body))
    before = [as_numpy(w) for w in body.trainable_weights]
    log = model.fit(IMAGES, LABELS, batch_size=12, epochs=2, verbose=0).history
    assert log["loss"][-1] < log["loss"][0]
    after = [as_numpy(w) for w in body.trainable_weights]
    assert not any(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    logits = model.predict(IMAGES, verbose=0)
    np.testing.assert_allclose(
        model.at(4).predict(IMAGES, verbose=0), logits[:, 1], rtol=1e-4, atol=1e-5
    )
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.predict(IMAGES, verbose=0), logits, rtol=1e-5, atol=1e-5)


def test_one_of_kerass_applications_pools_itself_and_stays_frozen() -> None:
    body = keras.applications.VGG16(
        include_top=False, weights=None, input_shape=SHAPE, pooling="avg"
    )
    body.trainable = False
    projection = layers.Dense(DIMS[-1])
    model = classifier(keras.Sequential([keras.Input(SHAPE), body, projection]))
    before = [as_numpy(w) for w in (body.weights[0], *projection.weights)]
    model.fit(IMAGES / 255, LABELS, batch_size=12, verbose=0)
    after = [as_numpy(w) for w in (body.weights[0], *projection.weights)]
    moved = [not np.array_equal(a, b) for a, b in zip(before, after, strict=True)]
    assert moved == [False, True, True]
    logits = model.predict(IMAGES / 255, verbose=0)
    cut = model.at(2).predict(IMAGES / 255, verbose=0)
    np.testing.assert_allclose(cut, logits[:, 0], rtol=1e-4, atol=1e-5)


def test_without_pooling_the_classifier_says_what_to_add() -> None:
    body = keras.Sequential([keras.Input(SHAPE), layers.Conv2D(8, 3)])
    with pytest.raises(ValueError, match=r"Add a pooling layer: .*GlobalAveragePooling2D"):
        classifier(body).build((None, *SHAPE))
