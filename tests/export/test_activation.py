"""What a head's outputs are, from the loss to the client: one class a row, several, or values.

Of JAX and PyTorch, tests/test_rooms.py asks one of these through every room, and here the other is
asked by one signature.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, MatryoshkaLoss
from keras_mrl_export import export_saved_model
from keras_mrl_serving import CascadePolicy, Client, InvalidInputError, Stage
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.errors import NoCascadeError, NoHeadError
from keras_mrl_serving.server import DevServer
from tests.helpers.export_models import read_manifest
from tests.helpers.laws import on_backends

Array = npt.NDArray[Any]

DIMS = (2, 4, 8)
X = np.random.default_rng(0).normal(size=(24, 5)).astype(np.float32)
SEVERAL = (X[:, :4] > 0).astype(np.float32)
VALUES = X[:, :1] * 50 + 300
POLICY = CascadePolicy((Stage(2, 0.9), Stage(8, None)))


def nested(outputs: int, name: str) -> MatryoshkaClassifier:
    keras.utils.set_random_seed(0)
    backbone = keras.Sequential([keras.Input((5,), name="x"), keras.layers.Dense(8)])
    return MatryoshkaClassifier(backbone, MatryoshkaHead(outputs, DIMS), name=name)


def trained(loss: keras.losses.Loss, y: Array, name: str) -> keras.Model:
    model = nested(y.shape[1], name)
    model.compile(keras.optimizers.Adam(0.05), MatryoshkaLoss(loss))
    model.fit(X, y, epochs=5, verbose=0)
    return model


def near(served: Array, expected: Array, terms: Array | float = 1.0) -> bool:
    """Equal to the contract's tolerance, a share of what each output is the sum of."""
    return served.shape == expected.shape and bool(
        (np.abs(served - expected) <= 1e-5 * np.maximum(np.abs(expected), terms)).all()
    )


def sigmoid(logits: Array) -> Array:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


@pytest.fixture(scope="module")
def tags(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[keras.Model, Client]]:
    """A model of several classes a row, saved and loaded before it is exported, and its client."""
    folder = tmp_path_factory.mktemp("tags")
    trained(keras.losses.BinaryCrossentropy(from_logits=True), SEVERAL, "tags").save(
        folder / "tags.keras"
    )
    model = keras.models.load_model(folder / "tags.keras")
    export_saved_model(model, folder / "models", X[:8], labels=["a", "b", "c", "d"])
    with DevServer(folder / "models") as target, Client(target) as client:
        yield model, client


@pytest.fixture(scope="module")
def prices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[keras.Model, Client]]:
    """A regression of one unit, exported as it was trained, and its client."""
    folder = tmp_path_factory.mktemp("prices")
    model = trained(keras.losses.Huber(), VALUES, "prices")
    export_saved_model(model, folder / "models", X[:8], quality={8: {"mae": 1.0}})
    with DevServer(folder / "models") as target, Client(target) as client:
        yield model, client


def test_several_classes_a_row_are_served_as_keras_gives_them(
    tags: tuple[keras.Model, Client],
) -> None:
    model, client = tags
    manifest = client.describe()
    assert (manifest.kind, manifest.activation, manifest.top_k) == ("classifier", "sigmoid", 4)
    expected = sigmoid(np.asarray(model.predict(X, verbose=0)))
    for column, dim in enumerate(DIMS):
        answer = client.classify(X, dim)
        by_class = np.empty_like(answer.probabilities)
        np.put_along_axis(by_class, answer.class_ids, answer.probabilities, axis=1)
        assert near(by_class, expected[:, column].astype(np.float32))
        assert (np.diff(answer.probabilities, axis=1) <= 0).all()
        np.testing.assert_array_equal(answer.confidence, answer.probabilities[:, 0])
        for row, names in enumerate(answer.above(0.5)):
            assert set(names) == {"abcd"[c] for c in np.flatnonzero(expected[row, column] > 0.5)}
    assert not np.allclose(answer.probabilities.sum(axis=1), 1, atol=0.1)


def test_a_head_of_several_classes_gives_logits_and_no_class(
    tags: tuple[keras.Model, Client],
) -> None:
    """So a client of 0.1.0 with a policy of its own asks for class ids that are not there."""
    model, client = tags
    features = client.predict(X, "features", outputs=["features"])["features"]
    logits = client.predict(features[:, :4], "head_4")["logits"]
    assert near(logits, np.asarray(model.predict(X, verbose=0))[:, 1])
    assert set(client.signatures()["head_4"].outputs) == {"logits", "model_id"}
    with pytest.raises(InvalidInputError, match="class_ids"):
        client.predict(features[:, :4], "head_4", outputs=["class_ids", "logits"])
    for policy in (None, POLICY):
        with pytest.raises(NoCascadeError, match="of whose classes a row may have several"):
            client.classify_adaptive(X, policy)
    default = client.predict(X)
    np.testing.assert_array_equal(default["class_ids"], client.classify(X, 8).class_ids)


def test_values_are_served_as_keras_gives_them(prices: tuple[keras.Model, Client]) -> None:
    model, client = prices
    manifest = client.describe()
    assert (manifest.kind, manifest.activation, manifest.num_values) == ("regressor", "none", 1)
    assert (manifest.num_classes, manifest.top_k, manifest.labels) == (None, None, False)
    expected = np.asarray(model.predict(X, verbose=0))
    features = client.predict(X, "features", outputs=["features"])["features"]
    for column, dim in enumerate(DIMS):
        assert near(client.regress(X, dim), expected[:, column])
        head = client.predict(features[:, :dim], f"head_{dim}")["values"]
        assert near(head, expected[:, column])
    assert set(client.predict(X)) == {"values"}
    assert not [name for name in client.signatures() if name.startswith("classify")]
    text = r"Only a model with classes can classify. Received: .*, whose head gives values, 1 a row"
    with pytest.raises(NoHeadError, match=text):
        client.classify(X, 8)
    with pytest.raises(NoHeadError, match=text):
        client.classify_adaptive(X, POLICY)
    assert client.embed(X, 4).shape == (24, 4)


