"""Slimmable networks: one net whose first units, in every layer, are a narrower net."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from .._dims import check_dims
from .slimmable_layers import Slimmable, Switchable, is_slimmable

_SWITCHED = (keras.layers.BatchNormalization, keras.layers.LayerNormalization)
# Layers, and operations of keras.ops of the same names.
_MIXES_UNITS = {"Concatenate", "Flatten", "Permute", "Reshape", "Stack", "Transpose"}


def slimmable(backbone: keras.Model, num_classes: int, dims: Sequence[int]) -> keras.Model:
    """Return a slimmable classifier of the same architecture as `backbone`, newly initialised.

    For features of dim m every layer works with m / d of its units: widths share all kernels, the
    narrower using the first rows and columns, and every width has normalization of its own. The
    model gives logits of every dim, as a `MatryoshkaHead` does, so a `MatryoshkaLoss` is the sum
    over widths that slimmable nets are trained by. Unlike Matryoshka features, a small dim costs
    less in the backbone, too. The features of a dim m are the output of the layer `features_<m>`.

    Args:
        backbone: A functional or sequential model of dense layers, 2D convolutions, batch or layer
            normalization, and layers without weights.
        num_classes: Number of classes.
        dims: Strictly increasing, the last one the width d of the backbone's features.

    Shapes:
        Output: `(batch, num_dims, num_classes)`.

    Raises:
        TypeError: If the backbone is no such model, or has a layer that cannot be made narrower.
        ValueError: If `dims` do not end at the width of the features.

    Reference:
        Yu et al., Slimmable Neural Networks, arXiv 1812.08928; the baseline of Kusupati et al.

    Examples:
        >>> hidden = [keras.layers.Dense(16), keras.layers.BatchNormalization()]
        >>> backbone = keras.Sequential([keras.Input((20,)), *hidden, keras.layers.Dense(8)])
        >>> model = slimmable(backbone, num_classes=10, dims=(2, 4, 8))
        >>> model.output_shape
        (None, 3, 10)
        >>> keras.Model(model.input, model.get_layer("features_4").output).output_shape
        (None, 4)
    """
    if len(getattr(backbone, "outputs", None) or ()) != 1:
        raise TypeError(
            "slimmable needs a model whose layers it can see, with one output. "
            f"Received: {backbone!r}. Give a functional model, or a sequential one with an Input."
        )
    dims = check_dims(dims)
    width = backbone.output_shape[-1]
    if dims[-1] != width:
        raise ValueError(
            "dims of a slimmable net must end at the width of its features. "
            f"Received: dims={dims} for features of width {width}. Add {width}."
        )
    shares = tuple(dim / width for dim in dims)
    inputs = backbone.inputs[0] if len(backbone.inputs) == 1 else backbone.input
    visible = keras.Model(inputs, backbone.outputs[0])  # a sequential model as a functional one
    full = keras.models.clone_model(visible, clone_function=lambda layer: _slim(layer, shares))
    head = Slimmable(keras.layers.Dense(num_classes), name=f"{backbone.name}_head")
    logits = []
    for dim, share in reversed([*zip(dims, shares, strict=True)]):  # the widest builds the layers
        features = keras.layers.Identity(name=f"features_{dim}")(_at(full, share))
        logits.append(head(features))
    stacked = keras.ops.stack(logits[::-1], axis=-2)
    return keras.Model(full.input, stacked, name=f"{backbone.name}_slimmable")


def _slim(layer: Any, shares: tuple[float, ...]) -> Any:
    """What does as `layer` does, at every share; an operation such as `x + y` is its own."""
    if is_slimmable(layer):
        return Slimmable(_copy(layer), name=layer.name, dtype=layer.dtype_policy)
    if isinstance(layer, _SWITCHED):
        return Switchable(_copy(layer), shares, name=layer.name, dtype=layer.dtype_policy)
    if getattr(layer, "weights", None) or type(layer).__name__ in _MIXES_UNITS:
        raise TypeError(
            "slimmable knows dense layers, 2D convolutions, batch and layer normalization, and "
            f"layers without weights that keep units apart. Received: {layer!r} in the backbone. "
            "Pool where it flattens, add where it concatenates, and write out nested models."
        )
    return _copy(layer) if isinstance(layer, keras.layers.Layer) else layer


def _copy(layer: keras.layers.Layer) -> keras.layers.Layer:
    return type(layer).from_config(layer.get_config())


def _at(full: keras.Model, share: float) -> Any:
    """The output of the same layers on the same inputs, at one share."""

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        at = {"share": share} if isinstance(layer, (Slimmable, Switchable)) else {}
        return layer(*args, **{**kwargs, **at})

    return keras.models.clone_model(
        full,
        input_tensors=full.input,
        clone_function=lambda layer: layer,
        call_function=call,
    ).output
