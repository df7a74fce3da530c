"""Where a version goes, and what it is called there."""

from __future__ import annotations

import os
import re
from pathlib import Path

# What `keras-mrl deploy` takes too: it stands in flags, in URLs and in the names of containers.
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
# A path loses one of two slashes. A scheme of one letter is a drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def checked_base_path(base_path: str | Path) -> Path:
    """Return the folder of a model's versions as a path.

    Raises:
        TypeError: If it is no path.
        ValueError: If it is empty, or a URL: a folder of that name would be made here.
    """
    if not isinstance(base_path, (str, os.PathLike)):
        raise TypeError(
            "base_path must be a folder, a str or a Path. "
            f"Received: {type(base_path).__name__}. Give for example 'models/birds'."
        )
    text = os.fspath(base_path)
    if not text or _URL.match(text):
        raise ValueError(
            "base_path must be a folder of a file system. "
            f"Received: base_path={text!r}. "
            "Export to a folder, then copy the version's folder to where servers read."
        )
    return Path(text)


def checked_name(name: str) -> str:
    """Return `name`, or raise unless a model can be served and deployed under it.

    Raises:
        TypeError: If it is no `str`.
        ValueError: If it has other characters, or none.
    """
    if isinstance(name, str) and _NAME.fullmatch(name):
        return name
    kind = ValueError if isinstance(name, str) else TypeError
    raise kind(
        "name must be of letters, digits, '_', '.' and '-', the first and the last a letter or "
        f"digit. Received: name={name!r:.80}. Give for example 'birds'."
    )
