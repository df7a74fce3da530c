"""Which files of a folder or a zip are images of classes: one rule for both."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from ..asking import RefusalError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}


def entries(place: Path) -> Iterator[tuple[str, bytes]]:
    """Give name and bytes of every image file, in the order of the names.

    A folder and the zip of it give the same.

    Raises:
        RefusalError: If the place is neither, or the folders of classes lie at several depths.
        OSError: If a file or folder does not read.
    """
    if place.is_dir():
        for name in _images(place, _files(place)):
            yield name, (place / name).read_bytes()
    elif zipfile.is_zipfile(place):
        with zipfile.ZipFile(place) as archive:
            # Some programs write the separators of their system.
            stored = {name.replace("\\", "/"): name for name in archive.namelist()}
            for name in _images(place, stored):
                yield name, archive.read(stored[name])
    else:
        raise RefusalError(
            "Images come from a folder, a zip, an .npz or a Keras dataset. "
            f"Received: {place}, which is none of them. "
            "Correct the path, or name cifar10, cifar100, fashion_mnist or mnist."
        )


def _files(folder: Path) -> Iterator[str]:
    """Names of all files in a folder, however deep, as a zip of it would have them."""

    def stop(error: OSError) -> None:
        raise error  # a folder that cannot be read is not an empty one

    for above, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        at = Path(above)
        folders[:] = [name for name in folders if not _leads_back(at / name)]
        yield from ((at / name).relative_to(folder).as_posix() for name in names)


def _leads_back(folder: Path) -> bool:
    """Whether a folder is a link to one that it lies in: there would be no end."""
    here = folder.parent.resolve()
    return folder.is_symlink() and folder.resolve() in (here, *here.parents)


def _images(place: Path, names: Iterable[str]) -> list[str]:
    """Which of the files of a place are images of classes, sorted."""
    kept = sorted(filter(_is_image, names))
    above = sorted({str(PurePosixPath(name).parent.parent) for name in kept})
    if len(above) > 1:
        raise RefusalError(
            "The folders of the classes must lie side by side. "
            f"Received: {place} with classes in {', '.join(above[:3])}. "
            "Give one of them, the test images as --test for example."
        )
    return kept


def _is_image(name: str) -> bool:
    """Whether a file of a class is meant: hidden ones and those of no folder are not."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    is_file = not name.endswith("/")  # a zip lists folders, too
    return is_file and bool(path.parent.name) and path.suffix.lower() in _SUFFIXES and not hidden
