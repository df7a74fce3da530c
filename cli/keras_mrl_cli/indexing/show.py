"""Show what an index is, after a look at every byte.

Prints its engine, its rows, its funnel, what the encoder was, what it takes in memory and on
disk, and the plan it was chosen by. Every file is compared with the digest written beside it, and
an index that is not as it was written is refused. FAISS need not be installed.

  keras-mrl index show birds.index
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from .. import asking
from ..refuse import refuse, unknown_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("index", metavar="DIR", help="folder of the index")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Show an index."""
    if rest:
        return refuse(unknown_flags(rest), status=2)
    return asking.finished(lambda: _work(arguments))


def _work(arguments: argparse.Namespace) -> int:
    from .showing import show

    return show(arguments)
