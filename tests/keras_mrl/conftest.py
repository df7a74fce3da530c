"""The same random numbers for every test, whichever ran before it."""

import keras
import pytest


@pytest.fixture(autouse=True)
def _seed() -> None:
    keras.utils.set_random_seed(0)
