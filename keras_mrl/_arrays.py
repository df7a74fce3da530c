"""Features and labels of the caller as arrays, checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from ._dims import check_dims, check_width

Array = npt.NDArray[Any]

_CHECKED_ROWS = 8192  # at a time: a mask of a whole memory map would fill the memory


def check_unmasked(*data: Any) -> None:
    """Raise for masked arrays: whoever reads an array reads what stands behind a mask.

    Raises:
        ValueError: If an entry of an array in `data` is masked.
    """
    for part in keras.tree.flatten(data):
        if np.ma.is_masked(part):
            raise ValueError(
                "Arrays must hold a number in every place. "
                f"Received: a masked array, {int(part.mask.sum())} of {part.size} entries "
                "masked. Fill them, for example with array.filled(0), or leave the rows out."
            )


def is_dataset(data: Any) -> bool:
    """Whether `data` gives batches: a `tf.data.Dataset`, a `PyDataset` or a `DataLoader`."""
    is_loader = hasattr(data, "batch_size") and hasattr(data, "dataset")
    return isinstance(data, keras.utils.PyDataset) or hasattr(data, "element_spec") or is_loader


def labelled_batches(
    name: str, dataset: Any, has_columns: bool = False
) -> Iterator[tuple[Any, Array]]:
    """Yield the inputs and the labels `(rows,)` of every batch of a data set, once through.

    Args:
        name: Of the argument, for errors.
        dataset: What `is_dataset` takes; of batches `(x, y)` or `(x, y, sample_weight)`.
        has_columns: Whether labels may also be `(rows, outputs)`, a number per output.

    Raises:
        ValueError: If it has no end, no batch, or batches of another form.
    """
    is_indexed = isinstance(dataset, keras.utils.PyDataset)
    has_no_end = dataset.num_batches is None if is_indexed else _repeats(dataset)
    if has_no_end:
        raise _dataset_error(name, has_columns, "one that repeats without end")
    number = 0
    for batch in map(dataset.__getitem__, range(len(dataset))) if is_indexed else dataset:
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            received = f"batches that are a {type(batch).__name__}"
            raise _dataset_error(name, has_columns, received)
        x = keras.tree.map_structure(keras.ops.convert_to_numpy, batch[0])
        labels = as_labels(batch[1])
        shapes = [tuple(part.shape) for part in keras.tree.flatten(x)]
        fits = {shape[:1] for shape in shapes} == {labels.shape[:1]}
        if not fits or labels.ndim not in ((1, 2) if has_columns else (1,)):
            received = f"inputs {shapes} with labels {labels.shape} in a batch"
            raise _dataset_error(name, has_columns, received)
        number += 1
        yield x, labels
    if not number:
        raise _dataset_error(name, has_columns, "no batch")


def _repeats(dataset: Any) -> bool:
    cardinality = getattr(dataset, "cardinality", lambda: 0)
    return int(cardinality()) == -1  # as TensorFlow counts what is infinite


def _dataset_error(name: str, has_columns: bool, received: str) -> ValueError:
    labels = "a label per row and output" if has_columns else "one integer label per row"
    return ValueError(
        f"A data set of {name} must end, and give batches (x, y) with {labels}. "
        f"Received: {received}. Batch it, leave repeat() out, and map its rows to (x, y)."
    )


def check_features(features: Any, dim: int = 1) -> Array:
    """Return features as an array `(rows, width)`, at least `dim` wide.

    Raises:
        ValueError: If `features` are not a finite table with at least one row, or are narrower
            than `dim`.
    """
    check_unmasked(features)
    # Keras would copy an array, and read a memory map whole.
    is_array = isinstance(features, np.ndarray)
    table = features if is_array else keras.ops.convert_to_numpy(features)
    if table.ndim != 2 or not table.size or not _is_finite(table):
        raise ValueError(
            "features must be finite numbers (rows, width) with at least one row. "
            f"Received: {table.dtype} of shape {table.shape}. "
            "Give what backbone.predict(inputs) returns."
        )
    check_width(check_dims((dim,)), table.shape[1])
    return table


def _is_finite(table: Array) -> bool:
    starts = range(0, len(table), _CHECKED_ROWS)
    return all(bool(np.isfinite(table[start : start + _CHECKED_ROWS]).all()) for start in starts)


def check_fitted(features: Any, width: int) -> Array:
    """Return features as an array `(rows, width)`; `width` is that of the features of the fit.

    Raises:
        ValueError: If `features` are not a finite table with at least one row, or of another width.
    """
    table = check_features(features)
    if table.shape[1] != width:
        raise ValueError(
            "Features must be as wide as those fitted. "
            f"Received: width {table.shape[1]}, fitted on {width}. Embed with the same backbone."
        )
    return table


def head_arrays(head: Any, dim: int) -> tuple[Array, Array]:
    """Return the kernel `(dim, num_classes)` and the bias `(num_classes,)` of one dim of a head.

    Both are float32. A head without biases has a bias of zeros.

    Raises:
        ValueError: If a subclass of `MatryoshkaHead` computes its logits otherwise.
    """
    head.check_linear()
    kernel, bias = head.weights_at(dim)
    kernel = np.asarray(keras.ops.convert_to_numpy(kernel), np.float32)
    if bias is None:
        return kernel, np.zeros(kernel.shape[1], np.float32)
    return kernel, np.asarray(keras.ops.convert_to_numpy(bias), np.float32)


def as_labels(labels: Any) -> Array:
    """Return labels as an array; a column `(rows, 1)`, as Keras's data sets give it, as `(rows,)`.

    Examples:
        >>> from keras_mrl._arrays import as_labels
        >>> as_labels([[7], [9]]).tolist()
        [7, 9]
    """
    check_unmasked(labels)
    array: Array = keras.ops.convert_to_numpy(labels)
    return array[:, 0] if array.shape[1:] == (1,) else array


def check_labels_of(features: Array, labels: Any) -> Array:
    """Return labels as an array, one per row of `features`.

    Raises:
        ValueError: If there is not one label per row.
    """
    array = as_labels(labels)
    if array.shape != features.shape[:1]:
        raise ValueError(
            "labels must hold one label per row of the features. "
            f"Received: labels of shape {array.shape} for features of shape {features.shape}. "
            "Give integer labels, not one-hot rows."
        )
    return array


def check_labels_for(inputs: Any, labels: Any) -> Array:
    """Return labels as an array, one per row of a model's `inputs`.

    The rows of arrays are counted; those of a data set are not, since that would read it.

    Raises:
        ValueError: If there is no label, or not one per row.
    """
    array = as_labels(labels)
    shapes = [tuple(getattr(part, "shape", ())) for part in keras.tree.flatten(inputs)]
    numbers_of_rows = {shape[0] for shape in shapes if shape}
    if array.ndim != 1 or not len(array) or not numbers_of_rows <= {len(array)}:
        raise ValueError(
            "labels must hold one label per row of the inputs, at least one. "
            f"Received: labels of shape {array.shape} for inputs of shapes {shapes}. "
            "Give integer labels, not one-hot rows."
        )
    return array


def check_kinds(query_labels: Array, gallery_labels: Array) -> None:
    """Raise a `ValueError` if no label of the queries can equal one of the gallery.

    Examples:
        >>> from keras_mrl._arrays import check_kinds
        >>> check_kinds(np.array([1, 2]), np.array([1.0, 2.0]))
    """
    query_kind, gallery_kind = _kind(query_labels), _kind(gallery_labels)
    if query_kind != gallery_kind:
        raise ValueError(
            "Labels of queries and gallery must be of one kind. "
            f"Received: {query_kind} for the queries, {gallery_kind} for the gallery. "
            "Name the classes alike on both sides, best by integers."
        )


# NumPy's codes of kinds, and the word for labels that can equal each other.
_KINDS = dict.fromkeys("biuf", "numbers") | {"U": "strings", "T": "strings", "S": "bytes"}


def _kind(labels: Array) -> str:
    codes = {labels.dtype.kind}
    if codes == {"O"}:
        codes = {np.dtype(entry_type).kind for entry_type in set(map(type, labels.tolist()))}
    return " and ".join(sorted({_KINDS.get(code, "objects") for code in codes}))
