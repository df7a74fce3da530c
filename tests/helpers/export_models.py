"""Small models with fixed weights, and what they should answer, counted in NumPy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead
from keras_mrl_export import export, export_saved_model, process
from keras_mrl_export.job import Job
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.contract import MANIFEST_FILE, Manifest

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

DIMS, NUM_CLASSES, TOP_K = (2, 4, 16), 10, 3
NAMES = tuple("null eins zwei drei vier fünf sechs sieben acht neun".split())
TEMPERATURES = {2: 0.5, 4: 1.0, 16: 2.5}
ROWS, SAMPLED = 48, 16  # the sample is the first rows; the tests ask for others

only_tensorflow = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="the export runs in this process only there"
)


def untied() -> keras.Model:
    """A `MatryoshkaClassifier` over a sequential backbone with a named input."""
    backbone = keras.Sequential(
        [
            keras.Input((6, 6, 3), name="image"),
            keras.layers.Conv2D(8, 3, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Flatten(),
            keras.layers.Dense(DIMS[-1]),
        ]
    )
    model = MatryoshkaClassifier(backbone, MatryoshkaHead(NUM_CLASSES, DIMS), name="untied")
    return with_fixed_weights(model, {"": images()})


def tied() -> keras.Model:
    """A functional model of two named inputs that ends in a tied head; its features are wider."""
    inputs = [keras.Input((5,), name="right"), keras.Input((7,), name="left")]
    joined = keras.layers.Concatenate()([keras.layers.Dense(8)(tensor) for tensor in inputs])
    features = keras.layers.Dense(DIMS[-1] + 4, activation="tanh")(joined)
    logits = MatryoshkaHead(NUM_CLASSES, DIMS, tied=True)(features)
    return with_fixed_weights(keras.Model(inputs, logits, name="tied"), sides())


@keras.saving.register_keras_serializable(package="tests")
class Tokens(keras.Model):
    """A subclassed backbone of integer tokens."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.embedding = keras.layers.Embedding(11, DIMS[-1])

    def build(self, input_shape: Any) -> None:
        self.embedding.build(input_shape)

    def call(self, tokens: Any) -> Any:
        return keras.ops.mean(self.embedding(tokens), axis=1)

    def compute_output_shape(self, input_shape: Any) -> Any:
        return (input_shape[0], DIMS[-1])


def of_tokens() -> keras.Model:
    """A classifier over a subclassed backbone, without names and without a policy."""
    model = MatryoshkaClassifier(Tokens(), MatryoshkaHead(NUM_CLASSES, DIMS), name="tokens")
    return with_fixed_weights(model, {"": tokens()})


def encoder() -> keras.Model:
    """A model without a head, whose input has the name Keras made up for it."""
    inputs = keras.Input((7,))
    features = keras.layers.Dense(20)(keras.layers.Dense(9, activation="relu")(inputs))
    return with_fixed_weights(keras.Model(inputs, features, name="encoder"), {"": sides()["left"]})


def images(rows: int = ROWS) -> Array:
    return np.random.default_rng(1).normal(size=(rows, 6, 6, 3)).astype(np.float32)


def sides(rows: int = ROWS) -> Arrays:
    rng = np.random.default_rng(2)
    return {
        "left": rng.normal(size=(rows, 7)).astype(np.float32),
        "right": rng.normal(size=(rows, 5)).astype(np.float32),
    }


def tokens(rows: int = ROWS) -> Array:
    return np.random.default_rng(3).integers(0, 11, size=(rows, 6)).astype(np.int32)


def with_fixed_weights(model: keras.Model, rows: Arrays) -> keras.Model:
    """Build the model and give it the same weights on every backend, statistics included."""
    model.predict(given(rows, slice(0, 1)), verbose=0)
    rng = np.random.default_rng(0)
    values = [rng.normal(size=w.shape, scale=0.6).astype(np.float32) for w in model.weights]
    for weight, value in zip(model.weights, values, strict=True):
        weight.assign(np.abs(value) + 0.1 if "variance" in weight.path else value)
    return model


def given(rows: Arrays, part: slice) -> Any:
    """What a caller gives: a bare array, or arrays by name."""
    cut = {name: array[part] for name, array in rows.items()}
    return cut[""] if set(cut) == {""} else cut


@contextmanager
def jobs_seen() -> Iterator[list[Job]]:
    """The jobs that exports build meanwhile."""
    seen: list[Job] = []
    build = process.build_on_tensorflow

    def watched(model: keras.Model, job: Job) -> Path:
        seen.append(job)
        return build(model, job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "build_on_tensorflow", watched)
        yield seen


