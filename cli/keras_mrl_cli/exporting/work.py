"""From a .keras file to a version."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from keras_mrl_export import ExportError, export_saved_model
from keras_mrl_serving import KerasMrlError

from ..asking import RefusalError, one_line
from ..asking.policy import read_policy
from .ending import ended_by_signals
from .sample import image_files, random_sample, read_sample

_RANDOM_ROWS = "The export is verified on random rows in [0, 1); real rows verify more: --sample."


def export(arguments: argparse.Namespace) -> int:
    """Load, export, and print the folder of the version."""
    if arguments.images and arguments.sample:
        raise RefusalError(
            "An export is verified on rows or on images. Received: --sample and --images. "
            "Give --images for a version that takes files, --sample for one that takes pixels."
        )
    if arguments.pixel_scale is not None and not arguments.images:
        raise RefusalError(
            "--pixel-scale is of images that the version decodes. Received: no --images. "
            "Give a few: --images FILE FILE."
        )
    policy = None if arguments.policy is None else read_policy(arguments.policy)
    labels = None if arguments.labels is None else _labels(arguments.labels)
    given = None if arguments.sample is None else read_sample(arguments.sample)
    _import(arguments.modules)
    _say(f"Loading {arguments.model} on {keras.backend.backend()} ...")
    model = _load(arguments.model)
    optional = {key: getattr(arguments, key) for key in ("dims", "signatures", "top_k", "name")}
    try:
        sample, decoder = given, None
        if arguments.images:
            scale = 1.0 if arguments.pixel_scale is None else arguments.pixel_scale
            sample, decoder = image_files(model, arguments.images, scale)
        elif sample is None:
            sample = random_sample(model)
            _say(_RANDOM_ROWS)
        _say("Exporting, and comparing every signature with the model ...")
        with ended_by_signals():
            version = export_saved_model(
                model,
                arguments.base_path,
                sample,
                policy,
                labels,
                version=arguments.version,
                normalize=not arguments.no_normalize,
                decoder=decoder,
                **{name: value for name, value in optional.items() if value is not None},
            )
    except (ExportError, KerasMrlError, ValueError) as error:
        raise RefusalError(one_line(error)) from error
    except OSError as error:
        if error.errno is None:  # a sentence of ours
            raise RefusalError(one_line(error)) from error
        raise RefusalError(
            "--base-path must be a folder that can be written. "
            f"Received: {error.filename or arguments.base_path} ({error.strerror}). Name another."
        ) from error
    print(_as_given(version, arguments.base_path))
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _as_given(version: Path, base_path: str) -> Path:
    """A relative base path stays one."""
    return Path(base_path) / version.name


def _import(modules: Sequence[str]) -> None:
    if modules:  # as `python script.py` would: the console script does not look where it is run
        sys.path.insert(0, os.getcwd())
    for module in modules:
        try:
            importlib.import_module(module)
        except SystemExit as error:  # a script that is no module
            raise _not_imported(module, f"it ends by sys.exit({error.code!r})") from error
        except Exception as error:  # whatever a module of the user's raises
            raise _not_imported(module, f"{type(error).__name__}: {one_line(error)}") from error


def _not_imported(module: str, why: str) -> RefusalError:
    return RefusalError(
        "--import must name a module that can be imported, here or installed. "
        f"Received: {module} ({why}). Name it as in an import statement, without .py."
    )


def _load(file: str) -> Any:
    if not Path(file).is_file():
        raise RefusalError(
            "A model to export must be a .keras file. "
            f"Received: {file}, which is none. Correct the path, or write it: model.save(...)."
        )
    try:
        return keras.saving.load_model(file, compile=False)
    except Exception as error:  # Keras raises whatever a layer raises
        raise RefusalError(
            "The .keras file must load on this backend. "
            f"Received: {file} on {keras.backend.backend()}, {type(error).__name__}: "
            f"{one_line(error)} Import the modules that register classes of your own with "
            "--import, and make Lambda layers classes."
        ) from error


def _labels(file: str) -> list[str]:
    try:
        return Path(file).read_text("utf-8-sig").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise RefusalError(
            f"--labels must be a text in UTF-8. Received: {file} ({error.reason}). "
            "Write one class name a line."
        ) from error
    except OSError as error:
        raise RefusalError(
            "--labels must be a file that can be read. "
            f"Received: {file} ({error.strerror}). Correct the path."
        ) from error
