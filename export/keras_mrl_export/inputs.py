"""What the inputs of a served model are called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import keras

# Names Keras makes up for an input that was given none.
_UNNAMED = re.compile(r"(keras_tensor|input_layer|input)(_\d+)?")
SINGLE_INPUT = "inputs"
# What TensorFlow keeps as it is when it names a signature's input.
_SERVABLE = re.compile(r"(?!self\Z)[A-Za-z]\w*", re.ASCII)


def check_one_input(backbone: keras.Model) -> None:
    """Raise a `ValueError` if a decoder would not know which input images are for."""
    declared = list(declared_inputs(backbone))
    if len(declared) > 1:
        raise ValueError(
            "A decoder makes the one input of a model out of images. "
            f"Received: a decoder for a model with the inputs {', '.join(declared)}. "
            "Export it without, for clients that send pixels."
        )


def name_inputs(backbone: keras.Model, sample: Any) -> dict[str, str]:
    """Return the served name of every input, by its key in `sample` ("" for a bare array).

    Inputs keep the names they have in Keras; a single one that has none is called `inputs`.

    Raises:
        ValueError: If `sample` is neither an array nor a dict, does not fit the model's inputs, or
            TensorFlow could not serve an input under its name.
    """
    if isinstance(sample, (list, tuple)):
        raise ValueError(
            "sample must be one array, or a dict by input name. "
            f"Received: a {type(sample).__name__}. Write {{name: array}}."
        )
    keys = list(sample) if isinstance(sample, Mapping) else [""]
    known = list(declared_inputs(backbone)) or keys or [SINGLE_INPUT]
    if len(known) != len(keys) or (keys != [""] and set(keys) != set(known)):
        raise ValueError(
            f"sample must hold the inputs of the model: {', '.join(known)}. "
            f"Received: {', '.join(keys) or 'none' if keys != [''] else 'one array'}. "
            "Write {name: array} with those names."
        )
    if len(keys) > 1:
        names = {key: key for key in keys}
    else:
        unnamed = not known[0] or _UNNAMED.fullmatch(known[0])
        names = {keys[0]: SINGLE_INPUT if unnamed else known[0]}
    refused = [name for name in names.values() if not _SERVABLE.fullmatch(name)]
    if refused:
        raise ValueError(
            "A served input's name must be a letter, then letters, digits and underscores, and "
            f"not self. Received: {', '.join(map(repr, refused))}. Put an input of another name "
            "before the model: x = keras.Input(..., name='image'); keras.Model(x, model(x))."
        )
    return names


def as_declared(backbone: keras.Model, sample: Any) -> Any:
    """Return `sample` as Keras takes it without a warning: bare where one tensor was declared."""
    bare = isinstance(input_structure(backbone), keras.KerasTensor)
    return next(iter(sample.values())) if bare and isinstance(sample, Mapping) else sample


def declared_inputs(backbone: keras.Model) -> dict[str, Any]:
    """Return the symbolic inputs of a functional or sequential model; none of a subclassed one.

    They come by name, in the order Keras flattens them: the key where the model was declared over
    a dict, for that is what Keras matches data by.
    """
    inputs = input_structure(backbone)
    if isinstance(inputs, Mapping):
        return {key: inputs[key] for key in sorted(inputs)}
    return {tensor.name: tensor for tensor in keras.tree.flatten(inputs)}


def input_structure(backbone: keras.Model) -> Any:
    """Return the symbolic inputs in the model's own structure; an empty list if it has none."""
    try:
        if isinstance(backbone, keras.Sequential):  # it has no `input` until it is called on one
            return backbone.inputs[0]
        return backbone.input
    except AttributeError:
        return []
