"""The user's own classes and functions inside a model, to be carried by value.

A layer defined in a training script cannot be imported by another process without running the
script again, so its code itself travels.
"""

from __future__ import annotations

import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

import keras

from .errors import ExportError

_INSTALLED = tuple(
    Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib", "stdlib")
)
_OURS = ("keras", "keras_mrl", "keras_mrl_serving", "keras_mrl_export")


def user_objects(model: keras.Model) -> dict[str, Any]:
    """Return the user's classes and functions in `model`, by the name Keras saves them under.

    Found are the classes of its layers, and of whatever with a `get_config` these hold
    (initializers, regularizers, constraints), and the functions they hold (activations).

    Raises:
        ExportError: If two of them share a name.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, types.FunctionType):
            _add(found, value)
        elif isinstance(value, (list, tuple)):
            for entry in value:
                visit(entry)
        elif isinstance(value, dict):
            for entry in value.values():
                visit(entry)
        elif hasattr(type(value), "get_config"):
            _add(found, type(value))
            for attribute in _held(value):
                visit(attribute)

    visit(model)
    for layer in model._flatten_layers():
        visit(layer)
    return found


def _held(value: Any) -> list[Any]:
    """The attributes of an object, without the methods that Keras wraps anew on each layer."""
    methods = (types.FunctionType, types.MethodType)
    return [
        attribute
        for name, attribute in vars(value).items()
        if not isinstance(getattr(type(value), name, None), methods)
    ]


def user_modules(objects: dict[str, Any]) -> list[types.ModuleType]:
    """Return the importable modules that define `objects`, so that they can travel by value."""
    names = {value.__module__ for value in objects.values()} - {"__main__"}
    return [sys.modules[name] for name in sorted(names) if name in sys.modules]


def _add(found: dict[str, Any], value: Any) -> None:
    if not is_users(value):
        return
    name = keras.saving.get_registered_name(value)
    other = found.setdefault(name, value)
    if other is not value:
        raise ExportError(
            "Keras finds what is yours by its name, so no two may share one. "
            f"Received: {name}, of {other.__module__} and of {value.__module__}. Rename one, or "
            "decorate it with @keras.saving.register_keras_serializable(package='...')."
        )


def is_users(value: Any) -> bool:
    """Whether a class or function is neither ours nor of an installed package."""
    name = value.__module__ or ""
    if name.partition(".")[0] in _OURS:
        return False
    file = getattr(sys.modules.get(name), "__file__", None)
    if name == "__main__" or file is None:
        return name not in sys.builtin_module_names
    return not any(Path(file).resolve().is_relative_to(folder) for folder in _INSTALLED)
