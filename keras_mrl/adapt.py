"""Matryoshka for embeddings that were not trained so: `MatryoshkaAdaptor`.

The projection is orthogonal. A rotation changes no cosine at the full width, so answers and
thresholds of an application stay as they are, a query costs one product of a matrix, and the whole
artefact is that matrix. A matrix without that bound learns no better prefixes.

What is learnt are the leading directions alone, as many as the widest dim below the full width, in
the coordinates of the principal components. The others are the principal components of the rest.
The matrix of directions is kept orthonormal by Newton-Schulz steps, which are products of matrices
on every backend: one in the forward pass, so that the gradient is that of turning the directions
and not of stretching them, and some more after each step of the optimizer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import keras
import numpy as np
from keras import ops

from keras_mrl_serving.integers import check_positive_integer
from keras_mrl_serving.projection import (
    Projection,
    check_rows,
    nested_dims,
    principal_directions,
    unit_rows,
)

from ._arrays import Array
from ._dims import check_weights
from .evaluation.projection import ProjectionReport, score_projection
from .losses.rankings import listwise_divergences, pairwise_differences
from .models.projection import fold, projection_layer

METHODS = ("pca", "listwise", "pairwise")

_LEAST_ROWS = 64  # that a projection is learnt from
_NEIGHBORS = 12  # of an anchor, that come with it into a batch
_SHARE_OF_ANCHORS, _SHARE_OF_PAIRS = 48, 8  # one in so many rows of a batch
_EPOCHS, _PATIENCE = 10, 4
_VALIDATED, _HELD_OUT = 4, 20  # batches; of one row, and of one pair, in so many
_SCORED_AT_ONCE = 1024
_NEAREST = 10  # whose cosines count twice in the pairwise objective


class MatryoshkaAdaptor:
    """An orthogonal projection after which prefixes of embeddings answer like whole ones.

    In scikit-learn's habit: `fit`, then `transform`. What `fit` makes bears a trailing underscore.

    Args:
        dims: Prefix lengths that shall be useful, increasing.
        method: "pca": principal components, not centred, in closed form. "listwise": learnt from
            there, so that the softmax over the nearest rows is at every dim what it is at the full
            width. "pairwise": learnt from there by the objective of Matryoshka-Adaptor, so that
            cosines are.
        max_dim: How many directions there are to be. None means as many as the embeddings are
            wide, which is a rotation: every cosine at the full width stays as it is. With
            fewer, such as 256 for embeddings of 3,072 dims, a query is projected faster; its
            shortlist is then compared by the embeddings as they are.
        weights: How much each dim counts while learning; None for the same. Dims at the full width
            have nothing to learn.
        steps: Of the optimizer.
        batch_size: Rows of a step.
        learning_rate: Of Adam; it falls to zero by a cosine.
        temperature: Of the softmax over cosines, and of ranking pairs.
        max_rows: Rows that are read to fit, drawn from those that are given. They are in memory.
        encoder_fingerprint: Fingerprint of the model that makes the embeddings, from its manifest.
        seed: Of the rows and of the batches.
        verbose: 1 shows progress, 0 does not.

    Attributes:
        components_: The directions, float32 `(directions, width)`, one a row.
        projection_: The same as a `keras_mrl_serving.Projection`, which needs no Keras.
        rows_: Numbers of the rows that `fit` read. The others can judge it.
        history_: The loss of learning by epoch; of rows held out as `val_loss`.

    Raises:
        ValueError: If an argument is none of these.

    Formula:
        listwise: sum_m KL(softmax_j(cos_ij / T) || softmax_j(s_m cos_m_ij / T)); pairwise:
        sum_m mean_j |cos_ij - cos_m_ij| + mean_(j nearest) |cos_ij - cos_m_ij|. cos_m is of the
        first m coordinates, s_m is learnt, j runs over the other rows of a batch.

    Reference:
        Yoon et al., Matryoshka-Adaptor, arXiv 2407.20243 (the pairwise objective;
        there the map is not orthogonal, and a third term holds it near the identity). Hinton
        et al., Distilling the Knowledge in a Neural Network, arXiv 1503.02531 (the softmax).

    Examples:
        >>> rows = np.random.default_rng(0).normal(size=(500, 32)).astype("float32")
        >>> adaptor = MatryoshkaAdaptor(dims=(8, 16), method="listwise", steps=10, verbose=0)
        >>> adaptor.fit(rows).transform(rows, dim=8).shape
        (500, 8)
        >>> adaptor.components_.shape
        (32, 32)
    """

    def __init__(
        self,
        dims: Sequence[int],
        method: str = "pca",
        max_dim: int | None = None,
        *,
        weights: Sequence[float] | None = None,
        steps: int = 600,
        batch_size: int = 384,
        learning_rate: float = 4e-3,
        temperature: float = 0.05,
        max_rows: int = 10_000,
        encoder_fingerprint: str | None = None,
        seed: int = 0,
        verbose: int = 1,
    ) -> None:
        if method not in METHODS:
            raise ValueError(
                'method must be "pca", "listwise" or "pairwise". '
                f'Received: method={method!r}. Take "pca" if unsure: it needs no training.'
            )
        for name, number in (("learning_rate", learning_rate), ("temperature", temperature)):
            if not (math.isfinite(number) and number > 0):
                raise ValueError(
                    f"{name} must be a positive number. Received: {name}={number!r}. "
                    "Leave it out for the usual one."
                )
        widest = max_dim if max_dim is not None else max(dims, default=0)
        self.dims = nested_dims(dims, widest, max_dim)
        self.method = method
        self.max_dim = max_dim
        self.weights = check_weights(weights, len(self.dims))
        self.steps = check_positive_integer("steps", steps, "Give for example 600.")
        self.batch_size = check_positive_integer("batch_size", batch_size, "Give 384.")
        self.learning_rate = learning_rate
        self.temperature = temperature
        self.max_rows = check_positive_integer("max_rows", max_rows, "Give for example 10000.")
        self.encoder_fingerprint = encoder_fingerprint
        self.seed = seed
        self.verbose = verbose
        self.history_: dict[str, list[float]] = {}

    def fit(self, X: Any, pairs: tuple[Any, Any] | None = None) -> Self:
        """Make the projection from embeddings.

        Args:
            X: Embeddings `(rows, width)`, raw or scaled; memory-mapped ones may be larger than
                the memory. No labels are needed.
            pairs: Queries and their right answers, where there are some: embeddings
                `(queries, width)`, and for each the number of its row in `X`. A projection that
                is learnt then also ranks these rows first; principal components take no notice.

        Returns:
            This adaptor.

        Raises:
            ValueError: If embeddings or pairs do not fit, are not finite, or are too few.
        """
        width = check_rows(X)
        dims = nested_dims(self.dims, width, self.max_dim)
        number = width if self.max_dim is None else min(self.max_dim, width)
        rng = np.random.default_rng(self.seed)
        self.rows_ = np.sort(rng.permutation(len(X))[: self.max_rows])
        rows = unit_rows(X[self.rows_])
        paired = None
        if pairs is not None:
            numbers = check_pairs(X, *pairs)
            drawn = np.sort(rng.permutation(len(numbers))[: self.max_rows])
            paired = unit_rows(np.asarray(pairs[0])[drawn]), unit_rows(X[numbers[drawn]])
        learnt_dims = tuple(dim for dim in dims if dim < width)
        if self.method == "pca" or not learnt_dims:
            directions = principal_directions(rows, number)
        else:
            leading = self._learn(rows, paired, learnt_dims, rng)
            directions = principal_directions(rows, number, after=leading)
        self.projection_ = Projection(
            directions.astype(np.float32), dims, self.method, self.encoder_fingerprint
        )
        return self

    def transform(self, X: Any, dim: int | None = None) -> Array:
        """Return projected embeddings, float32 `(rows, dim)`, not scaled; None for all directions.

        Args:
            X: Embeddings `(rows, width)`, raw or scaled.
            dim: How many coordinates are returned.
        """
        return self._fitted().transform(X, dim)

    def fit_transform(self, X: Any, pairs: tuple[Any, Any] | None = None) -> Array:
        """Return the embeddings it was fitted to, projected."""
        return self.fit(X, pairs).transform(X)

    @property
    def components_(self) -> Array:
        """The directions, float32 `(directions, width)`, one a row."""
        return self._fitted().components

    @property
    def fingerprint(self) -> str:
        """What an index of projected embeddings has as `encoder_fingerprint`."""
        return self._fitted().fingerprint

    def report(
        self, gallery: Any, queries: Any, k: int = 10, pairs: tuple[Any, Any] | None = None
    ) -> ProjectionReport:
        """Return what prefixes are worth on held-out rows, beside truncation and PCA.

        Args:
            gallery: Embeddings `(rows, width)` that `fit` has not read.
            queries: Others `(queries, width)`, of which none is in the gallery.
            k: How many full-width neighbours are looked for.
            pairs: Embeddings of other queries, and the number of the right row of each in
                `gallery`.
        """
        return score_projection(self._fitted(), gallery, queries, k, pairs)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the projection to a folder, from which `keras_mrl_serving.Projection` reads it."""
        self._fitted().save(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Return a fitted adaptor from a folder.

        Raises:
            FileNotFoundError: If no projection is there.
            DamagedIndexError: If it is not as it was written.
        """
        projection = Projection.load(path)
        adaptor = cls(
            projection.dims,
            projection.method,
            len(projection.components),
            encoder_fingerprint=projection.encoder_fingerprint,
        )
        adaptor.projection_ = projection
        return adaptor

    def layer(self, name: str = "matryoshka_projection") -> keras.layers.Dense:
        """Return the projection as a built Keras layer, frozen: `(..., width)` to `(..., number)`.

        Args:
            name: Of the layer.
        """
        return projection_layer(self.components_, name)

    def fold(self, model: keras.Model) -> keras.Model:
        """Return an encoder whose embeddings are the projected ones of `model`.

        Where the encoder ends in a linear `Dense`, that layer's weights are projected and the
        projection costs nothing; else it is a layer at the end. `export_saved_model` takes the
        encoder, with `dims=adaptor.dims`.

        Args:
            model: A built model from inputs to embeddings `(batch, width)`: functional,
                sequential, or a `MatryoshkaEncoder` of one tower. It stays as it is.

        Raises:
            ValueError: If its embeddings are of another width.
        """
        return fold(model, self.components_)

    def _fitted(self) -> Projection:
        if not hasattr(self, "projection_"):
            raise ValueError(
                "An adaptor projects once it was fitted. Received: one that was not. "
                "Call fit(X) first, or MatryoshkaAdaptor.load(path)."
            )
        return self.projection_

    def _learn(
        self, rows: Array, pairs: Any, dims: tuple[int, ...], rng: np.random.Generator
    ) -> Array:
        """Return the leading directions, float64 `(dims[-1], width)`."""
        if len(rows) < _LEAST_ROWS:
            raise ValueError(
                f"A projection is learnt from at least {_LEAST_ROWS} rows. "
                f'Received: {len(rows)}. Give more, or take method="pca".'
            )
        basis = principal_directions(rows)
        turn = basis.T.astype(np.float32)
        turned = rows @ turn
        paired = () if pairs is None else (pairs[0] @ turn, pairs[1] @ turn)
        held_out = len(rows) // _HELD_OUT
        learning = _HardBatches(
            turned[held_out:],
            self.batch_size,
            rng,
            [side[len(side) // _HELD_OUT :] for side in paired],
        )
        validating = _HardBatches(
            turned[:held_out],
            self.batch_size,
            rng,
            [side[: len(side) // _HELD_OUT] for side in paired],
        )
        nearest = min(_NEAREST, learning.size - 1, validating.size - 1)
        learner = _Learner(dims, len(basis), self.method, self.temperature, nearest)
        learner.weights_of_dims = self.weights[: len(dims)]
        schedule = keras.optimizers.schedules.CosineDecay(self.learning_rate, self.steps)
        learner.compile(keras.optimizers.Adam(schedule), loss=_sum_of_dims)
        stop = keras.callbacks.EarlyStopping(
            "val_loss", patience=_PATIENCE, restore_best_weights=True
        )
        per_epoch = math.ceil(self.steps / _EPOCHS)
        history = learner.fit(
            _Batches([learning.draw] * per_epoch),
            epochs=math.ceil(self.steps / per_epoch),
            validation_data=_Batches(
                [partial(_same, validating.draw()) for _ in range(_VALIDATED)]
            ),
            callbacks=[stop],
            verbose=self.verbose,
        )
        self.history_ = history.history
        kernel = np.asarray(ops.convert_to_numpy(learner.kernel), np.float64)
        left, _, right = np.linalg.svd(kernel, full_matrices=False)
        return np.asarray((left @ right).T @ basis)


def check_pairs(rows: Any, queries: Any, numbers: Any) -> Array:
    """Return the numbers of right rows as an array.

    Args:
        rows: Embeddings `(rows, width)`.
        queries: Embeddings of queries `(queries, width)`.
        numbers: For each query the number of its row in `rows`.

    Raises:
        ValueError: If they do not fit.

    Examples:
        >>> from keras_mrl.adapt import check_pairs
        >>> check_pairs(np.eye(3), np.eye(3)[:2], [2, 0]).tolist()
        [2, 0]
    """
    places = np.asarray(numbers)
    fits = (
        np.ndim(queries) == 2
        and np.shape(queries)[1] == np.shape(rows)[1]
        and places.shape == (len(queries),)
        and places.dtype.kind in "iu"
        and places.size > 0
    )
    if not fits or places.min() < 0 or places.max() >= len(rows):
        raise ValueError(
            "pairs must be the embeddings of queries and, for each, the number of its row. "
            f"Received: queries of shape {np.shape(queries)} and {places.dtype} numbers of shape "
            f"{places.shape}, for rows of shape {np.shape(rows)}. "
            "Give (queries, numbers), counted from 0."
        )
    return places


# Batches: rows among others that are hard to tell from them.

_Batch = tuple[tuple[Array, Array], Array]


class _HardBatches:
    """Draws batches of some rows with their nearest, of pairs, and of random rows.

    Args:
        rows: Of unit length `(rows, width)`.
        size: Rows of a batch.
        rng: Draws them.
        pairs: Queries and their right rows, both `(pairs, width)` of unit length; or nothing.
    """

    def __init__(
        self,
        rows: Array,
        size: int,
        rng: np.random.Generator,
        pairs: Sequence[Array] = (),
    ) -> None:
        self.rows = rows
        self.pairs = pairs
        self.num_pairs = min(size // _SHARE_OF_PAIRS, len(pairs[0])) if pairs else 0
        self.size = min(size, len(rows))
        self.rng = rng
        self.neighbors = _neighbors(rows, min(_NEIGHBORS, len(rows) - 1))

    def draw(self) -> _Batch:
        """Return rows `(size, width)`, the place of the right row of each or -1, and zeros."""
        count = len(self.rows)
        anchors = self.rng.choice(count, max(1, self.size // _SHARE_OF_ANCHORS), replace=False)
        near = np.setdiff1d(self.neighbors[anchors], anchors)
        others = np.setdiff1d(np.arange(count), np.union1d(anchors, near), assume_unique=True)
        chosen = np.concatenate([anchors, self.rng.permutation(near), self.rng.permutation(others)])
        rows = self.rows[chosen[: self.size]]
        right = np.full(self.size, -1, np.int32)
        if self.num_pairs:
            drawn = self.rng.choice(len(self.pairs[0]), self.num_pairs, replace=False)
            rows = np.concatenate([rows, *(side[drawn] for side in self.pairs)])
            places = np.arange(self.size + self.num_pairs, len(rows), dtype=np.int32)
            right = np.concatenate([right, places, np.full(self.num_pairs, -1, np.int32)])
        return (rows, right), np.zeros((len(rows), 1), np.float32)


def _neighbors(rows: Array, count: int) -> Array:
    """Return the numbers of the rows nearest to each, `(rows, count)`, without itself."""
    nearest = np.empty((len(rows), count), np.int64)
    for start in range(0, len(rows), _SCORED_AT_ONCE):
        part = np.arange(start, min(start + _SCORED_AT_ONCE, len(rows)))
        scores = rows[part] @ rows.T
        scores[np.arange(len(part)), part] = -np.inf
        nearest[part] = np.argpartition(scores, -count, axis=1)[:, -count:]
    return nearest


class _Batches(keras.utils.PyDataset):
    """Batches as Keras takes them, each from a function when it is asked for."""

    def __init__(self, draws: Sequence[Callable[[], _Batch]]) -> None:
        super().__init__()
        self._draws = draws

    def __len__(self) -> int:
        return len(self._draws)

    def __getitem__(self, index: int) -> _Batch:
        return self._draws[index]()


def _same(batch: _Batch) -> _Batch:
    return batch


# The learner.


class _Learner(keras.Model):
    """From rows in the basis of their principal components to the loss of each, at every dim."""

    def __init__(
        self, dims: tuple[int, ...], width: int, method: str, temperature: float, nearest: int
    ) -> None:
        super().__init__(dtype="float32", name="matryoshka_adaptor")
        self.dims = dims
        self.method = method
        self.temperature = temperature
        self.nearest = nearest
        self.kernel = self.add_weight(
            shape=(width, dims[-1]), initializer="identity", constraint=orthonormal, name="kernel"
        )
        self.log_scales = self.add_weight(
            shape=(len(dims),), initializer="zeros", trainable=method == "listwise", name="scales"
        )

    def call(self, batch: Any) -> Any:
        """Return losses `(rows, num_dims)`."""
        rows, right = batch
        projected = ops.matmul(rows, orthonormal(self.kernel, steps=1))
        if self.method == "pairwise":
            losses = pairwise_differences(
                rows, projected, right, self.dims, self.temperature, self.nearest
            )
        else:
            scales = ops.exp(self.log_scales)
            losses = listwise_divergences(
                rows, projected, right, self.dims, scales, self.temperature
            )
        return losses * ops.convert_to_tensor(self.weights_of_dims, "float32")


def _sum_of_dims(_: Any, losses: Any) -> Any:
    """The loss of each row; Keras takes their mean."""
    return ops.sum(losses, axis=-1)


def orthonormal(kernel: Any, steps: int = 4) -> Any:
    """Return the orthonormal matrix nearest to one whose columns nearly are, by Newton-Schulz.

    Each step about squares the error. Of columns that are orthonormal a step changes nothing but
    the gradient, of which it leaves the part that turns them.

    Args:
        kernel: `(width, number)`, no singular value above 1.7.
        steps: How many.

    Reference:
        Higham, Functions of Matrices, 2008, section 8.3 (Newton-Schulz for the polar factor).

    Examples:
        >>> from keras_mrl.adapt import orthonormal
        >>> near = keras.ops.array([[0.7], [0.7]])
        >>> [round(float(row[0]), 4) for row in orthonormal(near)]
        [0.7071, 0.7071]
    """
    for _ in range(steps):
        gram = ops.matmul(ops.transpose(kernel), kernel)
        kernel = 1.5 * kernel - 0.5 * ops.matmul(kernel, gram)
    return kernel