OF_BACKEND: dict[str, tuple[keras.losses.Loss, Array, str, str]] = {
    "jax": (keras.losses.BinaryCrossentropy(from_logits=True), SEVERAL, "sigmoid", "classify_4"),
    "torch": (keras.losses.MeanSquaredError(), VALUES, "none", "regress_4"),
}


@pytest.mark.backend
@on_backends(*OF_BACKEND)
def test_each_kind_is_served_of_every_backend(tmp_path: Path) -> None:
    loss, y, activation, signature = OF_BACKEND[keras.backend.backend()]
    model = trained(loss, y, "kind")
    path = export_saved_model(model, tmp_path, X[:8], signatures=[signature])
    assert read_manifest(path).activation == activation
    logits = np.asarray(model.predict(X, verbose=0))[:, 1]
    with SavedModelSession(path) as session:
        answer = session.run(signature, {"x": X})
    if activation == "none":
        assert near(answer["values"], logits)
    else:
        by_class = np.empty_like(answer["probabilities"])
        np.put_along_axis(by_class, answer["class_ids"], answer["probabilities"], axis=1)
        assert near(by_class, sigmoid(logits).astype(np.float32))


def test_values_near_zero_are_no_difference(tmp_path: Path) -> None:
    """One output a row, whose terms cancel: rounding is a share of the terms."""
    model = nested(1, "zero")
    model.compile(loss=MatryoshkaLoss(keras.losses.MeanSquaredError()))
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(100 * rng.normal(size=weight.shape))
    outputs = np.asarray(model(X))
    model.head.set_weights(
        [w if w.shape != (1,) else w - outputs[3, -1] for w in model.head.get_weights()]
    )
    assert np.abs(np.asarray(model(X))[3, -1]) < 1
    assert np.abs(outputs[3, -1]) > 100
    manifest = read_manifest(export_saved_model(model, tmp_path, X))
    assert manifest.num_values == 1


# What says it.


def exported(model: keras.Model, folder: Path, **arguments: Any) -> str:
    signatures = ["embed_2"]
    path = export_saved_model(model, folder, X[:4], signatures=signatures, dims=[2], **arguments)
    return read_manifest(path).activation


def test_the_caller_s_word_comes_first(tmp_path: Path) -> None:
    assert exported(nested(3, "named"), tmp_path, activation="sigmoid") == "sigmoid"
    model = nested(3, "other")
    model.compile(loss=MatryoshkaLoss(keras.losses.MeanSquaredError()))
    assert exported(model, tmp_path / "other", activation="softmax") == "softmax"


def test_what_is_assumed_of_a_model_never_compiled_is_said(tmp_path: Path) -> None:
    text = (
        r"\AThe loss that a model is compiled with says what its outputs are. Received: model "
        r"'mute', which was never compiled. Softmax is assumed. Name it with activation=: "
        r"'softmax' for one class a row, 'sigmoid' for any number, 'none' for values.\Z"
    )
    with pytest.warns(UserWarning, match=text):
        assert exported(nested(3, "mute"), tmp_path) == "softmax"
    policy = CascadePolicy((Stage(2, None),))  # a cascade says it
    signatures = ["classify_adaptive"]
    export_saved_model(nested(3, "mute"), tmp_path, X, policy, dims=[2], signatures=signatures)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "one output, never compiled": (
        None,
        {},
        "Received: model 'refused', which was never compiled, with one output a row, of which a "
        "softmax makes 1 always. Name it: activation='sigmoid' for a probability, 'none' for",
    ),
    "another word": (None, {"activation": "tanh"}, "Received: activation='tanh'. Give one of"),
    "a cascade of several classes": (
        keras.losses.BinaryCrossentropy(from_logits=True),
        {"policy": POLICY},
        "A cascade decides which one class a row has. Received: a policy for a model of any number "
        "of classes a row (activation='sigmoid'). Leave policy out, and ask one dim.",
    ),
    "a cascade of values": (
        keras.losses.MeanSquaredError(),
        {"policy": POLICY},
        "Received: a policy for a model of values (activation='none'). Leave policy out, and ask",
    ),
    "names of values": (
        keras.losses.MeanSquaredError(),
        {"labels": ["price"]},
        "labels are names of classes. Received: 1 labels for a model of values "
        "(activation='none'). Leave labels out.",
    ),
    "classify of values": (
        keras.losses.MeanSquaredError(),
        {"signatures": ["classify"]},
        "signatures must be of those the model can have: embed_2, embed_4, embed_8, regress_2,",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    loss, arguments, text = REFUSED[case]
    model = nested(1, "refused")
    if loss is not None:
        model.compile(loss=MatryoshkaLoss(loss))
    with pytest.raises(ValueError, match=re.escape(text)):
        export_saved_model(model, tmp_path / "m", X, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_has_none(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8)])
    with pytest.raises(ValueError, match=r"activation is of the outputs of a head. Received: act"):
        export_saved_model(model, tmp_path / "m", X, activation="sigmoid")
