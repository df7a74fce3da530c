"""How a command says that it cannot go on."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def refuse(sentence: str, status: int = 1) -> int:
    """Print `sentence` where errors go and return the exit status."""
    print(f"keras-mrl: {sentence}", file=sys.stderr)
    return status


def unknown_flags(rest: Sequence[str]) -> str:
    """The sentence for arguments a command does not have."""
    return (
        f"Only known flags are taken. Received: {' '.join(rest)}. "
        "See the command's --help for those there are."
    )
