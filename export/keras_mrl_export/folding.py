"""Batch normalizations that stand right behind a convolution become part of its kernel.

Served, a batch normalization is a scale and a shift per channel, and so are the kernel and the bias
of a convolution. The server then reads and writes each feature map once instead of three times.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

_CONVOLUTIONS = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)


def fold_normalizations(model: keras.Model) -> int:
    """Fold batch normalizations into the convolutions before them, and return how many.

    The layers of the model are changed in place, and then compute the same only at inference.

    Args:
        model: A model on the TensorFlow backend that nobody else holds.

    Examples:
        >>> layers = [keras.layers.Conv2D(2, 3), keras.layers.BatchNormalization()]
        >>> model = keras.Sequential([keras.Input((8, 8, 3)), *layers])
        >>> images = np.ones((1, 8, 8, 3), "float32")
        >>> before = model(images)
        >>> fold_normalizations(model), bool(np.allclose(model(images), before, atol=1e-5))
        (1, True)
    """
    layers = [model, *model._flatten_layers(include_self=False)]
    ends = {
        id(tensor)
        for own in layers
        if isinstance(own, keras.Model) and getattr(own, "outputs", None)
        for tensor in own.outputs
    }
    folded = 0
    for layer in layers:
        convolution = _convolution_before(layer, ends)
        if convolution is not None:
            _fold(convolution, layer)
            folded += 1
    return folded


def _convolution_before(layer: Any, ends: set[int]) -> Any:
    """Return the convolution that a batch normalization, and nothing else, reads; or None."""
    if type(layer) is not keras.layers.BatchNormalization or not layer._inbound_nodes:
        return None
    nodes = layer._inbound_nodes
    own = nodes[0].input_tensors[0]._keras_history.operation
    if type(own) not in _CONVOLUTIONS or own.data_format != "channels_last":
        return None
    is_plain = own.activation is keras.activations.linear and own.quantization_mode is None
    is_plain = is_plain and not getattr(own, "lora_enabled", False)
    is_plain = is_plain and {own.dtype_policy.name, layer.dtype_policy.name} == {"float32"}
    trains = any(node.arguments.kwargs.get("training") for node in nodes)
    # A layer that is called twice is called twice by both.
    reads = [node.operation for node in own._outbound_nodes]
    is_read_alone = len(own._inbound_nodes) == len(nodes) and all(one is layer for one in reads)
    is_end = any(id(tensor) in ends for node in own._inbound_nodes for tensor in node.outputs)
    by_channel = layer.axis in (-1, 3) and not trains
    return own if is_plain and is_read_alone and by_channel and not is_end else None


def _fold(convolution: Any, normalization: Any) -> None:
    scale = 1 / np.sqrt(_values(normalization.moving_variance) + normalization.epsilon)
    if normalization.scale:
        scale *= _values(normalization.gamma)
    shift = -_values(normalization.moving_mean) * scale
    if normalization.center:
        shift += _values(normalization.beta)
    kernel = convolution.kernel
    is_by_input = isinstance(convolution, keras.layers.DepthwiseConv2D)
    factors = scale.reshape(kernel.shape[2:]) if is_by_input else scale
    kernel.assign(_values(kernel) * factors)
    if convolution.use_bias:
        shift += _values(convolution.bias) * scale
    else:  # as Keras adds the weights of LoRA
        convolution._tracker.unlock()
        convolution.use_bias = True
        convolution.bias = convolution.add_weight(name="bias", shape=shift.shape)
        convolution._tracker.lock()
    convolution.bias.assign(shift)
    normalization.call = _same


def _same(inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
    del training, mask
    return inputs


def _values(variable: Any) -> Any:
    return np.asarray(keras.ops.convert_to_numpy(variable), np.float64)
