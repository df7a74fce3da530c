"""Every example runs, and everything public has one."""

import doctest
import inspect
import pkgutil
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import keras_mrl_serving

# TensorFlow's modules have examples that need files; `_session` is tested beside the server.
LEFT_OUT = {"server", "_session"}
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(keras_mrl_serving.__path__, "keras_mrl_serving.")
    if module.name.split(".")[1] not in LEFT_OUT
)
# Nothing would run: a client needs a server, metrics an extra; nobody calls a protocol or an error.
WITHOUT_EXAMPLE = set(
    "AsyncClient AsyncTransport Client Index OpenTelemetryMetrics Transport".split()
)


def names() -> dict[str, Any]:
    """The names an example may use without importing them: NumPy, and the public names."""
    public = set(keras_mrl_serving.__all__)
    return {"np": np, **{name: getattr(keras_mrl_serving, name) for name in public}}


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name: str) -> None:
    module = import_module(name)
    failed, _ = doctest.testmod(module, globs={**vars(module), **names()})
    assert not failed


def public(module: ModuleType) -> dict[str, Any]:
    """The functions and classes that a module defines and does not hide."""
    return {
        name: thing
        for name, thing in vars(module).items()
        if not name.startswith("_")
        and (inspect.isfunction(thing) or inspect.isclass(thing))
        and thing.__module__ == module.__name__
    }


EXPECTED = [
    pytest.param(thing, id=f"{module}.{name}")
    for module in MODULES
    if not module.split(".")[-1].startswith("_")
    for name, thing in public(import_module(module)).items()
    if name not in WITHOUT_EXAMPLE and not (inspect.isclass(thing) and issubclass(thing, Exception))
]


@pytest.mark.parametrize("thing", EXPECTED)
def test_everything_public_has_an_example(thing: Any) -> None:
    assert "Examples:" in (inspect.getdoc(thing) or "")
    assert doctest.DocTestFinder(recurse=False).find(thing)[0].examples


def test_there_is_something_to_run() -> None:
    assert "keras_mrl_serving.index.exact" in MODULES
    assert len(EXPECTED) > 20
    names = {name for module in MODULES for name in public(import_module(module))}
    assert names >= WITHOUT_EXAMPLE
