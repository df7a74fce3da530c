"""Small backbones of keras-cv and keras-hub, for images of 32 x 32."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import pytest

SHAPE = (32, 32, 3)


def keras_cv() -> keras.Model:
    """Two blocks at least: with one, keras-cv gives two layers the same name."""
    models = imported("keras_cv").models
    return models.ResNetV2Backbone(
        stackwise_filters=[64],
        stackwise_blocks=[2],
        stackwise_strides=[1],
        block_type="basic_block",
        include_rescaling=True,
        input_shape=SHAPE,
    )


def keras_hub() -> keras.Model:
    models = imported("keras_hub").models
    return models.ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64],
        stackwise_num_blocks=[1],
        stackwise_num_strides=[1],
        block_type="basic_block",
        image_shape=SHAPE,
    )


def imported(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)
