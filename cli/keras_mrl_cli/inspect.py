"""Say what an exported model is: its signatures, its manifest, its sizes.

WHAT is a version's folder, the folder above the versions, or a server's gRPC port. Neither needs
TensorFlow. Of the folder above, the highest version is shown, as that is the one a server takes.

  keras-mrl inspect models/digits
  keras-mrl inspect localhost:8500 --model digits --json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import asking
from .refuse import refuse, unknown_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("what", metavar="WHAT", help="folder, or host:port of a server's gRPC port")
    asking.add_server_arguments(parser.add_argument_group("a model that is served"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Show a model."""
    if rest:
        return refuse(unknown_flags(rest), status=2)
    return asking.finished(lambda: _work(arguments))


def _work(arguments: argparse.Namespace) -> int:
    asking.check_server_arguments(arguments)
    from .inspecting.show import show

    return show(arguments)
