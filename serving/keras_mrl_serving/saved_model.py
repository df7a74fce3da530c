"""The folders of a served model: the versions, and their SavedModels read without TensorFlow."""

from __future__ import annotations

import os
import re
from pathlib import Path

from google.protobuf.message import DecodeError

from . import _wire_pb2 as wire
from ._wire import signatures_of
from .calls import Signature
from .contract import MANIFEST_FILE, Manifest
from .errors import ManifestError
from .untrusted import JSON_BYTES, UntrustedFileError, read_bytes

GRAPH_FILE = "saved_model.pb"

_GRAPH_BYTES = 2**31 - 1  # of a message of protobuf


def read_manifest(folder: str | os.PathLike[str]) -> Manifest | None:
    """Return the manifest of a version; None if another exporter wrote the version.

    Args:
        folder: The version's folder, the one with `saved_model.pb`.

    Raises:
        ManifestError: If the file is not a manifest, or one of another schema.
        OSError: If the file cannot be read.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     print(read_manifest(folder))
        None
    """
    file = Path(folder) / MANIFEST_FILE
    if not file.exists():
        return None
    try:
        return Manifest.from_json(read_bytes(file, JSON_BYTES, within=folder))
    except UntrustedFileError as error:
        raise ManifestError(
            f"A manifest is a file of the version, no longer than {JSON_BYTES:,} bytes. "
            f"Received: {file}, {error}. Copy the version again, or export it again."
        ) from error


def read_signatures(folder: str | os.PathLike[str]) -> dict[str, Signature]:
    """Return the signatures of a version, by name.

    Args:
        folder: The version's folder, the one with `saved_model.pb`.

    Raises:
        ManifestError: If `saved_model.pb` is not a SavedModel, or holds no graph.
        OSError: If the file cannot be read.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> saved = wire.SavedModel(meta_graphs=[wire.MetaGraphDef()])
        >>> with TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / GRAPH_FILE).write_bytes(saved.SerializeToString())
        ...     print(read_signatures(folder))
        {}
    """
    file = Path(folder) / GRAPH_FILE
    try:
        graph = read_bytes(file, _GRAPH_BYTES, within=folder)
        graphs = wire.SavedModel.FromString(graph).meta_graphs
        if not graphs:
            raise ValueError("it holds no graph")
        return signatures_of(graphs[0].signature_def)
    except (DecodeError, ValueError) as error:
        raise ManifestError(
            f"{GRAPH_FILE} must be a SavedModel as TensorFlow writes it. "
            f"Received: {file} ({error}). Copy the version again, or export it again."
        ) from error


def sizes(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Return the bytes of each file and folder at the top of a version.

    Args:
        folder: The version's folder, the one with `saved_model.pb`.

    Raises:
        OSError: If the folder cannot be read.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / GRAPH_FILE).write_bytes(b"graph")
        ...     print(sizes(folder))
        {'saved_model.pb': 5}
    """
    return {child.name: _size(child) for child in sorted(Path(folder).iterdir())}


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


# TensorFlow Serving reads the name of a version by absl::SimpleAtoi: ASCII white space around it, a
# sign, ASCII digits. So "00000123" is version 123.
_NUMBER = re.compile(r"[ \t\n\v\f\r]*([+-]?[0-9]+)[ \t\n\v\f\r]*", re.ASCII)


def version_number(name: str) -> int | None:
    """Return the version that a folder name stands for; None if it is not a number of 64 bits.

    Args:
        name: Name of a child of the base path.

    Examples:
        >>> version_number("007"), version_number("7.tmp")
        (7, None)
    """
    match = _NUMBER.fullmatch(name)
    if match is None:
        return None
    number = int(match[1])
    return number if -(2**63) <= number < 2**63 else None


def list_versions(base_path: str | os.PathLike[str]) -> dict[int, str]:
    """Return the path of every version under `base_path`, ascending.

    If two names stand for one number, the later in sort order counts. A file with a numeric name
    counts as a version too: TensorFlow Serving tries to load it.

    Args:
        base_path: The folder of the model.

    Raises:
        OSError: If `base_path` is not a folder, or cannot be read.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as base_path:
        ...     for name in ("10", "9", "11.tmp"):
        ...         (Path(base_path) / name).mkdir()
        ...     print(list(list_versions(base_path)))
        [9, 10]
    """
    paths = {}
    for name in sorted(os.listdir(base_path)):
        number = version_number(name)
        if number is not None:
            paths[number] = os.path.join(base_path, name)
    return dict(sorted(paths.items()))


def check_versions(model_name: str, base_path: str) -> dict[int, str]:
    """Return the path of every version under `base_path`, of which there is at least one.

    Args:
        model_name: Name of the model, for the error.
        base_path: The folder of the model.

    Raises:
        FileNotFoundError: If `base_path` is no folder that can be read, or holds no version.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as base_path:
        ...     (Path(base_path) / "1785000000").mkdir()
        ...     print(list(check_versions("birds", base_path)))
        [1785000000]
    """
    try:
        versions = list_versions(base_path)
    except (OSError, ValueError) as error:  # ValueError: the text can be no path at all
        reason = getattr(error, "strerror", None) or error
        raise FileNotFoundError(
            f"base_path must be a folder that can be read. Received: base_path={base_path!r} "
            f"({reason}). Export a model to {base_path} first, or correct the path."
        ) from error
    if not versions:
        raise FileNotFoundError(
            f"base_path must hold a version of the model. Received: "
            f"{no_versions(model_name, base_path)} Export a model to {base_path}, or give the "
            "folder above the numbered one."
        )
    return versions


def no_versions(model_name: str, base_path: str) -> str:
    """Return TensorFlow Serving's text about a base path without versions.

    Examples:
        >>> no_versions("birds", "models")[:54]
        'No versions of servable birds found under base path mo'
    """
    return (
        f"No versions of servable {model_name} found under base path {base_path}. Did you forget "
        "to name your leaf directory as a number (eg. '/1/')?"
    )