@dataclass(frozen=True, eq=False)
class Exported:
    """A published version, the Keras model it was made of, and rows to ask both."""

    model: keras.Model
    backbone: keras.Model
    rows: Arrays
    path: Path
    job: Job
    session: SavedModelSession
    policy: CascadePolicy | None = None
    quality: Mapping[int, Mapping[str, float]] | None = None

    @cached_property
    def manifest(self) -> Manifest:
        return Manifest.from_json((self.path / MANIFEST_FILE).read_text())

    @cached_property
    def features(self) -> Array:
        return np.asarray(self.backbone.predict(given(self.rows, slice(None)), verbose=0))

    @cached_property
    def logits(self) -> Array:
        """By dim."""
        return np.asarray(self.model.predict(given(self.rows, slice(None)), verbose=0))

    def inputs(self, part: slice) -> Arrays:
        """By the names that are served."""
        return {self.job.input_names[key]: array[part] for key, array in self.rows.items()}

    def ask(self, signature: str, part: slice) -> Arrays:
        return self.session.run(signature, self.inputs(part))


@contextmanager
def exported(
    model: keras.Model,
    backbone: keras.Model,
    rows: Arrays,
    base_path: Path,
    policy: CascadePolicy | None = None,
    quality: Mapping[int, Mapping[str, float]] | None = None,
    **arguments: Any,
) -> Iterator[Exported]:
    sample = given(rows, slice(0, SAMPLED))
    with jobs_seen() as jobs:
        path = export_saved_model(model, base_path, sample, policy, quality=quality, **arguments)
    with SavedModelSession(path) as session:
        yield Exported(model, backbone, rows, path, jobs[0], session, policy, quality)


def halving_policy(logits: Array) -> CascadePolicy:
    """A cascade at each of whose stages half of the rows stop, half of those left at the next."""
    stages = []
    left = np.arange(len(logits))
    for index, dim in enumerate(DIMS[:-1]):
        sure = confidence(logits[left, index], TEMPERATURES[dim])
        low, high = np.sort(sure)[len(sure) // 2 - 1 : len(sure) // 2 + 1]
        threshold = float(np.float32(low + (high - low) / 2))
        stages.append(Stage(dim, threshold, TEMPERATURES[dim]))
        left = left[sure <= threshold]
    return CascadePolicy((*stages, Stage(DIMS[-1], None, TEMPERATURES[DIMS[-1]])))


def probabilities(logits: Array, temperature: float) -> Array:
    """Softmax in float64."""
    raised = np.exp(logits.astype(np.float64) / temperature)
    return raised / raised.sum(axis=-1, keepdims=True)


def confidence(logits: Array, temperature: float) -> Array:
    return probabilities(logits, temperature).max(axis=-1)


def classification(logits: Array, temperature: float, top_k: int, names: bool) -> Arrays:
    """The outputs of `classify_<m>`, from logits `(rows, classes)`."""
    share = probabilities(logits, temperature)
    ids = np.argsort(-share, axis=-1)[:, :top_k]
    best = np.take_along_axis(share, ids, axis=-1)
    answer = {"class_ids": ids, "probabilities": best, "confidence": best[:, 0]}
    if names:
        answer["labels"] = np.array([name.encode() for name in NAMES], object)[ids]
    return answer


def cascade(logits: Array, policy: CascadePolicy, top_k: int, names: bool) -> Arrays:
    """The outputs of `classify_adaptive`, row by row, from logits `(rows, dims, classes)`."""
    rows = []
    for row in logits:
        for index, stage in enumerate(policy.stages):
            at = row[None, DIMS.index(stage.dim)]
            last = index == len(policy.stages) - 1
            if last or confidence(at, stage.temperature)[0] > np.float32(stage.threshold or 0):
                answer = classification(at, stage.temperature, top_k, names)
                rows.append({**answer, "dim": np.array([stage.dim])})
                break
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def assert_equal_rows(served: Array, expected: Array) -> None:
    """Equal as the contract says: within 1e-5 of a row's largest magnitude; ids and names wholly.

    The rows of these models are chosen so that no two of a row's confidences come that near.
    """
    assert served.shape == expected.shape
    if expected.dtype.kind in "iuO":
        np.testing.assert_array_equal(served, expected)
    elif expected.size:
        magnitude = np.abs(expected) if expected.ndim == 1 else np.abs(expected).max(-1)[:, None]
        difference = np.abs(served - expected)
        assert (difference <= 1e-5 * magnitude).all(), difference.max()
