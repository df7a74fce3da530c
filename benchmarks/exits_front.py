"""A linear classifier over n-grams of words and characters, as a Keras model over token ids.

The characters of a token are known, so the weights of its n-grams of characters are added up
beforehand, to one vector per token. Pairs of tokens are hashed. A text is the sum of the vectors of
its tokens and pairs, divided by the length that its TF-IDF would have if no n-gram came twice: that
is two look-ups, and nothing is multiplied but the scores of the classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

Ids = list[npt.NDArray[np.int32]]
Floats = npt.NDArray[np.float64]

NAME = "ngrams"
_PAIRS = 32_768
_WORDS = 2.0  # how much a word or a pair counts beside an n-gram of characters
_RUNS = (2, 3, 4, 5)  # characters


@dataclass(frozen=True)
class Ngrams:
    """What was learned.

    Args:
        tokens: For every token its scores of all classes, and the square of its length.
        pairs: The same for every hash of two tokens.
        bias: One number per class.
        axes: Orthonormal; the first axes hold most of the scores of the training rows, so that a
            prefix of the features says most.
    """

    tokens: Floats
    pairs: Floats
    bias: Floats
    axes: Floats

    @classmethod
    def learn(
        cls, rows: Ids, labels: npt.NDArray[Any], vocabulary: Sequence[str], cost: float = 2.0
    ) -> Ngrams:
        """Learn the scores by a linear support vector machine.

        Args:
            rows: Token ids.
            labels: Class ids, of three classes or more.
            vocabulary: The tokens by id.
            cost: C of the machine.
        """
        from scipy import sparse
        from sklearn.svm import LinearSVC

        runs = _runs_of(vocabulary)
        tokens, pairs = _counts(rows, len(vocabulary))
        words, both = _inverse_frequency(tokens), _inverse_frequency(pairs)
        runs = runs @ sparse.diags(_inverse_frequency(tokens @ runs))
        squares = np.concatenate(
            [
                _WORDS**2 * words**2 + np.asarray(runs.multiply(runs).sum(axis=1))[:, 0],
                _WORDS**2 * both**2,
            ]
        )
        lengths = np.sqrt(sparse.hstack([tokens, pairs]) @ squares)
        columns = [
            _WORDS * (tokens @ sparse.diags(words)),
            _WORDS * (pairs @ sparse.diags(both)),
            tokens @ runs,
        ]
        vectors = (sparse.diags(1 / lengths) @ sparse.hstack(columns)).tocsr()
        machine = LinearSVC(C=cost).fit(vectors, labels)
        weights = np.split(machine.coef_.T, [len(vocabulary), len(vocabulary) + _PAIRS])
        of_tokens = _WORDS * words[:, None] * weights[0] + runs @ weights[2]
        of_pairs = _WORDS * both[:, None] * weights[1]
        scores = machine.decision_function(vectors)
        axes = np.linalg.svd(scores, full_matrices=False)[2].T
        return cls(
            np.column_stack([of_tokens, squares[: len(vocabulary)]]),
            np.column_stack([of_pairs, squares[len(vocabulary) :]]),
            machine.intercept_,
            axes,
        )

    def model(self, width: int) -> keras.Model:
        """Return a model from the inputs of a BERT of keras-hub to features `(batch, width)`."""
        ops, layers = keras.ops, keras.layers
        names = ("token_ids", "padding_mask", "segment_ids")
        inputs = {name: keras.Input((None,), dtype="int32", name=name) for name in names}
        ids, steps = inputs["token_ids"], inputs["padding_mask"]
        following = ops.pad(ids[:, 1:], [[0, 0], [0, 1]])
        tables = {"token_scores": self.tokens, "pair_scores": self.pairs}
        looked_up = [ids, _hashed(ids, following)]
        sums: Any = 0.0
        for (name, table), index in zip(tables.items(), looked_up, strict=True):
            embedding = layers.Embedding(*table.shape, name=name)
            vectors = embedding(index)
            embedding.set_weights([table])
            counted = ops.expand_dims(ops.cast(steps, vectors.dtype), -1)
            sums = sums + ops.sum(vectors * counted, axis=1)
        scores = sums[:, :-1] / ops.sqrt(ops.maximum(sums[:, -1:], 1e-6))
        rotate = layers.Dense(width, name="axes")
        features = rotate(scores)
        missing = width - self.axes.shape[1]
        kernel = np.pad(self.axes, [[0, 0], [0, missing]])
        rotate.set_weights([kernel, self.bias @ kernel])
        model = keras.Model(inputs, features, name=NAME)
        model.trainable = False
        return model

    def kernel(self, dim: int) -> Floats:
        """Return the kernel from the first `dim` features to scores, `(dim, classes)`."""
        missing = max(0, dim - self.axes.shape[1])
        return np.pad(self.axes.T[:dim], [[0, missing], [0, 0]])


def _hashed(ids: Any, following: Any) -> Any:
    return (ids * 7919 + following * 31) % _PAIRS


def _counts(rows: Ids, num_tokens: int) -> tuple[Any, Any]:
    """Return how often each token and each pair stands in each row, as sparse matrices."""
    from scipy import sparse

    row = np.repeat(np.arange(len(rows)), [len(own) for own in rows])
    ids = np.concatenate(rows)
    following = np.concatenate([np.append(own[1:], 0) for own in rows])
    ones = np.ones(len(ids))
    return (
        sparse.csr_matrix((ones, (row, ids)), (len(rows), num_tokens)),
        sparse.csr_matrix((ones, (row, _hashed(ids, following))), (len(rows), _PAIRS)),
    )


def _runs_of(vocabulary: Sequence[str]) -> Any:
    """Return how often each run of characters stands in each token, as a sparse matrix."""
    from scipy import sparse

    runs = [_runs_in(token) for token in vocabulary]
    number = {run: i for i, run in enumerate(dict.fromkeys(run for own in runs for run in own))}
    row = np.repeat(np.arange(len(runs)), [len(own) for own in runs])
    column = [number[run] for own in runs for run in own]
    return sparse.csr_matrix((np.ones(len(row)), (row, column)), (len(runs), len(number)))


def _runs_in(token: str) -> list[str]:
    if token.startswith("[") and token.endswith("]") and len(token) > 1:
        return []  # [CLS] and its like
    text = f"{token[2:]} " if token.startswith("##") else f" {token} "
    return [text[i : i + n] for n in _RUNS for i in range(len(text) - n + 1)]


def _inverse_frequency(counts: Any) -> Floats:
    """Return the weight of each column by how few rows have it, 0 where none has."""
    rows_with = np.asarray((counts > 0).sum(axis=0))[0]
    weights = np.log((1 + counts.shape[0]) / (1 + rows_with)) + 1
    return np.asarray(np.where(rows_with > 0, weights, 0.0))
