"""An index on disk: files that never change, and one small file that says which of them are it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import DamagedIndexError, ManifestError

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
        >>> from keras_mrl_serving.index.writing import Writing
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
        >>> from keras_mrl_serving.index.writing import Writing
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
