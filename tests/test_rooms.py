"""Whatever `fit` accepts, every room handles right, or refuses by name."""

import functools
from collections.abc import Callable

import keras
import pytest

from tests.helpers import rooms
from tests.helpers.cli import Call
from tests.helpers.fitted_models import KINDS
from tests.helpers.rooms import Fitted, fit

LAWS = (
    rooms.log_is_numpy_s,
    rooms.predictions_are_numpy_s,
    rooms.evaluate_of_keras_is_the_log_s,
    rooms.weights_are_loaded,
    rooms.a_failed_first_step_leaves_the_model,
    rooms.evaluate_is_numpy_s,
    rooms.neighbors_are_numpy_s,
    rooms.cut_is_numpy_s,
    rooms.parts_are_numpy_s,
    rooms.served_is_numpy_s,
)
# An export from JAX or PyTorch is a process of TensorFlow: of one kind there.
EXPORTED = {"jax": ["values"], "torch": ["several classes"]}.get(keras.backend.backend(), KINDS)
CELLS = [
    pytest.param(kind, law, id=f"{kind}, {law.__name__}")
    for kind in KINDS
    for law in LAWS
    if law is not rooms.served_is_numpy_s or kind in EXPORTED
]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Fitted]:
    """Makes the model of a kind, once."""
    return functools.cache(lambda kind: fit(KINDS[kind], tmp_path_factory.mktemp("law")))


@pytest.mark.backend
@pytest.mark.parametrize(("kind", "law"), CELLS)
def test_a_room_is_right_or_refuses(
    kind: str,
    law: rooms.Law,
    fitted: Callable[[str], Fitted],
    capsys: pytest.CaptureFixture[str],
) -> None:
    refused = KINDS[kind].refused.get(law.__name__)
    if refused is None:
        law(fitted(kind), Call(capsys))
    else:
        rooms.refuses(lambda: law(fitted(kind), Call(capsys)), refused)
