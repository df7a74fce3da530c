"""The output folder of a comparison: a lock for one process, and files replaced atomically."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from .data import ComparisonError, Place

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two processes out of one folder
    fcntl = None  # type: ignore[assignment]

PLAN, SPLITS, NETS = "plan.json", "splits.npz", "nets"


@contextmanager
def claim(folder: Path, data: Sequence[Place]) -> Iterator[None]:
    """Make the folder of a comparison and keep other processes out of it.

    Raises:
        ComparisonError: If it holds something else, lies in the images, or another process has it.
    """
    _check_place(folder, data)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a") as lock:
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ComparisonError(
                "One process compares in a folder at a time. "
                f"Received: {folder}, where another is at work. Wait for it, or name another --out."
            ) from error
        yield


def _check_place(folder: Path, data: Sequence[Place]) -> None:
    here = folder.resolve()
    for place in (Path(place) for place in data if isinstance(place, str)):
        if place.is_dir() and place.resolve() in (here, *here.parents):
            raise ComparisonError(
                "--out must not lie in the images, where its figures would be a class. "
                f"Received: {folder} in {place}. Name a folder elsewhere."
            )
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    # Hidden files are the lock, and what was being written when a process was killed.
    others = {name for name in names if not name.startswith(".")} - {SPLITS}
    if others and PLAN not in others:
        raise ComparisonError(
            "--out must be a new folder, an empty one, or one of a comparison. "
            f"Received: {folder} with {sorted(others)[0]}. Name another."
        )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to; it takes the place of `path` once all is written."""
    partial = path.with_name(f".partial-{path.name}")
    partial.unlink(missing_ok=True)  # what a killed process left, or a link that somebody put there
    yield partial
    os.replace(partial, path)


def damaged(path: Path, error: Exception) -> ComparisonError:
    """Return the refusal of a file that does not read as a comparison writes it."""
    return ComparisonError(
        "A comparison goes on from the files it wrote. "
        f"Received: {path}, which is damaged ({type(error).__name__}). "
        "Remove the folder and begin anew, or name another with --out."
    )
