"""Writes an index to a folder: the old one is whole until the new one is.

New files are written beside those that are there, and then `index.json` is replaced, which names
them with their sizes and digests. Killed before that, the old index is untouched; after it, the
new one is whole. What no `index.json` names any more is removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ..version import __version__
from .saved import CARD, FORMAT, digest_of, is_ours

try:
    import fcntl
except ImportError:  # Windows: two writers of one folder are not noticed there
    fcntl = None  # type: ignore[assignment]


class Writing:
    """The files of an index while they are written; a context, which removes them unless committed.

    Args:
        path: The folder; made if it is not there.

    Raises:
        BlockingIOError: If another process, or another thread, is writing there.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with Writing(folder) as files:
        ...     files.array("ids", (3,), np.int64)[:] = [7, 2, 5]
        ...     files.commit({"engine": "exact"})
        >>> from keras_mrl_serving.index.saved import read
        >>> saved = read(folder)
        >>> saved.card["engine"], saved.array("ids").tolist()
        ('exact', [7, 2, 5])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._is_new = not self.path.exists()
        self.path.mkdir(parents=True, exist_ok=True)
        self._token = secrets.token_hex(8)
        self._aside = self.path / f"index-{self._token}.json"
        self._files: dict[str, Path] = {}
        self._arrays: list[np.memmap[Any, Any]] = []
        self._lock = _lock(self.path)

    def array(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array on disk, to be filled.

        Raises:
            OSError: If the disk has no room for it.
        """
        place = self.place(name, "npy")
        array = np.lib.format.open_memmap(place, mode="w+", dtype=np.dtype(dtype), shape=shape)
        self._arrays.append(array)
        if hasattr(
            os, "posix_fallocate"
        ):  # a mapped file that finds the disk full kills its writer
            with open(place, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, place.stat().st_size)
        return array

    def place(self, name: str, suffix: str) -> Path:
        """Return where a file is to be written."""
        self._files[name] = self.path / f"{name}-{self._token}.{suffix}"
        return self._files[name]

    def commit(self, card: Mapping[str, Any]) -> None:
        """Make the files safe, then make them the index.

        Args:
            card: JSON that says what they are.
        """
        for array in self._arrays:
            array.flush()
        files = {}
        for name, place in self._files.items():
            with open(place, "rb") as file:
                os.fsync(file.fileno())
                found = hashlib.file_digest(file, "sha256").hexdigest()
            files[name] = {"name": place.name, "bytes": place.stat().st_size, "sha256": found}
        said = {"format": FORMAT, "made_with": __version__, **card, "files": files}
        text = json.dumps({**said, "sha256": digest_of(said)}, indent=1).encode()
        with open(self._aside, "wb") as written:
            written.write(text)
            written.flush()
            os.fsync(written.fileno())
        _sync_folder(self.path)
        kept = {place.name for place in self._files.values()}
        self._files = {}  # from here on they may be the index: whatever happens, they stay
        os.replace(self._aside, self.path / CARD)
        _sync_folder(self.path)
        _remove(place for place in self.path.iterdir() if place.name not in kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._arrays.clear()
        _remove((*self._files.values(), self._aside))
        if self._is_new and not any(self.path.iterdir()):
            self.path.rmdir()
        if self._lock is not None:
            os.close(self._lock)


def _lock(folder: Path) -> int | None:
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise BlockingIOError(
            f"One writer at a time saves an index. Received: {os.fspath(folder)!r}, which another "
            "is writing. Wait for it, or choose another folder."
        ) from error
    return descriptor


def _sync_folder(path: Path) -> None:
    if os.name == "nt":  # Windows opens no folders
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _remove(places: Iterable[Path]) -> None:
    for place in list(places):
        if place.name != CARD and is_ours(place.name):
            place.unlink(missing_ok=True)
