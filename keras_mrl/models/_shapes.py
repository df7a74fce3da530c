"""The base of both models, and the shapes of their inputs and outputs."""

from __future__ import annotations

from typing import Any

import keras

from ..layers import MatryoshkaHead


class _NestedModel(keras.Model):
    """The base of both models, which `split` can take apart without importing their classes."""

    def parts(self) -> tuple[Any, MatryoshkaHead | None]:
        """Return the part that makes features, and the nested head; None without one."""
        raise NotImplementedError

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as a saved model was compiled."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)


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
