"""The folder of a comparison: files that are whole or not there, and one process at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..asking import RefusalError

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder are not told apart
    fcntl = None  # type: ignore[assignment]

_NOTE = "plan.json"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside `path` to write to; it takes the place of `path` once all is written."""
    partial = path.with_name(f".partial-{path.name}")
    yield partial
    os.replace(partial, path)


def damaged(path: Path, error: Exception) -> RefusalError:
    """Return the refusal of a file that is not as a comparison writes it."""
    return RefusalError(
        "A comparison goes on from the files it wrote. "
        f"Received: {path}, which is damaged ({type(error).__name__}). "
        "Remove the folder and begin anew, or name another with --out."
    )


@contextmanager
def held(out: Path, data: list[str]) -> Iterator[None]:
    """Make the folder of a comparison and keep it to this process.

    Raises:
        RefusalError: If it holds something else, lies in the images, or another process has it.
    """
    _check_place(out, data)
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RefusalError(
                "One process compares in a folder at a time. "
                f"Received: {out}, where another is at work. Wait for it, or name another --out."
            ) from error
        yield


def _check_place(out: Path, data: list[str]) -> None:
    here = out.resolve()
    for place in map(Path, data):
        if place.is_dir() and place.resolve() in (here, *here.parents):
            raise RefusalError(
                "--out must not lie in the images, where its figures would be a class. "
                f"Received: {out} in {place}. Name a folder elsewhere."
            )
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    # Hidden ones are the lock, and what was being written when a process was killed.
    others = {name for name in names if not name.startswith(".")} - {"splits.npz"}
    if others and _NOTE not in others:
        raise RefusalError(
            "--out must be a new folder, an empty one, or one of a comparison. "
            f"Received: {out} with {sorted(others)[0]}. Name another."
        )
