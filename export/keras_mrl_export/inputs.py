"""What the inputs of a served model are called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import keras

# Names Keras makes up for an input that was given none.
_UNNAMED = re.compile(r"(keras_tensor|input_layer|input)(_\d+)?")
SINGLE_INPUT = "inputs"


def name_inputs(backbone: keras.Model, sample: Any) -> dict[str, str]:
    """Return the served name of every input, by its key in `sample` ("" for a bare array).

    Inputs keep the names they have in Keras; a single one that has none is called `inputs`.

    Raises:
        ValueError: If `sample` is neither an array nor a dict, or does not fit the model's inputs.
    """
    if isinstance(sample, (list, tuple)):
        raise ValueError(
            "sample must be one array, or a dict by input name. "
            f"Received: a {type(sample).__name__}. Write {{name: array}}."
        )
    keys = list(sample) if isinstance(sample, Mapping) else [""]
    known = [tensor.name for tensor in input_tensors(backbone)] or keys
    if len(known) != len(keys) or (keys != [""] and set(keys) != set(known)):
        raise ValueError(
            f"sample must hold the inputs of the model: {', '.join(known)}. "
            f"Received: {', '.join(keys) if keys != [''] else 'one array'}. "
            "Write {name: array} with those names."
        )
    if len(keys) > 1:
        return {key: key for key in keys}
    unnamed = not known[0] or _UNNAMED.fullmatch(known[0])
    return {keys[0]: SINGLE_INPUT if unnamed else known[0]}


def input_tensors(backbone: keras.Model) -> list[Any]:
    """Return the symbolic inputs of a functional or sequential model; none of a subclassed one."""
    try:
        return keras.tree.flatten(backbone.input)
    except AttributeError:
        return []
