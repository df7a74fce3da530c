"""A model as a `.keras` file: how it goes from one process, or one precision, to another.

A layer defined in a training script cannot be imported by another process without running the
script again. So the user's own classes and functions are collected from the model, and travel
beside the file.
"""

from __future__ import annotations

import re
import sys
import sysconfig
import tempfile
import types
from pathlib import Path
from typing import Any

import keras

from .job import ExportError


def save(model: keras.Model, file: Path) -> None:
    """Write `model` to `file` in Keras' own `.keras` form.

    Raises:
        ExportError: If a part of it cannot be saved.
        OSError: If the file cannot be written.
    """
    try:
        model.save(file)
    except OSError:
        raise
    except Exception as error:
        raise ExportError(
            "A model travels in Keras' own .keras form, so every part of it must be saveable. "
            f"Received: {type(error).__name__}: {error} "
            "Give layers of your own a get_config(), and activations a name."
        ) from error


def load(file: Path, objects: dict[str, Any]) -> keras.Model:
    """Return the model of a file, on the backend of this process.

    A layer that makes another one without naming a precision takes the global one: it is float32
    meanwhile, whatever the caller trains in.

    Args:
        file: A file that `save` wrote.
        objects: The user's own classes and functions in it.

    Raises:
        ExportError: If it does not load.
    """
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")
    try:
        return keras.models.load_model(file, custom_objects=objects, compile=False)
    except OSError:
        raise
    except Exception as error:
        backend = {"tensorflow": "TensorFlow", "jax": "JAX"}.get(keras.backend.backend(), "torch")
        raise ExportError(
            f"The model must load on the {backend} backend from its .keras form. "
            f"Received: {type(error).__name__}: {error} "
            "Give layers of your own a get_config() and keras.ops; replace Lambda layers by them."
        ) from error
    finally:
        keras.config.set_dtype_policy(before)


def in_float32(model: keras.Model) -> keras.Model:
    """Return `model`, or a copy of it that computes in float32 if a layer of it does not.

    The weights are the model's own: half precision is a matter of speed on the device that trains,
    and its results differ between backends by whole steps of the type.

    Raises:
        ExportError: If the model cannot be saved, or does not load again.
    """
    if not any(_computes_in_half(layer) for layer in model._flatten_layers()):
        return model
    with tempfile.TemporaryDirectory(prefix="keras-mrl-float32-") as folder:
        file = Path(folder) / "model.keras"
        objects = user_objects(model)
        # Twice: setting the policy of a layer changes neither weights that are stored in half
        # precision, nor values that its constructor computed in half precision.
        for _ in range(2):
            save(model, file)
            model = load(file, objects)
            for layer in filter(_computes_in_half, model._flatten_layers()):
                integers, of, _ = layer.dtype_policy.name.rpartition("_from_")
                layer.dtype_policy = f"{integers}{of}float32"
    return model


# What TensorFlow takes for a scope of operations and variables.
_SCOPE = re.compile(r"[A-Za-z0-9.][A-Za-z0-9_.>-]*", re.ASCII)


def with_scopes(model: keras.Model, objects: dict[str, Any]) -> keras.Model:
    """Return `model`, or a copy with other names where a name of a layer is no TensorFlow scope.

    A copy, because the variables of a layer keep the name that it was built under.

    Raises:
        ExportError: If a layer keeps such a name.
    """
    if not _without_scope(model):
        return model
    names = {layer.name for layer in model._flatten_layers()}
    for number, layer in enumerate(_without_scope(model)):
        free = (f"layer_{number}" + "_" * tail for tail in range(len(names) + 1))
        layer.name = next(name for name in free if name not in names)
        names.add(layer.name)
    with tempfile.TemporaryDirectory(prefix="keras-mrl-names-") as folder:
        file = Path(folder) / "model.keras"
        save(model, file)
        model = load(file, objects)
    left = [layer.name for layer in _without_scope(model)]
    if left:
        raise ExportError(
            "TensorFlow makes scopes of the names of layers: ASCII letters, digits, '_', '.', '-'. "
            f"Received: {', '.join(map(repr, left))}, given by layers of your own to themselves. "
            "Take the name from their argument: super().__init__(name=name)."
        )
    return model


def _without_scope(model: keras.Model) -> list[keras.Layer]:
    return [layer for layer in model._flatten_layers() if not _SCOPE.fullmatch(layer.name)]


def _computes_in_half(layer: keras.Layer) -> bool:
    return layer.compute_dtype in ("float16", "bfloat16")


def user_objects(model: keras.Model) -> dict[str, Any]:
    """Return the user's classes and functions in `model`, by the name Keras saves them under.

    These are the classes of its layers, the classes of any objects with a `get_config` that layers
    hold (initializers, regularizers, constraints), and the functions they hold (activations).

    Raises:
        ExportError: If two of them share a name.
    """
    objects: dict[str, Any] = {}
    visited: set[int] = set()

    def visit(value: Any) -> None:
        if id(value) in visited:
            return
        visited.add(id(value))
        if isinstance(value, types.FunctionType):
            _add(objects, value)
        elif isinstance(value, (list, tuple)):
            for entry in value:
                visit(entry)
        elif isinstance(value, dict):
            for entry in value.values():
                visit(entry)
        elif hasattr(type(value), "get_config"):
            _add(objects, type(value))
            for attribute in _attributes(value):
                visit(attribute)

    visit(model)
    for layer in model._flatten_layers():
        visit(layer)
    return objects


def _attributes(value: Any) -> list[Any]:
    """Return the attributes of an object, without the methods that Keras wraps on each layer."""
    methods = (types.FunctionType, types.MethodType)
    return [
        attribute
        for name, attribute in vars(value).items()
        if not isinstance(getattr(type(value), name, None), methods)
    ]


def _add(objects: dict[str, Any], value: Any) -> None:
    if not _is_users(value):
        return
    name = keras.saving.get_registered_name(value)
    other = objects.setdefault(name, value)
    if other is not value:
        raise ExportError(
            "Keras finds what is yours by its name, so no two may share one. "
            f"Received: {name}, of {other.__module__} and of {value.__module__}. Rename one, or "
            "decorate it with @keras.saving.register_keras_serializable(package='...')."
        )


_INSTALLED = tuple(
    Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib", "stdlib")
)
_OURS = ("keras", "keras_mrl", "keras_mrl_serving", "keras_mrl_export")


def _is_users(value: Any) -> bool:
    """Whether a class or function is neither ours nor of an installed package."""
    name = value.__module__ or ""
    if name.partition(".")[0] in _OURS:
        return False
    file = getattr(sys.modules.get(name), "__file__", None)
    if name == "__main__" or file is None:
        return name not in sys.builtin_module_names
    return not any(Path(file).resolve().is_relative_to(folder) for folder in _INSTALLED)


def user_modules(objects: dict[str, Any]) -> list[types.ModuleType]:
    """Return the importable modules that define `objects`, so that they can travel by value."""
    names = {value.__module__ for value in objects.values()} - {"__main__"}
    return [sys.modules[name] for name in sorted(names) if name in sys.modules]
