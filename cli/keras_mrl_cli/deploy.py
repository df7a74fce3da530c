"""Write what runs tensorflow/serving over a model: docker compose, Kubernetes, configs.

The files are made for the highest version under the base path: its name, its dims, its size on
disk. A README.md among them says how to start, and how clients name the servers.

  keras-mrl deploy deploy/digits --model-base-path models/digits
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import asking
from .refuse import refuse, unknown_flags

_MOST_ROWS = 1024
_MAX_PORT = 2**16 - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("out", metavar="OUT_DIR", help="folder to write to")
    parser.add_argument(
        "--model-base-path", required=True, metavar="DIR", help="folder of the model's versions"
    )
    parser.add_argument("--name", help="name clients ask for (the manifest's)")
    parser.add_argument(
        "--image",
        default="tensorflow/serving:2.20.0",
        help="image of the server (tensorflow/serving:2.20.0)",
    )
    parser.add_argument("--replicas", type=int, default=2, metavar="N", help="servers (2)")
    parser.add_argument("--port", type=int, default=8500, help="gRPC port (8500)")
    parser.add_argument("--rest-port", type=int, default=8501, help="HTTP port (8501)")
    parser.add_argument(
        "--memory",
        type=int,
        metavar="MIB",
        help="what a server may take, in MiB (1024 and three times the version's size on disk)",
    )
    parser.add_argument(
        "--max-batch-size", type=int, default=128, metavar="ROWS", help="rows of a batch (128)"
    )
    parser.add_argument("--force", action="store_true", help="replace files that are there")


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Write the files."""
    if rest:
        return refuse(unknown_flags(rest), status=2)
    return asking.finished(lambda: _work(arguments))


def _work(arguments: argparse.Namespace) -> int:
    for flag, most, usual in (
        ("replicas", 1000, "2"),
        ("port", _MAX_PORT, "8500"),
        ("rest_port", _MAX_PORT, "8501"),
        ("memory", 2**31 - 1, "a first guess"),
        ("max_batch_size", _MOST_ROWS, "128"),
    ):
        value = getattr(arguments, flag)
        if value is not None and not 0 < value <= most:
            raise asking.RefusalError(
                f"--{flag.replace('_', '-')} must lie in 1..{most}. Received: {value}. "
                f"Leave it out for {usual}.",
                status=2,
            )
    if arguments.port == arguments.rest_port:
        raise asking.RefusalError(
            "gRPC and HTTP need a port each. "
            f"Received: --port and --rest-port {arguments.port}. Name another.",
            status=2,
        )
    from .deploying.work import deploy

    return deploy(arguments)
