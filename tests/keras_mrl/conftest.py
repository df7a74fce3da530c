"""The same random numbers for every test, nothing compiled twice, no thread too many."""

from typing import Any

import keras
import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Half of what these tests cost under JAX is compiling small programs: keep them."""
    cache: Any = getattr(config, "cache", None)  # none with -p no:cacheprovider
    if keras.backend.backend() == "jax" and cache is not None:
        import jax

        settings: Any = jax.config  # its update() has no types
        settings.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        settings.update("jax_persistent_cache_min_compile_time_secs", 0)
    if keras.backend.backend() == "torch":
        import torch

        torch.set_num_threads(1)  # nets this small gain nothing by two, and wait for each other


@pytest.fixture(autouse=True)
def _seed() -> None:
    keras.utils.set_random_seed(0)
