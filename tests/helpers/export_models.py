"""Small models with fixed weights, their exports, and the answers expected of them, in NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest
import tensorflow as tf
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, MatryoshkaLoss, split
from keras_mrl_export import export, export_saved_model, process
from keras_mrl_export.job import Job
from keras_mrl_export.warmup import WARMUP_FILE
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.contract import MANIFEST_FILE, Manifest

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

DIMS, NUM_CLASSES, TOP_K = (2, 4, 16), 10, 3
NAMES = tuple("null eins zwei drei vier fünf sechs sieben acht neun".split())
TEMPERATURES = {2: 0.5, 4: 1.0, 16: 2.5}
ROWS, SAMPLED = 48, 16  # the sample is the first rows; the tests ask for others
X = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)

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
    """A model without a head, with an input that has only a name of Keras' own making."""
    inputs = keras.Input((7,))
    features = keras.layers.Dense(20)(keras.layers.Dense(9, activation="relu")(inputs))
    return with_fixed_weights(keras.Model(inputs, features, name="encoder"), {"": sides()["left"]})


def dense(head: bool = False, width: int = 8) -> keras.Model:
    """The smallest model of all: one layer, of rows like `X`, with a head or without."""
    inputs = keras.Input((5,), name="x")
    features = keras.layers.Dense(width)(inputs)
    if head:
        features = MatryoshkaHead(3, dims=(2, 4, width))(features)
    return of_one_class(keras.Model(inputs, features, name="small"))


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
    model(as_sample(rows, slice(0, 1)))
    rng = np.random.default_rng(0)
    values = [rng.normal(size=w.shape, scale=0.6).astype(np.float32) for w in model.weights]
    for weight, value in zip(model.weights, values, strict=True):
        weight.assign(np.abs(value) + 0.1 if "variance" in weight.path else value)
    return of_one_class(model)


def of_one_class(model: keras.Model) -> keras.Model:
    """The model, compiled as one whose rows have one class each, if it has a head."""
    if split(model)[1] is not None:
        model.compile(
            loss=MatryoshkaLoss(keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        )
    return model


def as_sample(rows: Arrays, part: slice) -> Any:
    """Some rows as a caller gives them: a bare array, or arrays by name."""
    arrays = {name: array[part] for name, array in rows.items()}
    return arrays[""] if set(arrays) == {""} else arrays


def outputs(model: keras.Model, rows: Any) -> Array:
    """The outputs of a Keras model, in NumPy, without a compilation."""
    return np.asarray(keras.ops.convert_to_numpy(model(rows, training=False)), np.float32)


@contextmanager
def recorded_jobs() -> Iterator[list[Job]]:
    """A list of the jobs that are built meanwhile."""
    jobs: list[Job] = []
    build = process.build_on_tensorflow

    def record(model: keras.Model, job: Job) -> Path:
        jobs.append(job)
        return build(model, job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "build_on_tensorflow", record)
        yield jobs


@dataclass(frozen=True, eq=False)
class Exported:
    """A published version, the Keras model it was made of, and rows to ask both."""

    model: keras.Model
    features: Array
    logits: Array  # (rows, dims, classes), or the features without a head
    rows: Arrays
    path: Path
    job: Job
    session: SavedModelSession

    @cached_property
    def manifest(self) -> Manifest:
        return read_manifest(self.path)

    @property
    def policy(self) -> CascadePolicy:
        assert self.job.policy is not None
        return self.job.policy

    def inputs(self, part: slice) -> Arrays:
        """Some rows by the names that are served."""
        return {self.job.input_names[key]: array[part] for key, array in self.rows.items()}

    def ask(self, signature: str, part: slice) -> Arrays:
        return self.session.run(signature, self.inputs(part))


@contextmanager
def exported(
    model: keras.Model,
    rows: Arrays,
    base_path: Path,
    *,
    reference: keras.Model | None = None,
    **arguments: Any,
) -> Iterator[Exported]:
    """Export a model; `reference` answers in its place where its own answers are less exact."""
    reference, everything = reference or model, as_sample(rows, slice(None))
    features, logits = outputs(split(reference)[0], everything), outputs(reference, everything)
    with recorded_jobs() as jobs:
        path = export_saved_model(model, base_path, as_sample(rows, slice(SAMPLED)), **arguments)
    with SavedModelSession(path) as session:
        yield Exported(model, features, logits, rows, path, jobs[0], session)


def read_manifest(path: Path) -> Manifest:
    return Manifest.from_json((path / MANIFEST_FILE).read_bytes())


def warmup_sizes(path: Path) -> dict[str, list[int]]:
    """The batch sizes of the warm-up records of each signature."""
    sizes: dict[str, list[int]] = {}
    for signature, inputs in warmup_records(path):
        (size,) = {len(array) for array in inputs.values()}
        sizes.setdefault(signature, []).append(size)
    return sizes


def warmup_records(path: Path) -> Iterator[tuple[str, Arrays]]:
    """The warm-up records of a version: each a signature with its inputs."""
    for record in tf.data.TFRecordDataset(str(path / WARMUP_FILE)):
        request = PredictionLog.FromString(record.numpy()).predict_log.request
        inputs = {name: tf.make_ndarray(proto) for name, proto in request.inputs.items()}
        yield request.model_spec.signature_name, inputs


def written_signatures(session: SavedModelSession) -> set[str]:
    """The names of all signatures, without one that TensorFlow adds."""
    return set(session.signatures) - {"__saved_model_init_op"}


def halving_policy(logits: Array) -> CascadePolicy:
    """A cascade at each stage of which half of the rows stop that reach it."""
    stages = []
    unsure = np.arange(len(logits))
    for column, dim in enumerate(DIMS[:-1]):
        confidences = confidence(logits[unsure, column], TEMPERATURES[dim])
        low, high = np.sort(confidences)[len(unsure) // 2 - 1 : len(unsure) // 2 + 1]
        threshold = float(np.float32(low + (high - low) / 2))
        stages.append(Stage(dim, threshold, TEMPERATURES[dim]))
        unsure = unsure[confidences <= threshold]
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
