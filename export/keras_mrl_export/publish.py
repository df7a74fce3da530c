"""A version appears under its number whole, or not at all, and never in place of another.

It is written in a folder beside its final place, on the same file system, whose name is no number,
so that no server loads from it. Renaming that folder to the number is atomic.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from keras_mrl_serving.integers import as_int
from keras_mrl_serving.saved_model import list_versions

UNFINISHED = ".unfinished-"


@dataclass
class Staged:
    """A version being written.

    Args:
        folder: Where the SavedModel is written.
        scratch: For files that are not part of it.
        published: Folder of the version once it is published.
    """

    folder: Path
    scratch: Path
    published: Path


@contextmanager
def publishing(
    base_path: Path, version: int | None, clock: Callable[[], float] = time.time
) -> Iterator[Staged]:
    """Yield folders to write a version in, and rename it to its number if nothing raised.

    Args:
        base_path: Folder of the versions; made if there is none, and removed again if it was made
            for a version that failed.
        version: The number; None takes the seconds since 1970, as other exporters for TensorFlow
            Serving do, or the number after the highest there is if that is more. So a number does
            not come again where the versions before it were removed.
        clock: Returns the seconds since 1970.

    Raises:
        FileExistsError: If `version` exists.
        ValueError: If `version` is not a non-negative integer, or `base_path` is itself a version.
    """
    check_version(base_path, version)
    unfinished, made = _make_unfinished(base_path)
    staged = Staged(unfinished / "model", unfinished / "scratch", base_path)
    try:
        staged.scratch.mkdir()
        yield staged
        staged.published = _rename_to_number(staged.folder, base_path, version, clock)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        _remove_empty(made)
        raise
    shutil.rmtree(unfinished, ignore_errors=True)


def check_version(base_path: Path, version: int | None) -> None:
    """Raise if `version` is no number a server reads, or is taken under `base_path`.

    Raises:
        FileExistsError: If `version` exists.
        ValueError: If `version` is not a non-negative integer, or no number is left to take.
    """
    if (base_path / "saved_model.pb").exists():
        raise ValueError(
            "base_path must be the folder above the versions. "
            f"Received: {base_path}, which is itself a version. Give {base_path.parent}."
        )
    if version is None:
        if base_path.is_dir() and not _is_version(_next_version(base_path)):
            raise ValueError(
                "The next version must be a number of 64 bits. "
                f"Received: {base_path}, which holds {2**63 - 1}. Give one that is free: version=1."
            )
        return
    if not _is_version(version):
        raise ValueError(
            f"version must be a non-negative integer. Received: version={version!r}. "
            "Leave it out to take a number that is free."
        )
    if base_path.exists() and version in list_versions(base_path):
        raise _exists_error(base_path, version)


def _is_version(number: object) -> bool:
    try:
        return 0 <= as_int(number) < 2**63
    except TypeError:
        return False


def _next_version(base_path: Path, clock: Callable[[], float] = time.time) -> int:
    return max(int(clock()), max([0, *list_versions(base_path)]) + 1)


def _exists_error(base_path: Path, version: int) -> FileExistsError:
    return FileExistsError(
        "A published version is never overwritten. "
        f"Received: version={version}, which exists under {base_path}. "
        "Leave version out to take a number that is free."
    )


def _make_unfinished(base_path: Path, tries: int = 10) -> tuple[Path, list[Path]]:
    """Return a new folder under `base_path`, and the folders above it that had to be made."""
    made = [folder for folder in (base_path, *base_path.parents) if not folder.exists()]
    try:
        base_path.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=base_path)), made
    except OSError as error:
        _remove_empty(made)
        if tries and isinstance(error, FileNotFoundError):  # another export removed its base_path
            return _make_unfinished(base_path, tries - 1)
        raise


def _remove_empty(folders: list[Path]) -> None:
    """Remove the folders that are empty, the lowest first."""
    for folder in folders:
        with suppress(OSError):  # another export writes there
            folder.rmdir()


def _rename_to_number(
    folder: Path, base_path: Path, version: int | None, clock: Callable[[], float]
) -> Path:
    while True:
        number = _next_version(base_path, clock) if version is None else version
        published = base_path / str(number)
        try:
            os.rename(folder, published)
            return published
        except OSError as error:
            if not published.exists():
                raise
            if version is not None:
                raise _exists_error(base_path, number) from error
            # Another export has taken the number meanwhile: try the next one.
