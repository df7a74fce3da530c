"""One space for the embeddings of all exits: early ones are taken to that of the last.

What an early exit makes is of no use against a gallery of the last exit's embeddings: the spaces
have nothing to do with each other. A linear map, learned by ridge regression once training is over,
takes one into the other. It costs nothing later: the dense layer at the end of an exit's branch is
such a map already, and is given its weights.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from ._arrays import Array
from .evaluation.inputs import check_inputs, parts_of, rows_of
from .models import MatryoshkaEncoder
from .models.exits import LAST
from .models.segments import flat, nodes_of


def align_exits(
    model: MatryoshkaEncoder, inputs: Any, *, ridge: float = 1e-3, batch_size: int = 256
) -> dict[str, float]:
    """Give early exits weights by which they embed into the space of the last exit.

    Then queries that are embedded at an early exit find their neighbours among rows that the last
    exit embedded. Only the dense layer at the end of each exit's branch changes. Align once
    training is over, on rows like those that will be asked, and before the model is exported: the
    fingerprint of a gallery's encoder covers the exits.

    Args:
        model: An encoder with exits, whose branches end in a `keras.layers.Dense` without
            activation; those that the model makes itself do.
        inputs: Rows, an array or a dict or tuple of arrays. No labels are needed.
        ridge: Weight of the penalty, as a share of the mean variance of what the dense layer reads.
        batch_size: Rows that the model sees at a time.

    Returns:
        By exit, the share of the variance of the last exit's embeddings that the map explains on
        these rows: 1 where the embeddings are equal.

    Raises:
        TypeError: If the model is no `MatryoshkaEncoder`.
        ValueError: If it has no exits, a branch ends in something else or in a layer that the model
            also uses elsewhere, `ridge` is not above 0, or an embedding is not finite.

    Formula:
        A, b = argmin sum_i |h_i A + b - z_i|^2 + ridge * tr(cov(h)) / width * n * |A|^2, of what
        the dense layer reads, h, and the embeddings of the last exit, z

    Examples:
        >>> inputs = keras.Input((6,))
        >>> hidden = keras.layers.Dense(8, name="hidden")(inputs)
        >>> tower = keras.Model(inputs, keras.layers.Dense(4)(hidden))
        >>> encoder = MatryoshkaEncoder(tower, exits=("hidden",))
        >>> rows = np.random.default_rng(0).normal(size=(100, 6)).astype("float32")
        >>> shares = align_exits(encoder, rows, ridge=1e-6)
        >>> round(shares["hidden"], 3)
        1.0
    """
    if not isinstance(model, MatryoshkaEncoder):
        raise TypeError(
            "Exits are aligned of an encoder: the heads of a classifier would be of features that "
            f"are no more. Received: {type(model).__name__} {getattr(model, 'name', model)!r}. "
            "Give a MatryoshkaEncoder with exits."
        )
    if not (np.isfinite(ridge) and ridge > 0):
        raise ValueError(f"ridge must be a number above 0. Received: ridge={ridge!r}. Give 1e-3.")
    graph = flat(model._exits_or_raise().features)
    ends = {name: _end_of(graph, name) for name in model.exits}
    reads = {name: read for name, (read, _) in ends.items()}
    reader = keras.Model(graph.input, {**reads, LAST: graph.output[LAST]})
    arrays, rows = check_inputs("inputs", inputs)
    sums = {name: _Sums(layer.use_bias) for name, (_, layer) in ends.items()}
    for part in parts_of(rows, batch_size):
        made = reader.predict(rows_of(arrays, part), batch_size=batch_size, verbose=0)
        made = {name: np.asarray(own, np.float64) for name, own in made.items()}
        for name, own in sums.items():
            own.add(_checked(name, made[name]), _checked(LAST, made[LAST]))
    explained = {}
    for name, own in sums.items():
        weights, explained[name] = own.solve(ridge)
        ends[name][1].set_weights(weights)
    return explained


def _end_of(graph: keras.Model, name: str) -> tuple[Any, keras.layers.Dense]:
    """Return what the dense layer at the end of an exit reads, a symbolic tensor, and the layer."""
    layer, index, _ = graph.output[name]._keras_history
    is_map = isinstance(layer, keras.layers.Dense) and not layer.lora_enabled
    is_map = is_map and layer.activation is keras.activations.linear
    calls = sum(node.operation is layer for node in nodes_of(graph))
    if not is_map or calls > 1:
        what = f"{type(layer).__name__} {layer.name!r}"
        raise ValueError(
            "An exit is aligned by the weights of the layer at its end, a keras.layers.Dense "
            "without activation that nothing else uses. "
            f"Received: exit {name!r}, which ends in {what}{f', called {calls} times' * is_map}. "
            "Give the exit a branch that ends in a keras.layers.Dense of its own."
        )
    return layer._inbound_nodes[index].input_tensors[0], layer


def _checked(name: str, array: Array) -> Array:
    if not np.isfinite(array).all():
        raise ValueError(
            "Exits are aligned on finite numbers. "
            f"Received: NaN or infinity before the end of exit {name!r}. Look for such inputs."
        )
    return array


class _Sums:
    """Sums over rows of what a dense layer reads and of what the last exit gives, in float64.

    Args:
        has_bias: Whether the layer has one.
    """

    def __init__(self, has_bias: bool) -> None:
        self._has_bias, self._rows, self._squares = has_bias, 0, 0.0
        self._read: Any = 0.0
        self._given: Any = 0.0
        self._of_read: Any = 0.0
        self._of_both: Any = 0.0

    def add(self, read: Array, given: Array) -> None:
        """Add some rows."""
        self._rows += len(read)
        self._squares += float(np.square(given).sum())
        self._read = self._read + read.sum(axis=0)
        self._given = self._given + given.sum(axis=0)
        self._of_read = self._of_read + read.T @ read
        self._of_both = self._of_both + read.T @ given

    def solve(self, ridge: float) -> tuple[list[Array], float]:
        """Return the weights of the layer, and the share of the variance that they explain."""
        mean, target = self._read / self._rows, self._given / self._rows
        variance = self._squares - self._rows * target @ target
        read, both, squares = self._of_read, self._of_both, self._squares
        if self._has_bias:
            read = read - self._rows * np.outer(mean, mean)
            both = both - self._rows * np.outer(mean, target)
            squares = variance
        penalty = max(ridge * np.trace(read) / len(read), np.finfo(np.float64).tiny)
        kernel = np.linalg.solve(read + penalty * np.eye(len(read)), both)
        rest = squares - 2 * np.sum(kernel * both) + np.sum(kernel * (read @ kernel))
        explained = 1.0 - rest / variance if variance > 0 else 1.0
        weights = [kernel, target - mean @ kernel] if self._has_bias else [kernel]
        return [own.astype(np.float32) for own in weights], float(explained)
