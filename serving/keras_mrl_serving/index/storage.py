"""A saved index: written so that a crash leaves the old one whole, checked when it is opened.

A folder holds data files, which never change, and one card, `index.json`, which names them with
their sizes and SHA-256 digests.

To save is to write new files under new names beside the old ones, to make them safe on the disk
(fsync), and then to replace the card in one step (`os.replace`). Before that step the folder is
the old index, after it the new one: no journal, no repair. Files that the card no longer names are
removed last. An index that another process has opened stays readable: its files are unlinked, not
written to.

To open is to compare the size of every file with the card, and its digest too unless the caller
waives that: a flipped bit in a memory-mapped matrix would be a wrong neighbour and no error.

The digests find damage, not malice: whoever writes a card can write its digests. So a card names
files by names that saving gives, which lie in its folder, and an array has the shape and the dtype
that the facts of the index call for.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from ..calls import shape_fits
from ..errors import DamagedIndexError, ManifestError
from ..untrusted import (
    JSON_BYTES,
    UntrustedFileError,
    open_file,
    parse_json,
    read_array,
    read_bytes,
)
from ..version import __version__
from .facts import IndexFacts
from .ids import RowIds, SortedNames

try:
    import fcntl
except ImportError:  # Windows: two writers of one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

FORMAT = 1
CARD = "index.json"

_DATA_OR_NEW_CARD = re.compile(r"[a-z0-9_]+-[0-9a-f]{16}\.(npy|faiss)|index-[0-9a-f]{16}\.json")


@dataclass(frozen=True)
class SavedFiles:
    """The checked files of a saved index.

    Args:
        folder: Where they lie.
        card: The facts of the index that `IndexWriter.commit` wrote.
        files: The path of each file by its name.

    Examples:
        >>> SavedFiles(Path("birds.index"), {"engine": "exact"}, {}).card["engine"]
        'exact'
    """

    folder: Path
    card: Mapping[str, Any]
    files: Mapping[str, Path]

    def file(self, name: str) -> Path:
        """Return the path of a file.

        Raises:
            DamagedIndexError: If the card has none of this name.
        """
        if name not in self.files:
            raise _damaged(self.folder, f"{CARD}, which names no file {name!r}")
        return self.files[name]

    def array(
        self, name: str, shape: tuple[int | None, ...], dtype: npt.DTypeLike
    ) -> npt.NDArray[Any]:
        """Return an array, memory-mapped and read-only.

        Args:
            name: Of its file.
            shape: That it must have; None is any size.
            dtype: That it must have.

        Raises:
            DamagedIndexError: If it is another.
        """
        path = self.file(name)
        try:
            array = read_array(path, within=self.folder)
        except UntrustedFileError as error:
            raise _damaged(self.folder, f"{path.name}, {error}") from error
        fits = shape_fits(array.shape, shape) and array.dtype == dtype
        if not fits or not array.flags.c_contiguous:
            expected = f"{np.dtype(dtype)} {shape}".replace("None", "any")
            received = f"{array.dtype} {array.shape}"
            order = "" if array.flags.c_contiguous else " column by column"
            raise _damaged(self.folder, f"{path.name} of {received}{order} instead of {expected}")
        return array

    def check_engine(self, engine: str) -> None:
        """Raise `ManifestError` if another engine than this one wrote the index."""
        if self.card.get("engine") != engine:
            raise ManifestError(
                f"An index is opened by the engine that wrote it. Received: one of the engine "
                f"{self.card.get('engine')!r} for {engine!r}. Open it with open_index."
            )


def read(path: str | os.PathLike[str], *, verify: bool = True) -> SavedFiles:
    """Return the files of the index in a folder, once their sizes and digests are compared.

    Args:
        path: The folder.
        verify: Compare the digests, which reads every file once. Without it only sizes are
            compared.

    Raises:
        FileNotFoundError: If no index is there.
        DamagedIndexError: If a file is missing, cut short or changed.
        ManifestError: If a later version of keras-mrl wrote it.

    Examples:
        >>> import tempfile
        >>> from keras_mrl_serving.index.storage import IndexWriter
        >>> folder = tempfile.mkdtemp()
        >>> with IndexWriter(folder) as writer:
        ...     writer.commit({"engine": "exact"})
        >>> sorted(read(folder).card)
        ['engine', 'files', 'format', 'made_with']
    """
    return open_saved(path, lambda saved: saved, verify=verify)


def open_saved(path: str | os.PathLike[str], make: Callable[[SavedFiles], T], *, verify: bool) -> T:
    """Return what `make` makes of a folder's files; start over if they are replaced meanwhile.

    Args:
        path: The folder.
        make: Opens the files; it may fail because another process has just removed them.
        verify: As in `read`.

    Raises:
        The errors of `read` and of `make`.

    Examples:
        >>> import tempfile
        >>> from keras_mrl_serving.index.storage import IndexWriter
        >>> folder = tempfile.mkdtemp()
        >>> with IndexWriter(folder) as writer:
        ...     writer.commit({"engine": "exact"})
        >>> open_saved(folder, lambda saved: saved.card["engine"], verify=True)
        'exact'
    """
    folder = Path(path)
    while True:
        card_before = _card_bytes(folder)
        try:
            return make(_checked_files(folder, verify))
        except Exception:
            if _card_bytes(folder) == card_before:
                raise


def _card_bytes(folder: Path) -> bytes | None:
    try:
        return read_bytes(folder / CARD, JSON_BYTES, within=folder)
    except (OSError, UntrustedFileError):
        return None


def _checked_files(folder: Path, verify: bool) -> SavedFiles:
    try:
        text = read_bytes(folder / CARD, JSON_BYTES, within=folder)
    except UntrustedFileError as error:
        raise _damaged(folder, f"{CARD}, {error}") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(
            f"A saved index is a folder with a file {CARD}. Received: {os.fspath(folder)!r}, which "
            "has none. Build one: `keras-mrl index build --help`."
        ) from error
    card = _checked_card(folder, text)
    paths = {name: folder / entry["name"] for name, entry in card["files"].items()}
    for name, entry in card["files"].items():
        _check_file(folder, paths[name], entry, verify)
    return SavedFiles(folder, card, paths)


def _checked_card(folder: Path, text: bytes) -> dict[str, Any]:
    try:
        card = parse_json(text)
        digest = card.pop("sha256")
        if _card_text(card, digest) != text:
            raise ValueError("not the bytes that were written")
        if card["format"] == FORMAT:
            if digest != _card_digest(card):
                raise ValueError("its digest differs")
            _check_entries(card["files"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, f"{CARD}, which does not read ({error})") from error
    if card["format"] != FORMAT:
        raise ManifestError(
            f"This version of keras-mrl reads indexes of format {FORMAT}. "
            f"Received: {os.fspath(folder)!r} of format {card['format']!r}. "
            "Install the version of keras-mrl that wrote it, or a later one."
        )
    return dict(card)


def _check_entries(entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise an error that says why where an entry is none that saving writes."""
    for name, entry in entries.items():
        file, size, digest = entry["name"], entry["bytes"], entry["sha256"]
        if not _DATA_OR_NEW_CARD.fullmatch(file):
            raise ValueError(f"{file!r:.80} is no name that saving gives to a file")
        if type(size) is not int or type(digest) is not str:
            raise ValueError(f"{name!r:.80} has no size and no digest")


