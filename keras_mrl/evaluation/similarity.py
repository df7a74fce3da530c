"""The worth of every dim for graded pairs: do its cosines grow with the grades of people?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_mrl_serving.embeddings import MIN_SQUARE
from keras_mrl_serving.inputs import as_float64

from .._arrays import Array, as_labels, check_features
from .._dims import blocks, check_dims
from .._tokens import tokenized
from ..models.cut import as_model, check_one_vector, gallery_backbone, split
from ..models.outputs import one_output
from ..text import preprocessor_of
from .inputs import check_inputs, dims_of
from .quality import Quality

_PAIRS = 8192  # whose products are held at a time


def score_similarity(first: Any, second: Any, grades: Any, dims: Sequence[int]) -> Quality:
    """Return how the cosines of pairs agree with their grades, at every dim.

    `spearman` is the correlation of the ranks (pairs with equal numbers share the mean of their
    ranks), `pearson` that of the numbers. Where all cosines of a dim are equal they order nothing,
    and both are 0. Cosines are compared as float32.

    Args:
        first: Embeddings of one side `(pairs, width)`.
        second: Embeddings of the other side `(pairs, width)`.
        grades: How similar each pair is, by people for example `(pairs,)`. Any scale, more for
            more similar.
        dims: Prefix lengths.

    Raises:
        ValueError: If the sides are no finite tables of one shape, at least as wide as the widest
            dim, or there is not one finite grade per pair, at least two of them different.

    Reference:
        Cer et al., SemEval-2017 Task 1 (STS), arXiv 1708.00055; Reimers et al., Task-Oriented
        Intrinsic Evaluation of Semantic Textual Similarity, 2016 (why Spearman).

    Examples:
        >>> first, second = [[1.0, 0.0]] * 3, [[1.0, 0.1], [1.0, 0.9], [-1.0, 0.5]]
        >>> print(score_similarity(first, second, grades=[5, 3, 0], dims=(1, 2)))
        dim  spearman  pearson
          1    0.8660   0.9177
          2    1.0000   0.9595
    """
    ladder = check_dims(dims)
    one, other = check_features(first, ladder[-1]), check_features(second, ladder[-1])
    truth = _check_grades(grades, len(one))
    if one.shape != other.shape:
        raise ValueError(
            "Both sides of the pairs must be of one shape. "
            f"Received: {one.shape} and {other.shape}. Row i of one is paired with row i of the "
            "other: embed both with models of one width."
        )
    cosines = _cosines(one, other, ladder)
    truth_ranks = _ranks(truth)
    return Quality(
        {
            dim: {
                "spearman": _correlation(_ranks(cosines[index]), truth_ranks),
                "pearson": _correlation(cosines[index].astype(np.float64), truth),
            }
            for index, dim in enumerate(ladder)
        }
    )


def _check_grades(grades: Any, pairs: int) -> Array:
    truth = as_float64("grades", as_labels(grades))
    if truth.shape != (pairs,) or not np.isfinite(truth).all() or not np.ptp(truth):
        raise ValueError(
            "grades must be finite numbers, one per pair, at least two of them different. "
            f"Received: an array of shape {truth.shape} with {len(np.unique(truth))} different "
            f"values for {pairs} pairs. Give for example those of STS, from 0 to 5."
        )
    return truth


def _cosines(one: Array, other: Array, ladder: tuple[int, ...]) -> Array:
    """The cosine of every pair at every dim, float32 `(num_dims, pairs)`."""
    cosines = np.empty((len(ladder), len(one)), np.float32)
    for start in range(0, len(one), _PAIRS):
        part = slice(start, start + _PAIRS)
        left, right = (side[part, : ladder[-1]].astype(np.float64) for side in (one, other))
        products = [
            np.cumsum([(a[:, x:y] * b[:, x:y]).sum(axis=1) for x, y in blocks(ladder)], axis=0)
            for a, b in ((left, right), (left, left), (right, right))
        ]
        dot, left_square, right_square = products
        lengths = np.maximum(left_square, MIN_SQUARE) * np.maximum(right_square, MIN_SQUARE)
        cosines[:, part] = dot / np.sqrt(lengths)
    return cosines


def _ranks(values: Array) -> Array:
    """Ranks from 1 up; equal values share the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[group]


def _correlation(values: Array, others: Array) -> float:
    if not np.ptp(values):
        return 0.0
    return float(np.corrcoef(values, others)[0, 1])


def evaluate_similarity(
    model: keras.Model,
    first: Any,
    second: Any,
    grades: Any,
    dims: Sequence[int] | None = None,
    batch_size: int = 256,
    verbose: int = 1,
    output: str | None = None,
) -> Quality:
    """Return how a model's cosines agree with grades: `score_similarity` of inputs.

    The second side of a `MatryoshkaEncoder` of two towers goes through the other tower.

    Args:
        model: A model that ends in a `MatryoshkaHead`, or whose output is the embedding.
        first: Inputs of one side: an array of rows, or a dict or tuple of such arrays.
        second: Inputs of the other side; row i is paired with row i of `first`.
        grades: How similar each pair is `(pairs,)`.
        dims: None means those of the head, or of the loss of a `MatryoshkaEncoder`.
        batch_size: Rows that are embedded at a time.
        verbose: 1 shows progress of both passes, 0 does not.
        output: Which output is judged, of a model with several.

    Raises:
        ValueError: As `score_similarity`. Pairs and grades are counted before anything is embedded.

    Examples:
        >>> model = keras.Sequential([keras.Input((20,)), keras.layers.Dense(16)])
        >>> one, noise = np.random.default_rng(0).normal(size=(2, 40, 20))
        >>> grades = np.linspace(0, 1, 40)
        >>> other = one + noise * (1 - grades[:, None])
        >>> quality = evaluate_similarity(model, one, other, grades, dims=(4, 16), verbose=0)
        >>> list(quality), list(quality[16])
        ([4, 16], ['spearman', 'pearson'])
    """
    preprocessor = preprocessor_of(model)
    model = one_output(model, output)
    backbone, head = split(model)
    check_one_vector(model, backbone)
    ladder = dims_of("evaluate_similarity", model, head, dims)
    first, pairs = check_inputs("first", first)
    second, others = check_inputs("second", second)
    _check_grades(grades, pairs)
    if pairs != others:
        raise ValueError(
            "Both sides of the pairs must have as many rows. "
            f"Received: {pairs} and {others}. Row i of one is paired with row i of the other."
        )
    body, other = as_model(backbone), gallery_backbone(model, backbone)
    gallery = body if other is backbone else as_model(other)
    one = body.predict(tokenized(preprocessor, first), batch_size=batch_size, verbose=verbose)
    other_side = gallery.predict(
        tokenized(preprocessor, second), batch_size=batch_size, verbose=verbose
    )
    return Quality(score_similarity(one, other_side, grades, ladder), output)
