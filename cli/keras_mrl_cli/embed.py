"""Ask a server for the embeddings of images, or of rows in .npy and .npz files.

Prints the first coordinates of each row, or all of them with --json. With --out they are written
to one .npy file instead, a row for every row of the files in the order given. If that is
interrupted, the same command goes on after the last row that was safe. Every file is checked
before anything is sent, and a bad one is refused; without --out it is reported, the others are
answered all the same, and the exit status is 1. .npy files are memory-mapped and may be
larger than the memory. Images are sent as they are to a model that decodes them itself; for one
that takes pixels they are decoded and resized here (pip install 'keras-mrl[images]').

  keras-mrl embed localhost:8500 part1.npy part2.npy --model digits --quality 0.98 --out E.npy
  keras-mrl embed localhost:8500 birds/*.jpg --model birds --dim 64 --json > embeddings.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import asking


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    asking.add_arguments(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--dim", type=int, metavar="M", help="dim of the embeddings (the full one)")
    which.add_argument(
        "--quality",
        type=_quality,
        metavar="[MEASURE=]SHARE",
        help="take the smallest dim that keeps this share of the full one's quality, by the "
        "manifest's measure of this name, or its only one",
    )
    parser.add_argument(
        "--out", metavar="E.npy", help="write there, and go on there after an interruption"
    )


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Embed every row of every file."""
    return asking.run(arguments, rest, _work)


def _quality(text: str) -> tuple[str | None, float]:
    measure, _, share = text.rpartition("=")
    try:
        number = float(share)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(
            f"it must end in a share in (0, 1]. Received: {text!r}. Give for example 0.98."
        )
    return measure or None, number


def _work(arguments: argparse.Namespace) -> int:
    from .asking.embeddings import embed

    return embed(arguments)
