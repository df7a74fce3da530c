"""EfficientNet-Lite0 as a functional Keras model, with weights carried over from PyTorch.

Lite0 is EfficientNet-B0 without squeeze-and-excitation, with ReLU6 in place of swish
(arXiv:1905.11946). A batch normalization that only infers is a scale and a shift per channel, so
each one is folded into the convolution before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

EPSILON = 1e-3  # of the batch normalizations that are folded
# Repeats, kernel, stride, expansion, filters of each stage.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def efficientnet_lite0(size: int) -> Any:
    """Return the net from images (size, size, 3) of 0 to 255 to a map of 1280 features."""
    import keras

    images = keras.Input((size, size, 3), name="image")
    x = keras.layers.Rescaling(1 / 128, -127 / 128, name="rescaling")(images)
    x = _convolved(x, 32, 3, 2, "stem")
    for stage, (repeats, kernel, stride, expansion, filters) in enumerate(STAGES, start=1):
        for repeat in range(repeats):
            name, before = _block(stage, repeat), x
            if expansion != 1:
                x = _convolved(x, expansion * x.shape[-1], 1, 1, f"{name}_expand")
            x = keras.layers.DepthwiseConv2D(
                kernel, 1 if repeat else stride, padding="same", name=f"{name}_depthwise"
            )(x)
            x = keras.layers.ReLU(max_value=6.0, name=f"{name}_depthwise_relu")(x)
            x = keras.layers.Conv2D(
                filters, 1, name=f"{name}_project" if repeat else f"{name}_out"
            )(x)
            if repeat:
                x = keras.layers.Add(name=f"{name}_out")([x, before])
    return keras.Model(images, _convolved(x, 1280, 1, 1, "top"), name="efficientnet_lite0")


def _block(stage: int, repeat: int) -> str:
    return f"stage{stage}_block{repeat + 1}"


def _convolved(x: Any, filters: int, kernel: int, stride: int, name: str) -> Any:
    import keras

    x = keras.layers.Conv2D(filters, kernel, stride, padding="same", name=name)(x)
    return keras.layers.ReLU(max_value=6.0, name=f"{name}_relu")(x)


def read_state(path: Path) -> dict[str, Any]:
    """Return the arrays of a PyTorch state dict."""
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    return {name: tensor.numpy() for name, tensor in state.items()}


def carry(model: Any, state: Mapping[str, Any]) -> None:
    """Give the net the weights of a state dict of `efficientnet_lite_pytorch`."""
    _fold(model.get_layer("stem"), state, "_conv_stem", "_bn0")
    block = 0
    for stage, (repeats, *_) in enumerate(STAGES, start=1):
        for repeat in range(repeats):
            name, own = _block(stage, repeat), f"_blocks.{block}"
            if f"{own}._expand_conv.weight" in state:
                expand = model.get_layer(f"{name}_expand")
                _fold(expand, state, f"{own}._expand_conv", f"{own}._bn0")
            depthwise = model.get_layer(f"{name}_depthwise")
            _fold(depthwise, state, f"{own}._depthwise_conv", f"{own}._bn1")
            project = model.get_layer(f"{name}_project" if repeat else f"{name}_out")
            _fold(project, state, f"{own}._project_conv", f"{own}._bn2")
            block += 1
    _fold(model.get_layer("top"), state, "_conv_head", "_bn1")


def _fold(layer: Any, state: Mapping[str, Any], convolution: str, normalization: str) -> None:
    gain, shift, mean, variance = (
        state[f"{normalization}.{part}"].astype(np.float64)
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    scale = gain / np.sqrt(variance + EPSILON)
    # PyTorch has (filters, inputs, height, width); a depthwise kernel has one input per filter.
    kernel = state[f"{convolution}.weight"].astype(np.float64) * scale[:, None, None, None]
    axes = (2, 3, 0, 1) if convolution.endswith("_depthwise_conv") else (2, 3, 1, 0)
    layer.set_weights([kernel.transpose(axes), shift - mean * scale])
