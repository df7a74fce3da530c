"""A process that ends with the one that started it, and takes its temporary folders along."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path

_TRIES = 100


def end_with_parent(folders: Sequence[Path]) -> threading.Lock:
    """Watch standard input, a pipe nobody writes to: it ends when the parent does, however.

    Then the folders are removed, and this process ends.

    Args:
        folders: What the parent would have removed.

    Returns:
        What this process must acquire before it ends of itself, so that the folders are removed
        even where it failed because they went.
    """
    ending = threading.Lock()
    threading.Thread(target=_watch, args=(folders, ending), daemon=True).start()
    return ending


def _watch(folders: Sequence[Path], ending: threading.Lock) -> None:
    os.read(0, 1)
    with ending:
        for _ in range(_TRIES):  # TensorFlow may be writing there
            for folder in folders:
                shutil.rmtree(folder, ignore_errors=True)
            if not any(folder.exists() for folder in folders):
                break
        os._exit(1)
