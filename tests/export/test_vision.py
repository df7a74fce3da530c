"""A ResNetV2 of keras-cv, trained on JAX: every signature through gRPC is the model."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, MatryoshkaLoss
from keras_mrl_export import export_saved_model
from keras_mrl_serving import CascadePolicy, Client
from keras_mrl_serving.server import DevServer
from tests.helpers import export_models as models
from tests.helpers.export_models import (
    DIMS,
    NUM_CLASSES,
    TEMPERATURES,
    TOP_K,
    Arrays,
    assert_equal_rows,
)
from tests.keras_mrl.test_vision import SHAPE, keras_cv

pytestmark = [
    pytest.mark.backend,
    pytest.mark.skipif(keras.backend.backend() != "jax", reason="one backend's time is enough"),
    # What keras-cv does at import and at load is its own.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

IMAGES = np.random.default_rng(0).uniform(0, 255, size=(16, *SHAPE)).astype("float32")
LABELS = np.arange(16) % NUM_CLASSES


def resnet() -> keras.Model:
    return keras.Sequential(
        [keras_cv(), keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(DIMS[-1])]
    )


@dataclass(frozen=True)
class Served:
    """What the Keras model makes of the images, and a client of its version."""

    features: Any
    logits: Any
    policy: CascadePolicy
    client: Client


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    backbone = resnet()
    model = MatryoshkaClassifier(backbone, MatryoshkaHead(NUM_CLASSES, DIMS), name="resnet")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01), MatryoshkaLoss(loss))
    model.fit(IMAGES, LABELS, batch_size=len(IMAGES), verbose=0)
    logits = np.asarray(model.predict(IMAGES, verbose=0))
    policy = models.halving_policy(logits)
    base_path = tmp_path_factory.mktemp("resnet")
    export_saved_model(model, base_path, IMAGES, policy, top_k=TOP_K)
    features = np.asarray(backbone.predict(IMAGES, verbose=0))
    with DevServer(base_path) as target, Client(target) as client:
        yield Served(features, logits, policy, client)


def expected(served: Served) -> dict[str, tuple[Arrays, Arrays]]:
    """By signature, what it is sent and what it must answer."""
    (name,) = served.client.describe().inputs
    sent = {name: IMAGES}
    known = {"features": (sent, {"features": served.features})}
    for index, dim in enumerate(DIMS):
        prefix, logits = served.features[:, :dim], served.logits[:, index]
        scaled = prefix / np.linalg.norm(prefix, axis=-1, keepdims=True)
        classes = models.classification(logits, TEMPERATURES[dim], TOP_K, names=False)
        known[f"embed_{dim}"] = sent, {"embedding": scaled}
        known[f"classify_{dim}"] = sent, classes
        known[f"head_{dim}"] = {"features": prefix}, {**classes, "logits": logits}
    known["classify_adaptive"] = (
        sent,
        models.cascade(served.logits, served.policy, TOP_K, names=False),
    )
    known["serving_default"] = known[f"classify_{DIMS[-1]}"]
    return known


def test_every_signature_is_the_model(served: Served) -> None:
    known = expected(served)
    assert set(served.client.signatures()) - {"__saved_model_init_op"} == {*known, "describe"}
    for signature, (sent, answer) in known.items():
        found = served.client.predict(sent, signature)
        assert set(found) == set(answer), signature
        for output, array in found.items():
            assert_equal_rows(array, answer[output])
    assert served.client.describe().made_with["trained_on"] == "jax"


def test_images_leave_the_cascade_at_every_dim(served: Served) -> None:
    dims, counts = np.unique(served.client.classify_adaptive(IMAGES).dim, return_counts=True)
    assert dict(zip(dims.tolist(), counts.tolist(), strict=True)) == dict(
        zip(DIMS, (8, 4, 4), strict=True)
    )
