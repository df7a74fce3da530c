"""Slimmable networks: one net whose first units, in every layer, are a narrower net.

Kernels are shared by all widths (`Slimmable`); normalization is not (`Switchable`), because batch
statistics differ from width to width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from .._dims import check_dims

_SWITCHED = (keras.layers.BatchNormalization, keras.layers.LayerNormalization)
# Layers, and operations of keras.ops under the same names.
_MIXES_UNITS = {"Concatenate", "Flatten", "Permute", "Reshape", "Stack", "Transpose"}


def slimmable(backbone: keras.Model, num_classes: int, dims: Sequence[int]) -> keras.Model:
    """Return a slimmable classifier of the same architecture as `backbone`, newly initialised.

    For features of dim m every layer works with m / d of its units. All widths share the kernels,
    of which a narrower one uses the first rows and columns; every width has its own normalization.
    The model returns logits of every dim, as a `MatryoshkaHead` does, so a `MatryoshkaLoss` is the
    sum over widths that slimmable nets are trained on. Unlike with Matryoshka features, a small dim
    costs less in the backbone, too. The layer `features_<m>` returns the features of dim m.

    Args:
        backbone: A functional or sequential model of dense layers, 2D convolutions, batch or layer
            normalization, and layers without weights.
        num_classes: Number of classes.
        dims: Strictly increasing, the last one the width d of the backbone's features.

    Shapes:
        Output: `(batch, num_dims, num_classes)`.

    Raises:
        TypeError: If the backbone is no functional or sequential model with one output, or has a
            layer that cannot be made narrower.
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
    functional = keras.Model(inputs, backbone.outputs[0])  # a sequential model, too
    full = keras.models.clone_model(
        functional, clone_function=lambda layer: _make_slimmable(layer, shares)
    )
    head = Slimmable(keras.layers.Dense(num_classes), name=f"{backbone.name}_head")
    logits = []
    for dim, share in reversed([*zip(dims, shares, strict=True)]):  # the widest builds the layers
        features = keras.layers.Identity(name=f"features_{dim}")(_outputs_at(full, share))
        logits.append(head(features))
    stacked = keras.ops.stack(logits[::-1], axis=-2)
    return keras.Model(full.input, stacked, name=f"{backbone.name}_slimmable")


def _make_slimmable(layer: Any, shares: tuple[float, ...]) -> Any:
    """A copy of `layer` that works at every share; an operation such as `x + y` stays itself."""
    if _is_slimmable(layer):
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


def _outputs_at(full: keras.Model, share: float) -> Any:
    """The output of the layers of `full` on its inputs, at one share."""

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(layer, (Slimmable, Switchable)):
            kwargs = {**kwargs, "share": share}
        return layer(*args, **kwargs)

    return keras.models.clone_model(
        full,
        input_tensors=full.input,
        clone_function=lambda layer: layer,
        call_function=call,
    ).output


@keras.saving.register_keras_serializable(package="keras_mrl")
class Slimmable(keras.layers.Wrapper):
    """A dense layer or a 2D convolution whose first units serve every width.

    A call at a share returns that share of the units, for inputs of any width up to the full one.
    The first call builds the layer, so it must be at full width.

    Args:
        layer: A `keras.layers.Dense` or `keras.layers.Conv2D` of the full width.
        **kwargs: What every Keras layer takes (`name`, `dtype`).

    Shapes:
        Input: `(..., inputs)`, at most as many as at the first call.
        Output: `(..., share * units)`, spatial axes as the layer has them.

    Raises:
        TypeError: If `layer` is neither a dense layer nor a 2D convolution with the channels last.

    Reference:
        Yu et al., Slimmable Neural Networks, arXiv 1812.08928.

    Examples:
        >>> layer = Slimmable(keras.layers.Dense(8))
        >>> wide = layer(keras.ops.ones((1, 6)))
        >>> tuple(layer(keras.ops.ones((1, 3)), share=0.5).shape)
        (1, 4)
    """

    def __init__(self, layer: keras.layers.Layer, **kwargs: Any) -> None:
        if not _is_slimmable(layer):
            raise TypeError(
                "Slimmable makes a keras.layers.Dense or Conv2D (channels last, no groups) "
                f"narrower. Received: {layer!r}. Give a layer that has its own weights at every "
                "width to Switchable."
            )
        super().__init__(layer, **kwargs)
        self.supports_masking = True

    def call(self, inputs: Any, share: float = 1.0) -> Any:
        """Return the outputs of the first units, which use as many rows of the kernel as inputs."""
        layer = self.layer
        kernel = ops.convert_to_tensor(layer.kernel)
        units = _count_units(kernel.shape[-1], share)
        kernel = kernel[..., : inputs.shape[-1], :units]
        if isinstance(layer, keras.layers.Dense):
            outputs = ops.matmul(inputs, kernel)
        else:
            outputs = layer.convolution_op(inputs, kernel)
        if layer.use_bias:
            outputs = outputs + ops.convert_to_tensor(layer.bias)[:units]
        return outputs if layer.activation is None else layer.activation(outputs)

    def compute_output_spec(self, inputs: Any, share: float = 1.0) -> keras.KerasTensor:
        """Return the symbolic output of one share."""
        *shape, units = self.layer.compute_output_shape(inputs.shape)
        return keras.KerasTensor((*shape, _count_units(units, share)), dtype=self.compute_dtype)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """Return the shape at full width."""
        return tuple(self.layer.compute_output_shape(input_shape))


