"""The base of both models, and the shapes of their inputs and outputs."""

from __future__ import annotations

import contextlib
import inspect
import types
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import keras
import numpy as np

from .._arrays import check_unmasked, is_dataset
from .._modes import set_modes
from .._tokens import takes_text
from ..layers import MatryoshkaHead
from ..losses.targets import check_numbers
from ..text import shared_preprocessor


class _NestedModel(keras.Model):
    """The base of both models, which `split` can take apart without importing their classes."""

    _modes: Mapping[str, str | None] = MappingProxyType({})  # of metrics per dim
    _has_texts_as_labels = False  # whether what Keras calls labels may be texts to embed
    _given_preprocessor: Any  # PyTorch would find a value here before that of the instance

    @property
    def preprocessor(self) -> Any:
        """The layer that makes tokens of strings, before a step; None of a model without."""
        return shared_preprocessor(self._given_preprocessor, self._text_parts())

    def _text_parts(self) -> tuple[Any, ...]:
        """Return the parts that may have a preprocessor of their own."""
        raise NotImplementedError

    def parts(self, exit: str | None = None) -> tuple[Any, MatryoshkaHead | None]:
        """Return the part that makes features, and the nested head; None without one.

        Args:
            exit: Name of an exit; None means the last.
        """
        raise NotImplementedError

    def gallery_part(self) -> Any:
        """Return the part that makes features of galleries; None if it is that of all rows."""
        return None

    @property
    def input_shape(self) -> Any:
        """The shape of the inputs that the model is built for."""
        if not self.built:
            raise AttributeError(f"Model {self.name!r} has no shapes before it is built.")
        return self.get_build_config()["input_shape"]

    @property
    def output_shape(self) -> Any:
        """The shape of the output."""
        return self.compute_output_shape(self.input_shape)

    @takes_text
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Predict as `keras.Model.predict` does, of strings, too, if there is a preprocessor."""
        return super().predict(*args, **kwargs)

    @takes_text
    def predict_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Predict as `keras.Model.predict_on_batch` does, of strings, too."""
        return super().predict_on_batch(*args, **kwargs)

    @takes_text
    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `keras.Model.train_on_batch` does, on strings, too."""
        return super().train_on_batch(*args, **kwargs)

    @takes_text
    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as `keras.Model.test_on_batch` does, on strings, too."""
        return super().test_on_batch(*args, **kwargs)

    def fit(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `keras.Model.fit` does."""
        check_unmasked(x, y, kwargs.get("sample_weight"), kwargs.get("validation_data"))
        x = self._build_for(x, y)
        bound = inspect.signature(keras.Model.fit).bind(self, x, y, *args, **kwargs)
        set_modes(bound.arguments.get("callbacks"), self._modes)
        self._build_optimizer()
        with self._batches_explained(x, kwargs.get("validation_data")):
            return super().fit(x, y, *args, **kwargs)

    def evaluate(self, x: Any = None, y: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as `keras.Model.evaluate` does."""
        check_unmasked(x, y, kwargs.get("sample_weight"))
        x = self._build_for(x, y)
        with self._batches_explained(x):
            return super().evaluate(x, y, *args, **kwargs)

    def _inputs_first(self, batch: Any) -> Any:
        """Return a batch as Keras has it: `(x,)`, `(x, y)` or `(x, y, sample_weight)`."""
        return batch

    @contextlib.contextmanager
    def _batches_explained(self, *data: Any) -> Iterator[None]:
        """Where Keras cannot read the parts or the labels of a data set, say what they are.

        Keras converts them before any code of a model sees them. They are read anew after an error
        alone, so that nothing is read of a data set that can be trained on.
        """
        try:
            yield
        except Exception:
            for part in filter(is_dataset, data):
                batch = _with_first_batch(part)[1]
                self._inputs_first(batch)
                is_labelled = isinstance(batch, (tuple, list)) and len(batch) > 1
                for labels in keras.tree.flatten(batch[1]) if is_labelled else ():
                    check_unmasked(labels)
                    check_numbers(labels if hasattr(labels, "dtype") else np.asarray(labels))
            raise

    def _build_for(self, x: Any, y: Any = None) -> Any:
        """Build for arrays, or for a data set, before a step is traced; return the data.

        TensorFlow loses variables that are made in a step that fails, and Keras takes them for
        built. What was read of a generator comes first in the one that is returned.
        """
        if self.built:
            return x
        x, batch = _with_first_batch(x)
        batch = (x, y) if batch is x else batch
        is_sequence = isinstance(batch, (tuple, list))
        spec = self._inputs_first(batch)[0] if is_sequence else batch
        shapes = [getattr(part, "shape", None) for part in keras.tree.flatten(spec)]
        if shapes and all(shapes):
            self.build(keras.tree.map_structure(lambda part: (None, *part.shape[1:]), spec))
        return x

    def _build_optimizer(self) -> None:
        """Make the optimizer's variables before a step is traced, as those of the model are.

        Under a strategy of TensorFlow Keras does so itself.
        """
        if not self.built or self.optimizer is None or self.optimizer.built:
            return
        if getattr(self, "_distribute_strategy", None) is None:
            self.optimizer.build(self.trainable_variables)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compile as a saved model was compiled."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)


def _with_first_batch(data: Any) -> tuple[Any, Any]:
    """Return data of which nothing is lost, and a batch of it, or what describes one.

    A `tf.data.Dataset` describes its batches, a `PyDataset` is asked for the first, and of a
    `DataLoader` one row is read. Data of any other kind is its own batch.
    """
    if isinstance(data, keras.utils.PyDataset):
        return data, data[0]
    if isinstance(data, types.GeneratorType):
        first = next(data, None)
        return _beginning_with(first, data), first
    dataset, collate = getattr(data, "dataset", None), getattr(data, "collate_fn", None)
    if callable(collate) and dataset is not None and hasattr(dataset, "__getitem__"):
        return data, collate([dataset[0]])
    return data, getattr(data, "element_spec", data)


def _beginning_with(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    if first is not None:
        yield first
    yield from rest


def named_without_package(kind: type[keras.Model]) -> type[keras.Model]:
    """Let Keras find a model's class by its bare name, which is all that an `.h5` file holds."""
    keras.saving.get_custom_objects()[kind.__name__] = kind
    return kind


def as_shapes(shapes: Any) -> Any:
    """Return shapes as tuples: the configuration of a saved model holds them as lists."""
    if isinstance(shapes, dict):
        return {name: as_shapes(shape) for name, shape in shapes.items()}
    if any(isinstance(entry, (list, tuple)) for entry in shapes):
        return [as_shapes(shape) for shape in shapes]
    return tuple(shapes)


def known_input_shape(backbone: keras.layers.Layer) -> Any:
    """Return the shape of the backbone's inputs; None if it is not built, or takes arguments."""
    if getattr(backbone, "inputs", None):
        return keras.tree.map_structure(lambda own: tuple(own.shape), input_of(backbone))
    shape = (backbone.get_build_config() or {}).get("input_shape") if backbone.built else None
    return None if shape is None else as_shapes(shape)


def input_of(model: keras.Model) -> Any:
    """Return the symbolic input; `input` of a sequential model is that of the model around it."""
    return model.inputs[0] if isinstance(model, keras.Sequential) else model.input


def inputs_like(backbone: keras.layers.Layer) -> Any:
    """Return new symbolic inputs with the names, shapes and dtypes of the backbone's own."""
    if getattr(backbone, "inputs", None):
        return keras.tree.map_structure(
            lambda own: keras.Input(batch_shape=own.shape, dtype=own.dtype, name=own.name),
            input_of(backbone),
        )
    # A subclassed backbone has recorded no more than the shapes it was built with.
    shapes = as_shapes(backbone.get_build_config()["input_shape"])

    def new_input(shape: Any, name: str | None = None) -> Any:
        return keras.Input(batch_shape=(None, *shape[1:]), dtype=backbone.compute_dtype, name=name)

    if isinstance(shapes, dict):
        return {name: new_input(shape, name) for name, shape in shapes.items()}
    return keras.tree.map_shape_structure(new_input, shapes)


def check_pooling(pooling: Any) -> Any:
    """Return `pooling`, a layer or None; raise `TypeError` for anything else."""
    if pooling is not None and not isinstance(pooling, keras.layers.Layer):
        raise TypeError(
            "pooling must be a Keras layer. "
            f"Received: pooling={pooling!r}. "
            "Give for example pooling=keras.layers.GlobalAveragePooling2D()."
        )
    return pooling


def with_pooling(backbone: Any, pooling: keras.layers.Layer | None) -> Any:
    """Return a model of the backbone and the pooling after it, on their own layers."""
    if pooling is None:
        return backbone
    inputs = inputs_like(backbone)
    return keras.Model(inputs, pooling(backbone(inputs)), name=f"{backbone.name}_pooled")


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
