"""A version's folder, and the folder above the versions."""

from __future__ import annotations

from pathlib import Path

from keras_mrl_serving.saved_model import GRAPH_FILE, sizes

from ..asking import RefusalError

_MOST = 2**63 - 1


def versions(base_path: Path) -> dict[int, Path]:
    """Return the versions under a folder, the lowest first."""
    found = {
        int(child.name): child
        for child in sorted(base_path.iterdir())
        if child.name.isascii() and child.name.isdecimal() and int(child.name) <= _MOST
    }
    return dict(sorted(found.items()))


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
