"""Encoded images, a decoder of them, and a model of their pixels."""

from __future__ import annotations

import io
from typing import Any

import keras
import numpy as np
from PIL import Image

from keras_mrl import MatryoshkaHead
from keras_mrl_export import ImageDecoder
from tests.helpers.export_models import of_one_class

DECODER = ImageDecoder(height=6, width=5, scale=1 / 255)


def encoded(pixels: Any, image_format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format)
    return file.getvalue()


RNG = np.random.default_rng(0)
EXACT = [RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8) for _ in range(4)]
SMOOTH = np.add.outer(np.arange(60), np.arange(40))[..., None].repeat(3, -1).astype(np.uint8)


def model_of_images() -> keras.Model:
    inputs = keras.Input((6, 5, 3), name="image")
    features = keras.layers.Dense(8)(keras.layers.Flatten()(inputs))
    return of_one_class(keras.Model(inputs, MatryoshkaHead(3, dims=(2, 8))(features), name="eyes"))
