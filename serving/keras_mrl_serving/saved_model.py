"""What lies in the folder of a SavedModel, read without TensorFlow."""

from __future__ import annotations

import os
from pathlib import Path

from google.protobuf.message import DecodeError

from . import _wire_pb2 as wire
from ._messages import signatures_of
from .calls import Signature
from .contract import MANIFEST_FILE, Manifest
from .errors import ManifestError

GRAPH_FILE = "saved_model.pb"


def read_manifest(folder: str | os.PathLike[str]) -> Manifest | None:
    """Return the manifest of a version; None where something else exported it.

    Args:
        folder: The version's folder, the one with `saved_model.pb`.

    Raises:
        ManifestError: If the manifest is none, or of another schema.
        OSError: If it cannot be read.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     print(read_manifest(folder))
        None
    """
    file = Path(folder) / MANIFEST_FILE
    return Manifest.from_json(file.read_bytes()) if file.exists() else None


def read_signatures(folder: str | os.PathLike[str]) -> dict[str, Signature]:
    """Return what a version can be asked, by signature name.

    Args:
        folder: The version's folder, the one with `saved_model.pb`.

    Raises:
        ManifestError: If `saved_model.pb` is none, or holds no graph.
        OSError: If it cannot be read.

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
        graphs = wire.SavedModel.FromString(file.read_bytes()).meta_graphs
        if not graphs:
            raise ValueError("it holds no graph")
        return signatures_of(graphs[0].signature_def)
    except (DecodeError, ValueError) as error:  # a ValueError for a dtype that nobody knows
        raise ManifestError(
            f"{GRAPH_FILE} must be a SavedModel as TensorFlow writes it. "
            f"Received: {file} ({error}). Copy the version again, or export it again."
        ) from error


def sizes(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Return the bytes of each file and folder at the top of a version.

    Args:
        folder: The version's folder, the one with `saved_model.pb`.

    Raises:
        OSError: If it cannot be read.

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
