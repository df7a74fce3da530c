"""Batch normalizations that stand right behind a convolution become part of its kernel.

Served, a batch normalization is a scale and a shift per channel, and so are the kernel and the bias
of a convolution. The server then reads and writes each feature map once instead of three times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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
    others = _used_besides(layers)
    folded = 0
    for layer in layers:
        convolution = _convolution_before(layer)
        if convolution is not None and others.isdisjoint(
            id(own) for own in (convolution, layer, convolution.kernel, *_outputs(convolution))
        ):
            _fold(convolution, layer)
            folded += 1
    return folded


def _used_besides(layers: Sequence[Any]) -> set[int]:
    """Return ids of what is used in another way than by the layers' graphs of calls.

    These are the outputs of models, layers that a layer calls by itself or that compute as in
    training, and weights that two layers hold.
    """
    used: list[Any] = []
    for own in layers:
        if not _runs_its_graph(own):
            used += own._layers
        if isinstance(own, keras.Model):
            used += getattr(own, "outputs", None) or ()
        if any(node.arguments.kwargs.get("training") for node in own._inbound_nodes):
            used += own._flatten_layers()
    weights = (
        id(weight)
        for own in layers
        for weight in (*own._trainable_variables, *own._non_trainable_variables)
    )
    shared = {weight for weight, number in Counter(weights).items() if number > 1}
    return shared | {id(own) for own in used}


def _runs_its_graph(layer: Any) -> bool:
    """Whether a layer is a functional or sequential model without a `call` of its own."""
    return isinstance(layer, keras.Model) and type(layer).call.__module__.startswith("keras.")


def _convolution_before(layer: Any) -> Any:
    """Return the convolution that a batch normalization, and nothing else, reads; or None."""
    if type(layer) is not keras.layers.BatchNormalization or not layer._inbound_nodes:
        return None
    read = {id(node.input_tensors[0]) for node in layer._inbound_nodes}
    own = layer._inbound_nodes[0].input_tensors[0]._keras_history.operation
    if type(own) not in _CONVOLUTIONS or own.data_format != "channels_last":
        return None
    is_plain = own.activation is keras.activations.linear and own.quantization_mode is None
    is_plain = is_plain and not getattr(own, "lora_enabled", False)
    is_plain = is_plain and {own.dtype_policy.name, layer.dtype_policy.name} == {"float32"}
    # A layer that is called twice is called twice by both.
    is_read_alone = read == {id(tensor) for tensor in _outputs(own)}
    is_read_alone = is_read_alone and all(node.operation is layer for node in own._outbound_nodes)
    return own if is_plain and is_read_alone and layer.axis in (-1, 3) else None


def _outputs(layer: Any) -> list[Any]:
    return [tensor for node in layer._inbound_nodes for tensor in node.outputs]


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
