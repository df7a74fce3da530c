"""Which names under a base path are versions: TensorFlow Serving's rule, for all who look there."""

from __future__ import annotations

import os
import re

# absl::SimpleAtoi: ASCII white space around, a sign, ASCII digits. So "00000123" is version 123.
_NUMBER = re.compile(r"[ \t\n\v\f\r]*([+-]?[0-9]+)[ \t\n\v\f\r]*", re.ASCII)


def version_number(name: str) -> int | None:
    """Return the version a folder name stands for; None if it is no number of 64 bits.

    Args:
        name: Name of a child of the base path.

    Examples:
        >>> version_number("007"), version_number("7.tmp")
        (7, None)
    """
    match = _NUMBER.fullmatch(name)
    if match is None:
        return None
    number = int(match[1])
    return number if -(2**63) <= number < 2**63 else None


def list_versions(base_path: str | os.PathLike[str]) -> dict[int, str]:
    """Return the path of every version under `base_path`, ascending.

    Of two names with one number the later in sort order counts. A file with a numeric name counts
    too: TensorFlow Serving does not look at what it is before it loads it.

    Args:
        base_path: The folder of the model.

    Raises:
        OSError: If `base_path` is no folder that can be read.

    Examples:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as base_path:
        ...     for name in ("10", "9", "11.tmp"):
        ...         (Path(base_path) / name).mkdir()
        ...     print(list(list_versions(base_path)))
        [9, 10]
    """
    found = {}
    for name in sorted(os.listdir(base_path)):
        number = version_number(name)
        if number is not None:
            found[number] = os.path.join(base_path, name)
    return dict(sorted(found.items()))
