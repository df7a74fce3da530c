"""Ask a server for the classes of images, or of rows in .npy and .npz files.

Prints the best class of each row, its probability and the dim that decided it. Without --dim the
model's own policy decides, wider dims only for rows still unsure; a model without a policy is
asked at its full dim. A file that is bad is reported, the others are answered all the same, and
the exit status is 1. Images are sent as they are to a model that decodes them itself; for one that
takes pixels they are decoded and resized here (pip install 'keras-mrl[images]').

  keras-mrl classify localhost:8500 birds/*.jpg --model birds --top 3
  keras-mrl classify localhost:8500 test.npy --model digits --dim 16 --json > answers.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import asking
from .refuse import refuse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    asking.add_arguments(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--dim", type=int, metavar="M", help="ask the head of this dim alone")
    how.add_argument(
        "--policy", metavar="FILE", help="JSON of a CascadePolicy to ask by (the model's own)"
    )
    parser.add_argument(
        "--top", type=int, default=1, metavar="K", help="how many classes of each row (1)"
    )


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Classify every row of every file."""
    if arguments.top < 1:
        return refuse(f"--top must be at least 1. Received: {arguments.top}. Try 3.", status=2)
    return asking.run(arguments, rest, _work)


def _work(arguments: argparse.Namespace) -> int:
    from .asking.classes import classify

    return classify(arguments)
