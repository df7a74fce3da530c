"""Which inputs of a batch are anchors, which positives, and which hard negatives."""

from __future__ import annotations

import re
from typing import Any

import keras

_SIDE = re.compile(r"anchor|positive|negative(_\d+)?")


def sides_of(inputs: Any) -> list[Any] | None:
    """Return anchors, positives and as many negatives as there are; None of inputs of one side.

    Args:
        inputs: `(anchors, positives, *negatives)`, or a dict under the names of sides; arrays,
            tensors or shapes. Negatives with one more axis than the positives are several sides.

    Raises:
        ValueError: If a name is no side's, the positives are missing, or rows may have different
            numbers of negatives.

    Examples:
        >>> from keras_mrl.models.sides import sides_of
        >>> sides_of({"positive": (None, 5), "anchor": (None, 7), "negative": (None, 2, 5)})
        [(None, 7), (None, 5), (None, 5), (None, 5)]
    """
    parts = _in_order(inputs)
    if parts is None:
        return None
    return parts[:2] + [side for part in parts[2:] for side in _apart(part, parts[1])]


def are_sides(inputs: Any) -> bool:
    """Return whether inputs are of several sides; raise as `sides_of` does for names.

    Examples:
        >>> from keras_mrl.models.sides import are_sides
        >>> are_sides([np.ones(3), np.ones(3)]), are_sides(np.ones(3)), are_sides({"text": "a"})
        (True, False, False)
    """
    return _in_order(inputs) is not None


def _in_order(inputs: Any) -> list[Any] | None:
    """Return anchors, positives, and what follows as it is; None of inputs of one side."""
    if isinstance(inputs, dict):
        are_names = [bool(_SIDE.fullmatch(str(name))) for name in inputs]
        if not any(are_names):
            return None
        if not all(are_names) or not {"anchor", "positive"} <= set(inputs):
            raise ValueError(
                "A dict of sides has the keys anchor and positive, and of hard negatives negative, "
                "or negative_1, negative_2, ... "
                f"Received: {', '.join(map(str, inputs))}. Rename or add what differs."
            )
        names = set(inputs) - {"anchor", "positive"}
        order = sorted(names, key=lambda name: int(name.partition("_")[2] or 0))
        sides = [inputs[name] for name in ("anchor", "positive", *order)]
    elif isinstance(inputs, (list, tuple)) and not _is_shape(inputs):
        sides = list(inputs)
    else:
        return None
    if len(sides) < 2:
        raise ValueError(
            "A list of inputs is a pair (anchors, positives), or more with hard negatives. "
            f"Received: {len(inputs)} inputs. Give a tower of several inputs a dict of them."
        )
    return sides


def _is_shape(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(
        entry is None or isinstance(entry, int) for entry in value
    )


def _apart(negatives: Any, positive: Any) -> list[Any]:
    """Return inputs `(batch, negatives, ...)` as so many `(batch, ...)`, or the shapes of them.

    Negatives that have as many axes as the positive are one side.
    """
    shapes = _shapes(negatives)
    if [len(shape) for shape in shapes] != [len(shape) + 1 for shape in _shapes(positive)]:
        return [negatives]
    counts = {shape[1] for shape in shapes}
    if None in counts or len(counts) > 1:
        raise ValueError(
            "Every row must have one known number of hard negatives. "
            f"Received: negatives of shapes {', '.join(map(str, shapes))}. "
            "Give as many negatives for every row, in arrays (batch, negatives, ...)."
        )
    if _is_shape(keras.tree.flatten(negatives)):
        apart = keras.tree.map_shape_structure(lambda shape: (shape[0], *shape[2:]), negatives)
        return [apart] * counts.pop()
    return [
        keras.tree.map_structure(lambda leaf, index=index: leaf[:, index], negatives)
        for index in range(counts.pop())
    ]


def _shapes(side: Any) -> list[tuple[Any, ...]]:
    """Return the shape of every input of a side."""
    leaves = keras.tree.flatten(side)
    if not _is_shape(leaves):
        return [tuple(getattr(leaf, "shape", ())) for leaf in leaves]
    shapes: list[tuple[Any, ...]] = []
    keras.tree.map_shape_structure(lambda shape: shapes.append(tuple(shape)), side)
    return shapes
