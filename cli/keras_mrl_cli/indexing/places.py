"""The folder an index is built in."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from keras_mrl_serving.index.storage import CARD, is_ours

from ..asking import RefusalError


def check_out(out: str, force: bool) -> None:
    """Raise `RefusalError` for a folder that holds an index already, or something else."""
    place = Path(out)
    if not place.exists():
        _check_writable(next(p for p in place.absolute().parents if p.exists()), out)
        return
    if not place.is_dir():
        raise _not_writable(f"{out}, which is a file")
    _check_writable(place, out)
    names = sorted(os.listdir(place))
    if CARD in names:
        if not force:
            raise RefusalError(
                "An index is replaced only with --force. "
                f"Received: --out {out}, which holds one. Add --force, or name another folder."
            )
        return
    others = [name for name in names if not is_ours(name)]
    if others:
        raise RefusalError(
            "An index is built in a folder of its own. "
            f"Received: --out {out}, which holds {others[0]}. Name a new folder."
        )


def check_room(out: str, needed: int) -> None:
    """Raise `RefusalError` if the disk has not so many bytes left; mapped files cannot say so."""
    place = Path(out).absolute()
    free = shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free
    if free < needed:
        raise RefusalError(
            f"An index of these rows takes {in_bytes(needed)} of disk. "
            f"Received: --out {out} with {in_bytes(free)} left. "
            "Make room, name another disk, or give fewer or narrower --dims."
        )


def in_bytes(count: int) -> str:
    """Return a number of bytes as one reads it.

    Examples:
        >>> in_bytes(999), in_bytes(1_500), in_bytes(20_000_000)
        ('999 bytes', '1.5 kB', '20.0 MB')
    """
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return f"{count / 1000**power:.1f} {unit}"
    return f"{count} bytes"


def _check_writable(folder: Path, out: str) -> None:
    if not folder.is_dir():
        raise _not_writable(f"{out}, for {folder} is a file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _not_writable(f"{out} (Permission denied)")


def _not_writable(received: str) -> RefusalError:
    return RefusalError(
        f"--out must be a folder that can be written. Received: {received}. Name another."
    )
