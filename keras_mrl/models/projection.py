"""An orthogonal projection at the end of an encoder, folded into a last layer that is linear."""

from __future__ import annotations

import keras
import numpy as np

from .._arrays import Array
from .cut import check_one_vector, copy_of, split
from .outputs import graph_of, not_built_error


def projection_layer(components: Array, name: str = "matryoshka_projection") -> keras.layers.Dense:
    """Return a projection as a built layer without bias, frozen: `(..., width)` to `(..., number)`.

    Args:
        components: Orthonormal directions `(number, width)`, one a row.
        name: Of the layer.

    Examples:
        >>> from keras_mrl.models.projection import projection_layer
        >>> projection_layer(np.float32([[0.6, 0.8]]))(keras.ops.ones((1, 2))).shape[1]
        1
    """
    layer = keras.layers.Dense(len(components), use_bias=False, trainable=False, name=name)
    layer.build((None, components.shape[1]))
    layer.set_weights([components.T])
    return layer


def fold(model: keras.Model, components: Array) -> keras.Model:
    """Return an encoder whose embeddings are those of `model`, projected.

    It shares nothing with `model`.

    Args:
        model: A built model from inputs to embeddings `(batch, width)`.
        components: Orthonormal directions `(number, width)`, one a row.

    Raises:
        ValueError: If `model` was not built, or its embeddings are of another width.

    Examples:
        >>> from keras_mrl.models.projection import fold
        >>> encoder = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
        >>> folded = fold(encoder, np.eye(3, dtype="float32")[:2])
        >>> [layer.units for layer in folded.layers if isinstance(layer, keras.layers.Dense)]
        [2]
    """
    backbone, _ = split(model)
    if not backbone.built:
        raise not_built_error(model)
    check_one_vector(model, backbone)
    inputs, tensors = graph_of(copy_of(backbone))
    (output,) = tensors.values()
    if output.shape[-1] != components.shape[1]:
        raise ValueError(
            "An encoder's embeddings must be as wide as those the adaptor was fitted to. "
            f"Received: {output.shape[-1]} of {model.name!r} for a projection of width "
            f"{components.shape[1]}. Fit the adaptor to embeddings of this encoder."
        )
    name = f"{model.name}_projected"
    last = output._keras_history.operation
    is_dense = isinstance(last, keras.layers.Dense)
    if not is_dense or last.activation is not keras.activations.linear:
        return keras.Model(inputs, projection_layer(components)(output), name=name)
    folded = keras.layers.Dense(len(components), use_bias=last.use_bias, name=last.name)
    node = last._inbound_nodes[output._keras_history.node_index]
    outputs = folded(node.input_tensors[0])
    folded.set_weights(
        [
            (keras.ops.convert_to_numpy(weight).astype(np.float64) @ components.T).astype("float32")
            for weight in ((last.kernel, last.bias) if last.use_bias else (last.kernel,))
        ]
    )
    return keras.Model(inputs, outputs, name=name)
