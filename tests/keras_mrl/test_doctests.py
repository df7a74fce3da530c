"""Every example in a docstring of the package runs, on every backend, and says what it promises."""

import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import numpy as np
import pytest

import keras_mrl
import keras_mrl.evaluation


def modules() -> list[ModuleType]:
    submodules = pkgutil.walk_packages(keras_mrl.__path__, "keras_mrl.")
    return [keras_mrl, *(importlib.import_module(info.name) for info in submodules)]


def public_names() -> dict[str, Any]:
    """What `from keras_mrl import *` and its public packages give, by name."""
    return {
        name: value
        for module in modules()
        if hasattr(module, "__path__")
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }


NAMES = public_names()
FINDER = doctest.DocTestFinder(exclude_empty=True)
DOCTESTS = [
    test
    for module in modules()
    for test in FINDER.find(module, globs={"keras": keras, "np": np, **NAMES})
    if test.examples
]


@pytest.mark.backend
@pytest.mark.parametrize("example", DOCTESTS, ids=lambda test: test.name)
def test_the_example_runs(
    example: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output: list[str] = []
    runner = doctest.DocTestRunner(verbose=False)
    results = runner.run(example, out=output.append, clear_globs=False)
    assert results.attempted
    assert not results.failed, "".join(output)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_public_name_has_an_example(name: str) -> None:
    documented = {test.name.rpartition(".")[2] for test in DOCTESTS}
    assert name in documented
