"""Each model exported once a session: from JAX or PyTorch that takes a TensorFlow process."""

from collections.abc import Iterator

import keras
import numpy as np
import pytest

from keras_mrl import split
from keras_mrl_serving.funnel import FunnelSchedule
from keras_mrl_serving.index import ExactIndex
from tests.helpers import export_models as models
from tests.helpers.export_models import (
    DIMS,
    NAMES,
    TEMPERATURES,
    TOP_K,
    Exported,
    exported,
    halving_policy,
    outputs,
)


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    """A classifier with every argument that fits one."""
    if keras.backend.backend() == "jax":
        pytest.skip("tests/export/test_export.py asks every signature of a model of JAX")
    model, rows = models.untied(), {"": models.images()}
    with exported(
        model,
        rows,
        tmp_path_factory.mktemp("untied"),
        policy=halving_policy(outputs(model, rows[""])),
        quality={dim: {"top1": 1 - 1 / dim} for dim in TEMPERATURES},
        labels=NAMES,
        top_k=TOP_K,
        weights=(1.0, 0.5, 2.0),
    ) as version:
        yield version


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    """A functional model of two inputs with its gallery, unscaled, renamed, and in half precision.

    It is served in float32, so its answers are those of the same weights in float32.
    """
    if keras.backend.backend() == "torch":
        pytest.skip("of PyTorch the untied one is asked")
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = models.tied()
    finally:
        keras.config.set_dtype_policy("float32")
    reference, rows = models.tied(), models.sides()
    features = outputs(split(reference)[0], rows)
    index = ExactIndex.build(
        features[:, : DIMS[-1]], FunnelSchedule(DIMS, (20, 10), 4), np.arange(48) * 3, "dot"
    )
    with exported(
        model,
        rows,
        tmp_path_factory.mktemp("tied"),
        reference=reference,
        policy=halving_policy(outputs(reference, rows)),
        labels=list(NAMES),
        normalize=False,
        name="renamed",
        index=index,
    ) as version:
        yield version


@pytest.fixture(scope="session", params=["untied", "tied"])
def classifier(request: pytest.FixtureRequest) -> Exported:
    """Each of the two that have every signature of a classifier."""
    version: Exported = request.getfixturevalue(request.param)
    return version


@pytest.fixture(scope="session")
def of_tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    """A classifier over a subclassed backbone, exported without any option."""
    rows = {"": models.tokens()}
    with exported(models.of_tokens(), rows, tmp_path_factory.mktemp("tokens")) as version:
        yield version


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    """A model without a head."""
    rows = {"": models.sides()["left"]}
    with exported(models.encoder(), rows, tmp_path_factory.mktemp("encoder")) as version:
        yield version
