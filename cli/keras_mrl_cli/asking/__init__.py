"""What the commands that ask a server share: their arguments, and how they end."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from math import isfinite

from ..refuse import refuse, unknown_flags

DEFAULT_MODEL = "default"

_MOST_ROWS = 2**31 - 1
_METADATA_NAME = re.compile(r"[0-9a-z_.-]+")


class RefusalError(Exception):
    """What ends a command with one sentence.

    Args:
        sentence: Rule, received, remedy.
        status: Exit status.
    """

    def __init__(self, sentence: str, status: int = 1) -> None:
        super().__init__(sentence)
        self.status = status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of a command that asks a server about files."""
    parser.add_argument(
        "target", metavar="TARGET", help="host:port of the server's gRPC port; several with commas"
    )
    parser.add_argument(
        "files",
        metavar="FILES",
        nargs="+",
        help="images (.jpg .jpeg .png), .npy of rows, .npz of rows by input name",
    )
    add_server_arguments(parser)
    add_file_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object per row")


def add_server_arguments(parser: argparse._ActionsContainer) -> None:
    """Declare how a server is asked."""
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, help=f"name the server gives it ({DEFAULT_MODEL})"
    )
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="what an answer may take, retries too (10)"
    )
    parser.add_argument(
        "--tls-ca", metavar="FILE", help="PEM file of who signs the server's certificate (no TLS)"
    )
    parser.add_argument(
        "--metadata",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="sent with every call, such as authorization='Bearer ...'; may be given again",
    )


def server_flags(arguments: argparse.Namespace) -> list[str]:
    """Return those flags of `add_server_arguments` that were given."""
    given = {
        "--model": arguments.model != DEFAULT_MODEL,
        "--timeout": arguments.timeout is not None,
        "--tls-ca": arguments.tls_ca is not None,
        "--metadata": bool(arguments.metadata),
    }
    return [flag for flag, is_given in given.items() if is_given]


def add_file_arguments(parser: argparse._ActionsContainer) -> None:
    """Declare how the rows of files become calls."""
    parser.add_argument(
        "--max-batch-size",
        type=int,
        metavar="ROWS",
        help="rows of one call (1000, fewer where rows are large)",
    )
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        metavar="FACTOR",
        help="multiplies the pixels of decoded images, 0..255 as in Keras's own loaders (1)",
    )


def file_flags(arguments: argparse.Namespace) -> list[str]:
    """Return those flags of `add_file_arguments` that were given."""
    given = {
        "--max-batch-size": arguments.max_batch_size is not None,
        "--scale": arguments.scale != 1,
    }
    return [flag for flag, is_given in given.items() if is_given]


def run(
    arguments: argparse.Namespace,
    rest: Sequence[str],
    work: Callable[[argparse.Namespace], int],
) -> int:
    """Check the shared arguments, do the work, and say in one sentence what stopped it."""
    if any(word.startswith("-") for word in rest):
        return refuse(unknown_flags(rest), status=2)
    arguments.files = [*arguments.files, *rest]  # argparse leaves what follows a flag

    def checked() -> int:
        check_server_arguments(arguments)
        _check_file_arguments(arguments)
        return work(arguments)

    return finished(checked)


def finished(work: Callable[[], int]) -> int:
    """Do the work, say in one sentence what stopped it, and return the exit status."""
    try:
        status = work()
        sys.stdout.flush()
        return status
    except RefusalError as refusal:
        return refuse(str(refusal), refusal.status)
    except BrokenPipeError:  # whoever read the answers has enough; Python would say so at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def dims(text: str) -> tuple[int, ...]:
    """Return the integers of an argument, for argparse."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be integers with commas. Received: {text!r}. Give for example 8,16."
        ) from None


def one_line(error: Exception) -> str:
    """Return what an error says, in one line, though it quotes a server that used many."""
    return " ".join(str(error).split())


def metadata(pairs: Sequence[str]) -> dict[str, str]:
    """Return what is sent with every call; raise `RefusalError` for what gRPC cannot send."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        name = name.lower()
        sendable = value.isascii() and value.isprintable() and not name.endswith("-bin")
        if not equals or not sendable or not _METADATA_NAME.fullmatch(name):
            raise RefusalError(
                "--metadata must be KEY=VALUE in printable ASCII, its key of letters, digits and "
                f"_.- and not ending in -bin. Received: {pair!r}. "
                "Give for example --metadata authorization='Bearer 5e1f'.",
                status=2,
            )
        found[name] = value
    return found


def check_server_arguments(arguments: argparse.Namespace) -> None:
    """Raise `RefusalError` for what `add_server_arguments` takes and no server can be asked by."""
    seconds = arguments.timeout
    if seconds is not None and not (isfinite(seconds) and seconds > 0):
        raise RefusalError(
            f"--timeout must be a positive number of seconds. Received: {seconds}. "
            "Give for example 10.",
            status=2,
        )


def _check_file_arguments(arguments: argparse.Namespace) -> None:
    rows, scale = arguments.max_batch_size, arguments.scale
    if rows is not None and not 0 < rows <= _MOST_ROWS:
        raise RefusalError(
            f"--max-batch-size must lie in 1..{_MOST_ROWS}. Received: {rows}. "
            "Leave it out for 1000.",
            status=2,
        )
    if not isfinite(scale) or scale == 0:
        raise RefusalError(
            f"--scale must be a finite number other than 0. Received: {scale}. "
            "Give 0.00392156862745098 for pixels in 0..1.",
            status=2,
        )
