"""Three models of the contract in NumPy, the same three as SavedModels, and how errors are read."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from keras_mrl_serving import contract
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.flows import Arrays, Call

Array = npt.NDArray[Any]
Refuses = Callable[[type[Exception], str], AbstractContextManager[None]]

NUM_INPUTS, NUM_CLASSES, TOP_K = 4, 5, 3
NAMES = np.array(["lynx", "ibex", "otter", "grüner Specht", "hare"], object)
POLICY = CascadePolicy((Stage(2, 0.7), Stage(4, 0.5, temperature=2.0), Stage(8, None)))


class Toy:
    """What the contract promises, line by line, over a linear backbone and linear heads."""

    def __init__(self, manifest: Manifest, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.manifest = manifest
        self.projection = rng.normal(size=(NUM_INPUTS, manifest.width)).astype(np.float32)
        self.kernels = {
            dim: rng.normal(size=(dim, NUM_CLASSES)).astype(np.float32) for dim in manifest.dims
        }

    def __call__(self, call: Call) -> dict[str, Array]:
        kind, _, dim = call.signature.rpartition("_")
        if dim.isdecimal() and int(dim) not in self.manifest.dims:
            raise KeyError(call.signature)
        inputs = {name: np.asarray(array) for name, array in call.inputs.items()}
        if call.signature == contract.DESCRIBE:
            text = np.array([self.manifest.to_json().encode()], object)
            return {"manifest": np.repeat(text, len(inputs["key"]))}
        if kind == "head":
            answer = self._head(inputs["features"], int(dim))
        else:
            features = inputs["x"] @ self.projection
            if call.signature == contract.FEATURES:
                answer = {"features": features}
            elif call.signature == contract.CLASSIFY_ADAPTIVE:
                answer = self._adaptive(features)
            elif kind == "embed":
                prefix = features[:, : int(dim)]
                answer = {"embedding": prefix / np.linalg.norm(prefix, axis=1, keepdims=True)}
            else:
                assert kind == "classify"
                answer = self._head(features[:, : int(dim)], int(dim))
                del answer["logits"]
        return {name: answer[name] for name in call.outputs or answer}

    def _head(self, prefix: Array, dim: int) -> dict[str, Array]:
        logits = prefix @ self.kernels[dim]
        temperature = {s.dim: s.temperature for s in POLICY.stages}.get(dim, 1.0)
        scaled = np.exp(logits / np.float32(temperature if self.manifest.cascade else 1.0))
        probabilities = scaled / scaled.sum(axis=1, keepdims=True)
        class_ids = np.argsort(-logits, axis=1, kind="stable")[:, :TOP_K]
        top = np.take_along_axis(probabilities, class_ids, axis=1)
        answer = {"class_ids": class_ids, "probabilities": top, "confidence": top[:, 0]}
        if self.manifest.labels:
            answer["labels"] = np.vectorize(str.encode, otypes=[object])(NAMES[class_ids])
        return {**answer, "logits": logits}

    def _adaptive(self, features: Array) -> dict[str, Array]:
        rows = []
        for row in range(len(features)):
            for stage in POLICY.stages:
                answer = self._head(features[row : row + 1, : stage.dim], stage.dim)
                if stage.threshold is None or answer["confidence"][0] > stage.threshold:
                    break
            del answer["logits"]
            rows.append({**answer, "dim": np.array([stage.dim], np.int32)})
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def save(toy: Toy, path: Path) -> Path:
    import tensorflow as tf  # here, so that most tests of this room need not wait for it

    batch = tf.TensorSpec((None, NUM_INPUTS), tf.float32, "x")
    module = tf.Module()
    module.projection = tf.Variable(toy.projection)
    module.kernels = {str(dim): tf.Variable(kernel) for dim, kernel in toy.kernels.items()}
    temperatures = {s.dim: s.temperature for s in POLICY.stages} if toy.manifest.cascade else {}

    def head(prefix: Any, dim: int) -> dict[str, Any]:
        logits = prefix @ module.kernels[str(dim)]
        probabilities = tf.nn.softmax(logits / temperatures.get(dim, 1.0))
        top, class_ids = tf.math.top_k(probabilities, TOP_K)
        answer = {
            "class_ids": tf.cast(class_ids, tf.int64),
            "probabilities": top,
            "confidence": top[:, 0],
        }
        if toy.manifest.labels:
            answer["labels"] = tf.gather(tf.constant(NAMES.tolist()), class_ids)
        return {**answer, "logits": logits}

    def without_logits(answer: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in answer.items() if name != "logits"}

    def adaptive(x: Any) -> dict[str, Any]:
        features = x @ module.projection
        answer: dict[str, Any] = {}
        for stage in reversed(POLICY.stages):
            answers = without_logits(head(features[:, : stage.dim], stage.dim))
            answers["dim"] = tf.fill([tf.shape(x)[0]], stage.dim)
            sure = answers["confidence"] > (stage.threshold or 0.0)
            answer = {
                name: tf.where(
                    tf.reshape(sure, [-1] + [1] * (value.shape.rank - 1)),
                    value,
                    answer.get(name, value),
                )
                for name, value in answers.items()
            }
        return answer

    def signature(function: Callable[..., Any], spec: Any = batch) -> Any:
        return tf.function(function, input_signature=[spec])

    signatures = {
        contract.DESCRIBE: signature(
            lambda key: {"manifest": tf.fill(tf.shape(key), toy.manifest.to_json())},
            tf.TensorSpec((None,), tf.string, "key"),
        ),
        contract.FEATURES: signature(lambda x: {"features": x @ module.projection}),
    }
    for dim in toy.manifest.dims:
        signatures[contract.embed(dim)] = signature(
            lambda x, dim=dim: {
                "embedding": tf.math.l2_normalize((x @ module.projection)[:, :dim], axis=1)
            }
        )
        if toy.manifest.num_classes:
            signatures[contract.classify(dim)] = signature(
                lambda x, dim=dim: without_logits(head((x @ module.projection)[:, :dim], dim))
            )
            signatures[contract.head(dim)] = signature(
                lambda features, dim=dim: head(features, dim),
                tf.TensorSpec((None, dim), tf.float32, "features"),
            )
    if toy.manifest.cascade:
        signatures[contract.CLASSIFY_ADAPTIVE] = signature(adaptive)
    tf.saved_model.save(module, str(path), signatures=signatures)
    return path


@pytest.fixture(scope="session")
def policy() -> CascadePolicy:
    """The one in the classifier."""
    return POLICY


@pytest.fixture(scope="session")
def manifests() -> Mapping[str, Manifest]:
    """A classifier, the version that may follow it, and an encoder of many dimensions."""
    shared: dict[str, Any] = {
        "name": "toy",
        "fingerprint": "5e1f",
        "inputs": {"x": {"dtype": "float32", "shape": [None, NUM_INPUTS]}},
        "made_with": {"keras": "3.15"},
    }
    head: dict[str, Any] = {
        "kind": "classifier",
        "activation": "softmax",
        "num_classes": NUM_CLASSES,
    }
    classifier = {**shared, **head, "top_k": TOP_K, "labels": True, "cascade": POLICY.to_json()}
    successor = {**shared, **head, "top_k": TOP_K}
    return {
        "classifier": Manifest(dims=(2, 4, 8), width=8, **classifier),
        "successor": Manifest(dims=(2, 4, 16), width=16, **successor),
        "encoder": Manifest(dims=(2, 2048), width=2048, kind="encoder", **shared),
    }


@pytest.fixture(scope="session")
def toys(manifests: Mapping[str, Manifest]) -> Mapping[str, Callable[[Call], Arrays]]:
    """Each model as a function: what a server of it answers to a call."""
    return {name: Toy(manifest, seed) for seed, (name, manifest) in enumerate(manifests.items())}


@pytest.fixture(scope="session")
def saved(toys: Mapping[str, Toy], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Each model as the folder of one version, to be copied or served: `saved[name] / "1"`."""
    folder = tmp_path_factory.mktemp("saved")
    return {name: save(toy, folder / name / "1").parent for name, toy in toys.items()}


@pytest.fixture
def refuses() -> Refuses:
    """The block must raise exactly this class, with exactly this text."""

    @contextmanager
    def refuses(error: type[Exception], text: str) -> Iterator[None]:
        with pytest.raises(error) as caught:
            yield
        assert type(caught.value) is error
        assert str(caught.value) == text

    return refuses
