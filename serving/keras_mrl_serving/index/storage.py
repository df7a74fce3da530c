"""An index on disk: files that never change, and one small file that says which of them are it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import DamagedIndexError, ManifestError
from ..version import __version__

T = TypeVar("T")

FORMAT = 1
CARD = "index.json"

_OURS = re.compile(r"[a-z0-9_]+-[0-9a-f]{16}\.(npy|faiss)|index-[0-9a-f]{16}\.json")


@dataclass(frozen=True)
class Saved:
    """What a folder holds.

    Args:
        card: What `Writing.commit` was given.
        files: Where each of its files lies, by name.

    Examples:
        >>> Saved({"engine": "exact"}, {}).card["engine"]
        'exact'
    """

    card: Mapping[str, Any]
    files: Mapping[str, Path]

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return an array, memory-mapped and read-only."""
        return np.load(self.files[name], mmap_mode="r", allow_pickle=False)


def read(path: str | os.PathLike[str], *, verify: bool = True) -> Saved:
    """Return what a folder holds, after a look at every byte.

    Args:
        path: The folder.
        verify: Compare the digests of the files, which reads them once. Without it their sizes
            alone are compared.

    Raises:
        FileNotFoundError: If no index is there.
        DamagedIndexError: If a file is missing, cut short or changed.
        ManifestError: If a later version of keras-mrl wrote it.

    Examples:
        >>> import tempfile
        >>> from keras_mrl_serving.index.storage import Writing
        >>> folder = tempfile.mkdtemp()
        >>> with Writing(folder) as files:
        ...     files.commit({"engine": "exact"})
        >>> sorted(read(folder).card)
        ['engine', 'files', 'format', 'made_with']
    """
    return opened(path, lambda saved: saved, verify=verify)


def opened(path: str | os.PathLike[str], make: Callable[[Saved], T], *, verify: bool) -> T:
    """Return what is made of a folder's files, again if they are replaced meanwhile.

    Args:
        path: The folder.
        make: Opens the files.
        verify: As `read` takes it.

    Raises:
        What `read` and `make` do.

    Examples:
        >>> import tempfile
        >>> from keras_mrl_serving.index.storage import Writing
        >>> folder = tempfile.mkdtemp()
        >>> with Writing(folder) as files:
        ...     files.commit({"engine": "exact"})
        >>> opened(folder, lambda saved: saved.card["engine"], verify=True)
        'exact'
    """
    folder = Path(path)
    while True:
        before = _card_bytes(folder)
        try:
            return make(_read(folder, verify))
        except Exception:
            if _card_bytes(folder) == before:
                raise


def check_engine(saved: Saved, engine: str) -> None:
    """Raise `ManifestError` if an index is of another engine than the one that opens it.

    Examples:
        >>> check_engine(Saved({"engine": "exact"}, {}), "exact")
    """
    if saved.card.get("engine") != engine:
        raise ManifestError(
            f"An index is opened by the engine that wrote it. Received: one of the engine "
            f"{saved.card.get('engine')!r} for {engine!r}. Open it with open_index."
        )


def digest_of(card: Mapping[str, Any]) -> str:
    """Return the digest of a card, by which a change to it is seen.

    Examples:
        >>> len(digest_of({"engine": "exact"}))
        64
    """
    return hashlib.sha256(json.dumps(card).encode()).hexdigest()


def is_ours(name: str) -> bool:
    """Return whether a file has the name of one that saving an index writes.

    Examples:
        >>> is_ours("index.json"), is_ours("rows_64-0123456789abcdef.npy"), is_ours("notes.txt")
        (True, True, False)
    """
    return name == CARD or _OURS.fullmatch(name) is not None


def _card_bytes(folder: Path) -> bytes | None:
    try:
        return (folder / CARD).read_bytes()
    except OSError:
        return None


def _read(path: Path, verify: bool) -> Saved:
    try:
        text = (path / CARD).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"A saved index is a folder with a file {CARD}. Received: {os.fspath(path)!r}, which "
            "has none. Build one: `keras-mrl index build --help`."
        ) from error
    card = _checked_card(path, text)
    files = {}
    for name, said in card["files"].items():
        files[name] = path / said["name"]
        try:
            size = files[name].stat().st_size
            if size == said["bytes"] and verify:
                with open(files[name], "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            else:
                found = said["sha256"]
        except OSError as error:
            raise _damaged(path, f"{said['name']}: {error.strerror}") from error
        if size != said["bytes"]:
            raise _damaged(path, f"{said['name']} of {size} bytes instead of {said['bytes']}")
        if found != said["sha256"]:
            raise _damaged(path, f"{said['name']}, whose bytes have changed")
    return Saved(card, files)


def _checked_card(path: Path, text: bytes) -> dict[str, Any]:
    try:
        card = json.loads(text)
        digest = card.pop("sha256")
        if json.dumps({**card, "sha256": digest}, indent=1).encode() != text:
            raise ValueError("not the bytes that were written")
        if card["format"] == FORMAT and digest != digest_of(card):
            raise ValueError("its digest differs")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"{CARD}, which does not read ({error})") from error
    if card["format"] != FORMAT:
        raise ManifestError(
            f"This version of keras-mrl reads indexes of format {FORMAT}. "
            f"Received: {os.fspath(path)!r} of format {card['format']!r}. "
            "Install the version of keras-mrl that wrote it, or a later one."
        )
    return dict(card)


def _damaged(path: Path, received: str) -> DamagedIndexError:
    return DamagedIndexError(
        "An index is read as it was written. "
        f"Received: {os.fspath(path)!r} with {received}. "
        "Copy it again from where it is whole, or build it anew."
    )


# Writes an index to a folder: the old one is whole until the new one is.
#
# New files are written beside those that are there, and then `index.json` is replaced, which
# names them with their sizes and digests. Killed before that, the old index is untouched; after
# it, the new one is whole. What no `index.json` names any more is removed.

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
        >>> from keras_mrl_serving.index.storage import read
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
