"""A backbone as a function of what clients send."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras
import tensorflow as tf

from .graph import Tensors, first_rows
from .job import Job, TowerJob
from .sample import declared_inputs, input_structure
from .text import PADDING_MASK, TextGraph


class ServedTower:
    """A backbone as a TensorFlow function of served inputs, which may be images or texts.

    Args:
        backbone: Inputs to features, on the TensorFlow backend.
        inputs: The inputs as a manifest names them.
        job: Input names, and what makes the model's inputs of images or texts.
        width: How many of the features are served.
        text: Makes the backbone's inputs of texts; None where clients send something else.
    """

    def __init__(
        self,
        backbone: keras.Model,
        inputs: Mapping[str, Mapping[str, Any]],
        job: Job | TowerJob,
        width: int,
        text: TextGraph | None = None,
    ) -> None:
        self.specs = {
            name: tf.TensorSpec(spec["shape"], spec["dtype"], name) for name, spec in inputs.items()
        }
        self.backbone = backbone
        self.features = tf.function(self._call_backbone)
        self._text = text
        self._job = job
        self._width = width

    def tables(self) -> list[Any]:
        """Return the lookup tables of its layers (the vocabulary of a TextVectorization)."""
        layers = [self.backbone, *([] if self._text is None else [self._text.preprocessor])]
        return [
            part
            for layer in layers
            for part in tf.train.TrackableView(layer).descendants()
            if isinstance(part, tf.saved_model.experimental.TrackableResource)
        ]

    def read(self, inputs: Tensors) -> tuple[Any, Any]:
        """Return what the backbone takes, of at least one row, and how many rows there are."""
        decoder = self._job.decoder
        rows = tf.shape(next(iter(inputs.values())))[0]
        if decoder is not None:
            inputs = {name: decoder.decode(images) for name, images in inputs.items()}
        inputs = _at_least_one_row(inputs, rows)
        if self._text is not None:
            [texts] = inputs.values()
            inputs = self._tokens(self._text.traced(texts))
        return self._as_declared(inputs), rows

    def _tokens(self, tokens: Tensors) -> Tensors:
        """Return the inputs that the backbone declares, in its types."""
        declared = declared_inputs(self.backbone)
        if not declared:
            return tokens
        if self._job.text is not None and self._job.text.cuts_padding:
            tokens = _without_padding(tokens)
        if len(declared) == 1 and len(tokens) == 1:
            tokens = dict(zip(declared, tokens.values(), strict=True))
        return {name: tf.cast(tokens[name], tensor.dtype) for name, tensor in declared.items()}

    def _call_backbone(self, **inputs: Any) -> Any:
        tensors, rows = self.read(inputs)
        features = self.backbone(tensors, training=False)
        return first_rows(tf.cast(features, tf.float32)[:, : self._width], rows)

    def _as_declared(self, inputs: Tensors) -> Any:
        """Return inputs by served name in the structure that the backbone declares."""
        declared = declared_inputs(self.backbone)
        if not declared:
            return next(iter(inputs.values())) if "" in self._job.input_names else inputs
        is_single = len(declared) == 1
        tensors = list(inputs.values()) if is_single else [inputs[name] for name in declared]
        return keras.tree.pack_sequence_as(input_structure(self.backbone), tensors)


def _without_padding(tokens: Tensors) -> Tensors:
    """Return tokens without the last columns that are padding in every row."""
    mask = tf.cast(tokens[PADDING_MASK], tf.int32)
    columns = tf.range(1, tf.shape(mask)[1] + 1)
    length = tf.maximum(tf.reduce_max(mask * columns), 1)
    return {name: own[:, :length] for name, own in tokens.items()}


def _at_least_one_row(inputs: Tensors, rows: Any) -> Tensors:
    """Return inputs, or one row of zeros for an empty request.

    TensorFlow with oneDNN gives a convolution of no rows the shape of its input, so that the batch
    normalization after it fails. What is computed of that row must be left out of the answer.
    """

    def zeros() -> Tensors:
        return {
            name: tf.zeros([1, *(tf.maximum(size, 1) for size in _sizes(own, own))], own.dtype)
            for name, own in inputs.items()
        }

    chosen = tf.cond(tf.equal(rows, 0), zeros, lambda: dict(inputs))
    # Behind a condition LiteRT's converter knows no shape, and a convolution needs it. TensorFlow
    # copies nothing here.
    return {
        name: tf.reshape(chosen[name], [tf.maximum(rows, 1), *_sizes(chosen[name], own)])
        for name, own in inputs.items()
    }


def _sizes(tensor: Any, like: Any) -> list[Any]:
    """Return the sizes of a row: those that are known of another tensor as numbers."""
    sizes = tf.shape(tensor)
    return [sizes[axis] if size is None else size for axis, size in enumerate(like.shape) if axis]
