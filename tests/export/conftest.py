"""Each model exported once a session: from JAX or PyTorch that takes a TensorFlow process."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import keras
import pytest

from tests.helpers import export_models as models
from tests.helpers import user_scripts
from tests.helpers.export_models import (
    NAMES,
    TEMPERATURES,
    TOP_K,
    Exported,
    exported,
    halving_policy,
)


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    """A classifier with everything that can be given."""
    model = models.untied()
    rows = {"": models.images()}
    policy = halving_policy(model.predict(rows[""], verbose=0))
    with exported(
        model,
        model.backbone,
        rows,
        tmp_path_factory.mktemp("untied"),
        policy,
        quality={dim: {"top1": 1 - 1 / dim} for dim in TEMPERATURES},
        labels=NAMES,
        top_k=TOP_K,
        weights=(1.0, 0.5, 2.0),
    ) as version:
        yield version


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    """A functional model of two inputs; also with a policy and names, unscaled, and renamed."""
    model = models.tied()
    rows = models.sides()
    policy = halving_policy(model.predict(rows, verbose=0))
    with exported(
        model,
        keras.Model(model.inputs, model.layers[-1].input),
        rows,
        tmp_path_factory.mktemp("tied"),
        policy,
        labels=list(NAMES),
        normalize=False,
        name="renamed",
    ) as version:
        yield version


@pytest.fixture(scope="session", params=["untied", "tied"])
def classifier(request: pytest.FixtureRequest) -> Exported:
    """Each of the two that can do everything."""
    version: Exported = request.getfixturevalue(request.param)
    return version


@pytest.fixture(scope="session")
def of_tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    """A classifier with nothing given, over a subclassed backbone."""
    model = models.of_tokens()
    rows = {"": models.tokens()}
    with exported(model, model.backbone, rows, tmp_path_factory.mktemp("tokens")) as version:
        yield version


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    """A model without a head."""
    model = models.encoder()
    rows = {"": models.sides()["left"]}
    with exported(model, model, rows, tmp_path_factory.mktemp("encoder")) as version:
        yield version


@pytest.fixture(scope="session", autouse=True)
def scripts(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[user_scripts.Ran]]]:
    """The users' scripts, begun at once if a test asks for them: they take a minute beside it."""
    wanted = any("test_user_scripts" in item.nodeid for item in request.session.items)
    with ThreadPoolExecutor(max_workers=1) as pool:
        yield {
            name: pool.submit(user_scripts.run, tmp_path_factory.mktemp("script"), name)
            for name in user_scripts.SCRIPTS
            if wanted
        }
        pool.shutdown(cancel_futures=True)
