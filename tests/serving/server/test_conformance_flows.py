"""Every flow of our clients over a model of the contract, with the answers that NumPy computes.

The server is at the address that test_conformance.py describes.
"""

import asyncio
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from keras_mrl_serving import AsyncClient, Client, Options
from keras_mrl_serving.calls import Call
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.errors import ModelNotFoundError, UnknownDimError
from keras_mrl_serving.results import Classification
from tests.helpers.server_target import Served, reload

Toys = Mapping[str, Callable[[Call], Mapping[str, npt.NDArray[Any]]]]
X = np.random.default_rng(4).normal(size=(21, 4)).astype(np.float32)
NAME = "flows"
OTHER = CascadePolicy((Stage(2, 0.6), Stage(8, None)))


@pytest.fixture(scope="module")
def client(served: Served, saved: Mapping[str, Path]) -> Iterator[Client]:
    """A client whose rows are split, of the model beside the one that is always served."""
    base = served.base / f"of-{NAME}"
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir()
    shutil.copytree(saved["classifier"] / "1", base / "copying-1")
    (base / "copying-1").rename(base / "1")
    served(reload(served, **{NAME: ""}))
    with Client(served.target, NAME, options=Options(max_batch_size=5)) as client:
        yield client
    served(reload(served))


def truth(toys: Toys, signature: str) -> Mapping[str, npt.NDArray[Any]]:
    return toys["classifier"](Call(signature, {"x": X}))


def assert_classified(answer: Classification, expected: Mapping[str, npt.NDArray[Any]]) -> None:
    np.testing.assert_array_equal(answer.class_ids, expected["class_ids"])
    np.testing.assert_allclose(answer.probabilities, expected["probabilities"], rtol=1e-5)
    np.testing.assert_allclose(answer.confidence, expected["confidence"], rtol=1e-5)
    names = [[name.decode() for name in row] for row in expected["labels"]]
    np.testing.assert_array_equal(answer.labels, names)
    if "dim" in expected:
        np.testing.assert_array_equal(answer.dim, expected["dim"])


def test_describe_status_and_signatures(client: Client, manifests: Mapping[str, Any]) -> None:
    assert client.describe() == manifests["classifier"]
    assert [(v.version, v.state, v.error) for v in client.status()] == [(1, "AVAILABLE", "")]
    assert client.signatures()["embed_4"].inputs == {"x": {"dtype": "float32", "shape": [None, 4]}}


@pytest.mark.parametrize("dim", [2, 4, 8])
def test_one_dim(client: Client, toys: Toys, dim: int) -> None:
    expected = truth(toys, f"embed_{dim}")["embedding"]
    np.testing.assert_allclose(client.embed(X, dim), expected, rtol=1e-5, atol=1e-6)
    assert_classified(client.classify(X, dim), truth(toys, f"classify_{dim}"))


def test_the_cascade_of_the_model(client: Client, toys: Toys) -> None:
    expected = truth(toys, "classify_adaptive")
    assert len(set(expected["dim"].tolist())) > 1
    assert_classified(client.classify_adaptive(X), expected)


def test_a_cascade_of_the_client_s(client: Client, toys: Toys, policy: CascadePolicy) -> None:
    """Features once, then a head after another for the rows still unsure, of one version."""
    assert_classified(client.classify_adaptive(X, policy), truth(toys, "classify_adaptive"))
    other = client.classify_adaptive(X, OTHER)
    assert set(other.dim.tolist()) == {2, 8}


def test_an_event_loop_gets_the_same(client: Client, toys: Toys) -> None:
    async def ask() -> Classification:
        async with AsyncClient(client.target, NAME) as async_client:
            return await async_client.classify_adaptive(X)

    assert_classified(asyncio.run(ask()), truth(toys, "classify_adaptive"))


def test_any_signature(client: Client, toys: Toys) -> None:
    features: Any = client.predict(X, "features")["features"]
    np.testing.assert_allclose(features, truth(toys, "features")["features"], rtol=1e-5)
    only = client.predict(features[:, :2], "head_2", outputs=["logits"])
    assert set(only) == {"logits"}


def test_an_answer_does_not_depend_on_its_neighbours(client: Client) -> None:
    together, alone = client.classify_adaptive(X), client.classify_adaptive(X[7:8])
    assert together.dim[7] == alone.dim[0]
    np.testing.assert_allclose(together.probabilities[7], alone.probabilities[0], rtol=1e-5)


def test_refusals_have_names(client: Client) -> None:
    with pytest.raises(UnknownDimError):
        client.embed(X, 3)
    with Client(client.target, "none") as other, pytest.raises(ModelNotFoundError):
        other.describe()