def _card_text(card: Mapping[str, Any], digest: str) -> bytes:
    return json.dumps({**card, "sha256": digest}, indent=1).encode()


def _card_digest(card: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(card).encode()).hexdigest()


def _check_file(folder: Path, path: Path, entry: Mapping[str, Any], verify: bool) -> None:
    """Compare the size of a file with the card's entry, and its digest if `verify`."""
    try:
        with open_file(path, within=folder) as file:
            size = os.fstat(file.fileno()).st_size
            is_read = verify and size == entry["bytes"]
            is_same = not is_read or _digest(file) == entry["sha256"]
    except OSError as error:
        raise _damaged(folder, f"{path.name}: {error.strerror}") from error
    except UntrustedFileError as error:
        raise _damaged(folder, f"{path.name}, {error}") from error
    if size != entry["bytes"]:
        raise _damaged(folder, f"{path.name} of {size} bytes instead of {entry['bytes']}")
    if not is_same:
        raise _damaged(folder, f"{path.name}, whose bytes have changed")


def _digest(file: io.BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(folder: Path, received: str) -> DamagedIndexError:
    return DamagedIndexError(
        "An index is read as it was written. "
        f"Received: {os.fspath(folder)!r} with {received}. "
        "Copy it again from where it is whole, or build it anew."
    )


class IndexWriter:
    """Writes an index to a folder; a context, which removes what it wrote unless committed.

    Args:
        path: The folder; made if it is not there.
        replaces: Whether an index that is there is replaced.

    Raises:
        BlockingIOError: On entry, if another process, or another thread, is writing there.
        FileExistsError: On entry, if an index is there that is not to be replaced.

    Examples:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with IndexWriter(folder) as writer:
        ...     writer.array("ids", (3,), np.int64)[:] = [7, 2, 5]
        ...     writer.commit({"engine": "exact"})
        >>> from keras_mrl_serving.index.storage import read
        >>> saved = read(folder)
        >>> saved.card["engine"], saved.array("ids", (None,), np.int64).tolist()
        ('exact', [7, 2, 5])
    """

    def __init__(self, path: str | os.PathLike[str], *, replaces: bool = True) -> None:
        self.folder = Path(path)
        self._replaces = replaces
        self._is_new_folder = False
        self._token = secrets.token_hex(8)
        self._new_card = self.folder / f"index-{self._token}.json"
        self._paths: dict[str, Path] = {}
        self._arrays: list[np.memmap[Any, Any]] = []
        self._lock: int | None = None

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> IndexWriter:
        """Return the writer that is given as a path, or a new one that writes there."""
        return path if isinstance(path, IndexWriter) else cls(path)

    def __fspath__(self) -> str:
        """Return the folder, so that a writer is taken wherever a path is."""
        return os.fspath(self.folder)

    def array(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array on disk, to be filled.

        Raises:
            OSError: If the disk has no room for it.
        """
        path = self.path_for(name, "npy")
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=shape)
        self._arrays.append(array)
        # Take the room now: a mapped file that finds the disk full kills the process.
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return array

    def path_for(self, name: str, suffix: str) -> Path:
        """Return the path at which the caller is to write a file."""
        self._paths[name] = self.folder / f"{name}-{self._token}.{suffix}"
        return self._paths[name]

    def commit(self, card: Mapping[str, Any]) -> None:
        """Make the files safe on the disk, then make them the index of the folder.

        Args:
            card: JSON that describes the files.
        """
        for array in self._arrays:
            array.flush()
        entries = {name: _synced_entry(path) for name, path in self._paths.items()}
        full = {"format": FORMAT, "made_with": __version__, **card, "files": entries}
        with open(self._new_card, "wb") as file:
            file.write(_card_text(full, _card_digest(full)))
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(self.folder)
        names = {path.name for path in self._paths.values()}
        self._paths = {}  # os.replace may succeed and still raise: from here on they must stay
        os.replace(self._new_card, self.folder / CARD)
        _sync_folder(self.folder)
        _remove(path for path in self.folder.iterdir() if path.name not in names)

    def __enter__(self) -> Self:
        self._is_new_folder = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self.folder)
        # Another writer may have committed since the caller looked; none can from here on.
        if not self._replaces and (self.folder / CARD).exists():
            self.__exit__()
            raise FileExistsError(
                f"An index is replaced only where that is asked for. Received: "
                f"{os.fspath(self.folder)!r}, which holds one. Name another folder."
            )
        return self

    def __exit__(self, *_: object) -> None:
        self._arrays.clear()
        _remove((*self._paths.values(), self._new_card))
        if self._is_new_folder and not any(self.folder.iterdir()):
            self.folder.rmdir()
        if self._lock is not None:
            os.close(self._lock)


# The ids of the rows.


def write_ids(writer: IndexWriter, ids: RowIds) -> None:
    """Write the ids of an index's rows.

    Strings are two more files: their UTF-8, sorted, and where each ends.

    Examples:
        >>> import tempfile
        >>> with IndexWriter(tempfile.mkdtemp()) as writer:
        ...     write_ids(writer, RowIds.of(["wren", "ant"]))
        ...     sorted(writer._paths)
        ['id_bytes', 'id_ends', 'ids']
    """
    arrays: dict[str, npt.NDArray[Any]] = {"ids": ids.numbers}
    if ids.names is not None:
        arrays |= {"id_bytes": ids.names.data, "id_ends": ids.names.ends}
    for name, array in arrays.items():
        writer.array(name, array.shape, array.dtype)[:] = array


def read_ids(saved: SavedFiles, facts: IndexFacts) -> RowIds:
    """Return the ids of a saved index's rows; strings stay memory-mapped.

    Raises:
        DamagedIndexError: If they are no ids.

    Examples:
        >>> import tempfile
        >>> from keras_mrl_serving import ExactIndex, FunnelSchedule
        >>> folder = tempfile.mkdtemp()
        >>> ExactIndex.build(np.eye(2), FunnelSchedule((2,), (), 1), ["wren", "ant"]).save(folder)
        >>> saved = read(folder)
        >>> list(read_ids(saved, IndexFacts.from_json(saved.card)).names)
        ['ant', 'wren']
    """
    numbers = np.array(saved.array("ids", (None,), np.int64))
    if not facts.has_names:
        return RowIds(numbers)
    names = SortedNames(
        saved.array("id_bytes", (None,), np.uint8),
        saved.array("id_ends", (len(numbers),), np.int64),
    )
    try:
        names.check()
        if not np.array_equal(np.sort(numbers), np.arange(len(numbers))):
            raise ValueError("rows that share a string")
    except ValueError as error:
        raise _damaged(saved.folder, f"ids that are no strings ({error})") from error
    return RowIds(numbers, names)


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


def _synced_entry(path: Path) -> dict[str, Any]:
    """Return a file's entry in the card, once the file is safe on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        digest = _digest(file)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest}


def _sync_folder(path: Path) -> None:
    if os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(paths: Iterable[Path]) -> None:
    for path in list(paths):
        if path.name != CARD and is_ours(path.name):
            path.unlink(missing_ok=True)


def is_ours(name: str) -> bool:
    """Return whether a file in an index's folder bears a name that saving gives.

    Examples:
        >>> is_ours("index.json"), is_ours("rows_64-0123456789abcdef.npy"), is_ours("notes.txt")
        (True, True, False)
    """
    return name == CARD or _DATA_OR_NEW_CARD.fullmatch(name) is not None
