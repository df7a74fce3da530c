"""A model's inputs as rows, and their embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from .._arrays import Array, check_unmasked
from .._dims import check_dims
from .._tokens import are_texts, as_texts, tokenized
from ..models.cut import dims_of_loss

PART_ROWS = 8192  # embedded together, about


def dims_of(caller: str, model: keras.Model, head: Any, dims: Sequence[int] | None) -> Any:
    """Return `dims`, or those of the head, or of the loss of a `MatryoshkaEncoder`.

    Args:
        caller: Name of the public function, for the error.
        model: The model, for the error.
        head: Its head, or None.
        dims: Prefix lengths, or None.

    Raises:
        ValueError: If there are none.

    Examples:
        >>> from keras_mrl.evaluation.inputs import dims_of
        >>> dims_of("evaluate_retrieval", None, MatryoshkaHead(10, dims=(8, 16)), None)
        (8, 16)
    """
    ladder = dims
    if ladder is None:
        ladder = dims_of_loss(model) if head is None else head.dims
    if ladder is None:
        raise ValueError(
            f"{caller} needs dims for a model that ends in no MatryoshkaHead with dims. "
            f"Received: dims=None for {type(model).__name__} {model.name!r}. "
            "Give the prefix lengths: dims=(8, 16, 32)."
        )
    return check_dims(ladder)


def check_inputs(name: str, inputs: Any) -> tuple[Any, int]:
    """Return inputs as arrays, and how many rows they hold.

    Args:
        name: Name of the argument, for the error.
        inputs: An array of rows, or a dict or tuple of such arrays.

    Raises:
        ValueError: If these are no arrays with as many rows each, at least one.

    Examples:
        >>> from keras_mrl.evaluation.inputs import check_inputs
        >>> check_inputs("corpus", {"left": np.zeros((5, 2)), "right": np.zeros(5)})[1]
        5
    """
    if are_texts(inputs):
        inputs = as_texts(inputs)
    check_unmasked(inputs)
    parts = keras.tree.flatten(inputs)
    shapes = [tuple(getattr(part, "shape", ())) for part in parts]
    numbers_of_rows = {shape[:1] for shape in shapes}
    if len(numbers_of_rows) != 1 or numbers_of_rows <= {(), (0,)}:
        received = f"inputs of shapes {shapes}" if all(shapes) else f"a {type(inputs).__name__}"
        raise ValueError(
            f"{name} must be an array of rows, or a dict or tuple of arrays with as many rows "
            f"each, at least one. Received: {received}. Of a data set, embed the rows with "
            "model.predict and judge the embeddings: score_retrieval, score_similarity."
        )
    arrays = keras.tree.map_structure(
        lambda part: part if isinstance(part, np.ndarray) else keras.ops.convert_to_numpy(part),
        inputs,
    )
    return arrays, shapes[0][0]


def rows_of(inputs: Any, rows: Any) -> Any:
    """Return some rows of checked inputs, by a slice or by positions.

    Examples:
        >>> from keras_mrl.evaluation.inputs import rows_of
        >>> rows_of({"x": np.arange(5)}, slice(1, 3))
        {'x': array([1, 2])}
    """
    return keras.tree.map_structure(lambda part: part[rows], inputs)


def embed_parts(
    model: keras.Model,
    inputs: Any,
    rows: int,
    batch_size: int,
    progress: Callable[[], None],
    preprocessor: Any = None,
) -> Iterator[Array]:
    """Yield the embeddings of checked inputs, float32, a part at a time.

    Args:
        model: From inputs to embeddings.
        inputs: As `check_inputs` returns them.
        rows: How many rows they hold.
        batch_size: Rows that the model sees at a time.
        progress: Called after every part.
        preprocessor: From strings to the model's inputs, or None.

    Examples:
        >>> from keras_mrl.evaluation.inputs import embed_parts
        >>> model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        >>> parts = embed_parts(model, np.ones((5, 3)), 5, 256, lambda: None)
        >>> [part.shape for part in parts]
        [(5, 2)]
    """
    for part in parts_of(rows, batch_size):
        tokens = tokenized(preprocessor, rows_of(inputs, part))
        embeddings = model.predict(tokens, batch_size=batch_size, verbose=0)
        yield np.asarray(keras.ops.convert_to_numpy(embeddings), np.float32)
        progress()


def parts_of(rows: int, batch_size: int) -> list[slice]:
    """Return the parts that rows are embedded in: whole batches, but for the last.

    Examples:
        >>> from keras_mrl.evaluation.inputs import parts_of
        >>> parts_of(12_000, batch_size=5000)
        [slice(0, 5000, None), slice(5000, 10000, None), slice(10000, 12000, None)]
    """
    size = max(PART_ROWS // batch_size, 1) * batch_size
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
