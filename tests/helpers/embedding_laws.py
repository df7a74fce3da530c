"""Losses on embeddings and the encoder, as the laws of `tests/helpers/laws.py` need them."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from keras_mrl import (
    ContrastiveLoss,
    MatryoshkaEmbeddingLoss,
    MatryoshkaEncoder,
    SupervisedContrastiveLoss,
)
from tests.helpers import laws
from tests.helpers.laws import Example, NestedEmbeddingLoss, Wrong
from tests.helpers.small_models import DIMS, X, Y, backbone

RANDOM = np.random.default_rng(2)
ROWS = RANDOM.normal(size=(12, 8)).astype("float32")
IDS = np.arange(12)
PAIRS = RANDOM.normal(size=(12, 2, 8)).astype("float32")
UNIT_ROWS = ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)


def with_loss(loss: keras.losses.Loss) -> keras.Model:
    """On rows of two sides for pairs, else of one."""
    inputs = keras.Input((5,))
    sides = 2 if isinstance(loss, ContrastiveLoss) else 1
    rows = keras.layers.Dense(8 * sides)(inputs)
    model = keras.Model(inputs, keras.layers.Reshape((2, 8))(rows) if sides == 2 else rows)
    model.compile("sgd", loss)
    return model


def with_encoder(encoder: MatryoshkaEncoder) -> keras.Model:
    encoder.compile("sgd", SupervisedContrastiveLoss(DIMS))
    return encoder


def squares(**arguments: Any) -> keras.losses.Loss:
    return MatryoshkaEmbeddingLoss(keras.losses.MeanSquaredError(), DIMS, **arguments)


TEMPERATURE = Wrong(
    make=lambda: ContrastiveLoss(DIMS, temperature=0.0),
    error=ValueError,
    sentence=(
        "temperature must be a positive number. Received: temperature=0.0. "
        "Give for example 0.05: cosines lie in -1..1 and a softmax needs more."
    ),
)
CHUNK_SIZE = Wrong(
    make=lambda: SupervisedContrastiveLoss(DIMS, chunk_size=0),
    error=ValueError,
    sentence=(
        "chunk_size must be a positive integer. Received: chunk_size=0. "
        "Give how many rows are compared at a time, or None for all at once."
    ),
)
INNER = Wrong(
    make=lambda: MatryoshkaEmbeddingLoss("mse", DIMS),
    error=TypeError,
    sentence=(
        "loss must be a Keras loss on embeddings of one width. Received: 'mse'. "
        "Give an instance, for example keras.losses.CosineSimilarity(); logits of classes need a "
        "MatryoshkaHead and MatryoshkaLoss."
    ),
)
TOO_WIDE = Wrong(
    make=lambda: squares(nested_targets=True)(ROWS[:, :4], ROWS[:, :4]),
    error=ValueError,
    sentence=(
        "dims must not exceed the width of the features. "
        "Received: dims=(2, 4, 8) for features of width 4. "
        "Drop the dims above 4, or widen the layer that makes the features."
    ),
)
TOWER = Wrong(
    make=lambda: MatryoshkaEncoder("tower"),
    error=TypeError,
    sentence=(
        "The towers of a MatryoshkaEncoder are Keras models. Received: 'tower'. "
        "Give any model from inputs to features, for example keras.Model(x, features)."
    ),
)


def example(make: Callable[[], Any], y: Any, inputs: tuple[Any, ...], *wrong: Wrong) -> Example:
    model = with_encoder if isinstance(make(), keras.Model) else with_loss
    return Example(make=make, model=model, x=X, y=y, inputs=inputs, wrong=wrong)


EXAMPLES: dict[str, Example] = {
    "embedding-loss": example(
        lambda: squares(weights=(2.0, 1.0, 0.5), nested_targets=True),
        ROWS,
        (ROWS, ROWS[::-1]),
        INNER,
        TOO_WIDE,
    ),
    "contrastive": example(
        lambda: ContrastiveLoss(DIMS, temperature=1.0), Y, (Y, PAIRS), TEMPERATURE
    ),
    "contrastive-flat": example(
        lambda: ContrastiveLoss(DIMS, temperature=1.0, symmetric=True, chunk_size=5),
        Y,
        (Y, PAIRS),
        TEMPERATURE,
    ),
    "supervised": example(
        lambda: SupervisedContrastiveLoss(DIMS, temperature=1.0), Y, (Y, ROWS), CHUNK_SIZE
    ),
    "encoder": example(
        lambda: MatryoshkaEncoder(backbone(), initial_temperature=1.0), Y, (X,), TOWER
    ),
}


def pairs_in_keras(labels: Any, unit: Any) -> Any:
    del labels
    cosines = unit[:, 0] @ unit[:, 1].T
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return laws.as_float(loss(np.arange(len(unit)), cosines / 0.05))


def labels_in_keras(labels: Any, unit: Any) -> Any:
    """Cross-entropy with every other row of the label as likely as the next."""
    others = ~np.eye(len(unit), dtype=bool)
    right = (labels[:, None] == labels) & others
    loss = keras.losses.CategoricalCrossentropy(from_logits=True)
    logits = np.where(others, unit @ unit.T / 0.1, -1e9)
    return laws.as_float(loss(right / right.sum(axis=1, keepdims=True), logits))


def squares_in_keras(labels: Any, unit: Any) -> Any:
    return laws.as_float(keras.losses.MeanSquaredError()(labels, unit))


def contrastive(weights: Sequence[float] | None, dims: Sequence[int]) -> keras.losses.Loss:
    return ContrastiveLoss(dims, weights)


def contrastive_flat(weights: Sequence[float] | None, dims: Sequence[int]) -> keras.losses.Loss:
    return ContrastiveLoss(dims, weights, chunk_size=5)


def supervised(weights: Sequence[float] | None, dims: Sequence[int]) -> keras.losses.Loss:
    return SupervisedContrastiveLoss(dims, weights)


def distilled(weights: Sequence[float] | None, dims: Sequence[int]) -> keras.losses.Loss:
    inner = keras.losses.MeanSquaredError()
    return MatryoshkaEmbeddingLoss(inner, dims, weights, nested_targets=True)


NESTED_LOSSES: dict[str, NestedEmbeddingLoss] = {
    "pairs": NestedEmbeddingLoss(
        make_at=contrastive, plain=pairs_in_keras, labels=IDS, logits=PAIRS
    ),
    "pairs-flat": NestedEmbeddingLoss(
        make_at=contrastive_flat, plain=pairs_in_keras, labels=IDS, logits=PAIRS
    ),
    "labels": NestedEmbeddingLoss(make_at=supervised, plain=labels_in_keras, labels=Y, logits=ROWS),
    "distilled": NestedEmbeddingLoss(
        make_at=distilled, plain=squares_in_keras, labels=UNIT_ROWS, logits=ROWS[::-1].copy()
    ),
}
NESTED_LAWS: tuple[Callable[[NestedEmbeddingLoss], None], ...] = (
    laws.weight_zero_beyond_is_absence,
    laws.weights_add,
    laws.no_weights_are_ones,
    laws.one_dim_is_the_inner_loss,
    laws.permuting_the_batch_permutes_the_result,
    laws.nothing_is_learnt_beyond_the_widest_prefix,
)
