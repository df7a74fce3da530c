"""The models of `benchmarks/serving.py`: heads of class prototypes, heavy layers, a ResNet-50."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
from prototypes import DIMS, Prototypes

from keras_mrl import MatryoshkaHead
from keras_mrl_export import export_saved_model

IMAGE = 224
_LITTLE = 1e-6  # what the untrained net's answer weighs


def prototype_head(data: Prototypes) -> keras.Model:
    """A tied head alone: features in, logits out."""
    features = keras.Input((DIMS[-1],), name="code")
    return _with_head(data, features, features)


def behind_resnet(data: Prototypes, small: bool) -> tuple[keras.Model, Any]:
    """The same head behind a ResNet-50, and one image for it."""
    image, code = (
        keras.Input((IMAGE, IMAGE, 3), name="image"),
        keras.Input((DIMS[-1],), name="code"),
    )
    seen = keras.layers.Dense(DIMS[-1])(_resnet(small)(image))
    features = keras.layers.Add()([code, keras.layers.Rescaling(_LITTLE)(seen)])
    return _with_head(data, {"image": image, "code": code}, features), _images(1)


def resnet_encoder() -> tuple[keras.Model, Any]:
    """A ResNet-50 that embeds, and two images."""
    image = keras.Input((IMAGE, IMAGE, 3), name="image")
    return keras.Model(image, keras.layers.Dense(DIMS[-1])(_resnet(False)(image))), _images(2)


def heavy_layers(width: int, layers: int) -> tuple[keras.Model, Any]:
    """Dense layers and 64 rows for them: at one row a call, reading the weights is all the work."""
    inputs = keras.Input((width,))
    x = inputs
    for _ in range(layers):
        x = keras.layers.Dense(width, activation="relu")(x)
    rows = np.random.default_rng(0).normal(size=(64, width)).astype(np.float32)
    return keras.Model(inputs, keras.layers.Dense(DIMS[-1])(x)), rows


def export(model: keras.Model, base_path: Path, sample: Any, **arguments: Any) -> None:
    """Publish a version."""
    export_saved_model(model, base_path, sample, **arguments)


def _with_head(data: Prototypes, inputs: Any, features: Any) -> keras.Model:
    head = MatryoshkaHead(len(data.points), DIMS, tied=True, use_bias=False)
    model = keras.Model(inputs, head(features))
    head.set_weights([data.points.T])
    return model


def _resnet(small: bool) -> keras.Model:
    if small:  # as quick as a benchmark that only has to run
        return keras.Sequential([keras.layers.GlobalAveragePooling2D()])
    return keras.applications.ResNet50(
        weights=None, include_top=False, pooling="avg", input_shape=(IMAGE, IMAGE, 3)
    )


def _images(count: int) -> Any:
    return np.random.default_rng(0).uniform(size=(count, IMAGE, IMAGE, 3)).astype(np.float32)
