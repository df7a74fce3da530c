"""The server in memory: one model, one version, and what it refuses."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest

from keras_mrl_serving import contract
from keras_mrl_serving.calls import Call
from keras_mrl_serving.cascade.policy import CascadePolicy, Stage
from keras_mrl_serving.client import Client
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.errors import KerasMrlError, ModelNotFoundError, VersionNotFoundError
from keras_mrl_serving.flows import Arrays
from keras_mrl_serving.testing import InMemoryServer

Model = Callable[[Call], Arrays]

ROWS = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
POLICY = CascadePolicy((Stage(2, 0.6), Stage(4, 0.5, temperature=0.5), Stage(8, None)))


def test_a_server_in_memory_has_one_model_and_one_version(
    toys: Mapping[str, Model], manifests: Mapping[str, Manifest]
) -> None:
    server = InMemoryServer(manifests["classifier"], toys["classifier"], model="toy", version=3)
    client = Client(server, "toy")
    assert [(s.version, s.state) for s in client.status()] == [(3, "AVAILABLE")]
    assert client.classify_adaptive(ROWS, POLICY).labels is not None
    signatures = [call.signature for call in server.calls]
    assert signatures[:2] == [contract.DESCRIBE, contract.FEATURES]
    with pytest.raises(ModelNotFoundError, match="no such model from memory for model 'owl'"):
        Client(server, "owl").describe()
    with pytest.raises(KerasMrlError, match="a function has none of"):
        client.signatures()
    client.close()
    assert Client(server, "toy").embed(ROWS, 2).shape == (40, 2)


def test_a_server_in_memory_has_one_label_or_none(manifests: Mapping[str, Manifest]) -> None:
    server = InMemoryServer(manifests["classifier"], lambda _: None, label="stable")
    assert Client(server).describe() == Client(server, label="stable").describe()
    with pytest.raises(VersionNotFoundError, match=r"no such label .* label 'beta'"):
        Client(server, label="beta").describe()
