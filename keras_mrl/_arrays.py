"""What labels held in memory must be, said once for baselines, callbacks and evaluation."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from ._dims import check_dims, check_width

# What features held in memory must be, said once for baselines and evaluation.

Array = npt.NDArray[Any]

_ROWS = 8192  # looked at together


def check_features(features: Any, dim: int = 1) -> Array:
    """Return features as an array of rows, of at least `dim` coordinates.

    Raises:
        ValueError: If they are no finite table with at least one row, or narrower than `dim`.
    """
    # Keras would copy an array, and read a memory map whole.
    given = isinstance(features, np.ndarray)
    table = features if given else keras.ops.convert_to_numpy(features)
    if table.ndim != 2 or not table.size or not _is_finite(table):
        raise ValueError(
            "features must be finite numbers (rows, width) with at least one row. "
            f"Received: {table.dtype} of shape {table.shape}. "
            "Give what backbone.predict(inputs) returns."
        )
    check_width(check_dims((dim,)), table.shape[1])
    return table


def _is_finite(table: Array) -> bool:
    parts = (table[start : start + _ROWS] for start in range(0, len(table), _ROWS))
    return all(bool(np.isfinite(part).all()) for part in parts)


def check_fitted(features: Any, width: int) -> Array:
    """Return features as an array of rows, as wide as those something was fitted on.

    Raises:
        ValueError: If they are no finite table with at least one row, or of another width.
    """
    table = check_features(features)
    if table.shape[1] != width:
        raise ValueError(
            "Features must be as wide as those fitted. "
            f"Received: width {table.shape[1]}, fitted on {width}. Embed with the same backbone."
        )
    return table


_KINDS = dict.fromkeys("biuf", "numbers") | {"U": "strings", "T": "strings", "S": "bytes"}


def as_labels(labels: Any) -> Array:
    """Return labels as an array; a column `(rows, 1)`, as Keras's data sets give it, as `(rows,)`.

    Examples:
        >>> from keras_mrl._arrays import as_labels
        >>> as_labels([[7], [9]]).tolist()
        [7, 9]
    """
    given: Array = keras.ops.convert_to_numpy(labels)
    return given[:, 0] if given.shape[1:] == (1,) else given


def check_labels_of(features: Array, labels: Any) -> Array:
    """Return labels as an array, one per row of `features`.

    Raises:
        ValueError: If they are not one per row.
    """
    given = as_labels(labels)
    if given.shape != features.shape[:1]:
        raise ValueError(
            "labels must hold one label per row of the features. "
            f"Received: labels of shape {given.shape} for features of shape {features.shape}. "
            "Give integer labels, not one-hot rows."
        )
    return given


def check_labels_for(inputs: Any, labels: Any) -> Array:
    """Return labels as an array, one per row of what a model reads.

    Arrays say how many rows they have; a data set does not, and is not asked.

    Raises:
        ValueError: If they are not one per row, or none.
    """
    given = as_labels(labels)
    shapes = [tuple(getattr(part, "shape", ())) for part in keras.tree.flatten(inputs)]
    rows = {shape[0] for shape in shapes if shape}
    if given.ndim != 1 or not len(given) or not rows <= {len(given)}:
        raise ValueError(
            "labels must hold one label per row of the inputs, at least one. "
            f"Received: labels of shape {given.shape} for inputs of shapes {shapes}. "
            "Give integer labels, not one-hot rows."
        )
    return given


def check_kinds(queries: Array, gallery: Array) -> None:
    """Raise a `ValueError` where labels of queries can equal none of a gallery's.

    Examples:
        >>> from keras_mrl._arrays import check_kinds
        >>> check_kinds(np.array([1, 2]), np.array([1.0, 2.0]))
    """
    asked, shown = _kind(queries), _kind(gallery)
    if asked != shown:
        raise ValueError(
            "Labels of queries and gallery must be of one kind. "
            f"Received: {asked} for the queries, {shown} for the gallery. "
            "Name the classes alike on both sides, best by integers."
        )


def _kind(labels: Array) -> str:
    codes = {labels.dtype.kind}
    if codes == {"O"}:  # what the entries are, then
        codes = {np.dtype(entry).kind for entry in set(map(type, labels.tolist()))}
    return " and ".join(sorted({_KINDS.get(code, "objects") for code in codes}))
