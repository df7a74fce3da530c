"""Rows of files that are mapped into memory, and are read once."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import numpy.typing as npt


def forget(array: npt.NDArray[Any]) -> None:
    """Give back the memory of what was read of a file that `array` maps for reading.

    The values stay: whoever asks for them again reads the file again. An array that maps no file,
    or one it may write to, is left as it is.

    Args:
        array: Any array, of any shape.
    """
    if not isinstance(array, np.memmap) or array.mode != "r" or not hasattr(mmap, "MADV_DONTNEED"):
        return
    holder: Any = array
    while holder is not None and not isinstance(holder, mmap.mmap):
        holder = getattr(holder, "base", None)
    if holder is not None:
        holder.madvise(mmap.MADV_DONTNEED)
