"""Parts and shapes of models: the base of the classifier and the encoder."""

from __future__ import annotations

from typing import Any

import keras

from ..layers import MatryoshkaHead


class HasParts:
    """A model that `split` can take apart without importing its class."""

    def parts(self) -> tuple[Any, MatryoshkaHead | None]:
        """Return the part that makes features, and the nested head; None without one."""
        raise NotImplementedError


def as_shapes(shapes: Any) -> Any:
    """Return shapes as tuples: the configuration of a saved model holds them as lists."""
    if isinstance(shapes, dict):
        return {name: as_shapes(shape) for name, shape in shapes.items()}
    if any(isinstance(entry, (list, tuple)) for entry in shapes):
        return [as_shapes(shape) for shape in shapes]
    return tuple(shapes)


def output_shape(backbone: keras.layers.Layer, input_shape: Any) -> Any:
    """Return the shape of the backbone's output; build the backbone if it is not built."""
    if backbone.built:
        try:
            return backbone.compute_output_shape(input_shape)
        except NotImplementedError:  # a subclassed backbone may lack the method
            pass
    inputs = keras.tree.map_shape_structure(
        lambda shape: keras.Input(batch_shape=(None, *shape[1:]), dtype=backbone.compute_dtype),
        input_shape,
    )
    return keras.tree.map_structure(lambda tensor: tuple(tensor.shape), backbone(inputs))
