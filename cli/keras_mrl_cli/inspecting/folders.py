"""A version's folder, and the folder above the versions."""

from __future__ import annotations

import os
from pathlib import Path

from keras_mrl_serving.saved_model import GRAPH_FILE, list_versions, sizes

from ..asking import RefusalError


def versions(base_path: Path) -> dict[int, Path]:
    """Return the versions under a folder, the lowest first; files by a number are none."""
    found = {number: Path(path) for number, path in list_versions(base_path).items()}
    return {number: path for number, path in found.items() if path.is_dir()}


def strays(base_path: Path) -> list[str]:
    """Return the names of files that a server takes for versions, and cannot load."""
    return [
        os.path.basename(path)
        for path in list_versions(base_path).values()
        if not os.path.isdir(path)
    ]


def find_version(path: str) -> tuple[Path, dict[int, Path]]:
    """Return the version a path means, and all of the folder above it if that was named.

    Raises:
        RefusalError: If there is none.
        OSError: If the folder cannot be read.
    """
    folder = Path(path)
    if (folder / GRAPH_FILE).exists():
        return folder, {}
    known = versions(folder) if folder.is_dir() else {}
    if not known:
        raise RefusalError(
            f"A model is a folder with {GRAPH_FILE}, or the folder above such, each named by its "
            f"number. Received: {path}. Correct the path, or export one with keras-mrl export."
        )
    newest = list(known.values())[-1]
    if not (newest / GRAPH_FILE).exists():
        raise RefusalError(
            f"A version is a folder with {GRAPH_FILE}. Received: {newest} without one. "
            "Copy it again under a name that is no number, and rename it."
        )
    return newest, known


def disk_bytes(folder: Path) -> int:
    """Return what a version takes on disk."""
    return sum(sizes(folder).values())