@keras.saving.register_keras_serializable(package="keras_mrl")
class Switchable(keras.layers.Wrapper):
    """A copy of one layer for every width, for what cannot be shared, such as batch statistics.

    Args:
        layer: A Keras layer that keeps the shape of its input, such as
            `keras.layers.BatchNormalization`. It is copied for every share and not used itself.
        shares: Parts of the full width, ascending to 1.
        **kwargs: What every Keras layer takes (`name`, `dtype`).

    Shapes:
        Input and output: `(..., share * units)`. The first call must be the one at full width.

    Raises:
        TypeError: If `layer` is not a Keras layer.
        ValueError: If `shares` do not ascend to 1. In a call: if the share is not among `shares`,
            or inputs have an unknown width.

    Reference:
        Yu et al., Slimmable Neural Networks, arXiv 1812.08928: switchable batch normalization.

    Examples:
        >>> layer = Switchable(keras.layers.BatchNormalization(), shares=(0.5, 1.0))
        >>> wide = layer(keras.ops.ones((2, 6)))
        >>> tuple(layer(keras.ops.ones((2, 3)), share=0.5).shape), len(layer.weights)
        ((2, 3), 8)
    """

    def __init__(self, layer: keras.layers.Layer, shares: Sequence[float], **kwargs: Any) -> None:
        if not isinstance(layer, keras.layers.Layer):
            raise TypeError(
                "Switchable copies a Keras layer. "
                f"Received: {layer!r}. Give an instance, e.g. keras.layers.BatchNormalization()."
            )
        super().__init__(layer, **kwargs)
        self.shares = _check_shares(shares)
        self.layers_by_share = [
            type(layer).from_config({**layer.get_config(), "name": f"{layer.name}_{index}"})
            for index in range(len(self.shares))
        ]
        self.supports_masking = True

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Create the weights of every width; `input_shape` is that of the full one."""
        *shape, units = input_shape
        if units is None:
            raise ValueError(
                "Switchable needs inputs of a known width. "
                f"Received: inputs of shape {tuple(input_shape)}. "
                "Give the layer before it a fixed number of units."
            )
        for share, layer in zip(self.shares, self.layers_by_share, strict=True):
            layer.build((*shape, _count_units(units, share)))

    def call(self, inputs: Any, share: float = 1.0, mask: Any = None) -> Any:
        """Return the outputs of the copy of this share."""
        del mask  # Keras carries masks on the tensors themselves
        if share not in self.shares:
            raise ValueError(
                "share must be one of the shares of the layer. "
                f"Received: share={share!r} for shares={self.shares}. Choose one of those."
            )
        return self.layers_by_share[self.shares.index(share)](inputs)

    def compute_output_shape(self, input_shape: Sequence[int | None]) -> tuple[int | None, ...]:
        """Return the shape of the input."""
        return tuple(input_shape)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this layer again."""
        return {**super().get_config(), "shares": self.shares}


def _check_shares(shares: Sequence[float]) -> tuple[float, ...]:
    checked = tuple(float(share) for share in shares)
    ascends = all(a < b for a, b in zip((0.0, *checked), checked, strict=False))
    if not checked or not ascends or checked[-1] != 1:
        raise ValueError(
            "shares must ascend from above 0 to 1. "
            f"Received: shares={checked}. Divide the dims by the widest: (0.25, 0.5, 1.0)."
        )
    return checked


def _count_units(units: int, share: float) -> int:
    """Return how many of `units` are used at a share of the width: rounded, and at least one."""
    return max(1, round(units * share))


def _is_slimmable(layer: Any) -> bool:
    """Whether the first units of `layer` can be computed alone."""
    if type(layer) is keras.layers.Conv2D:  # a subclass may compute something else
        return layer.data_format == "channels_last" and layer.groups == 1
    return type(layer) is keras.layers.Dense
