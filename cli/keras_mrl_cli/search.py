"""Search an index for the nearest rows of embeddings, or of images that a server embeds.

Prints a line for each query, its nearest rows as id:score, best first; a higher score is nearer.
With --query the rows of an .npy file are the queries, as wide as the index or wider. With
--target the files go to a model that is served, are embedded at the index's width and then
searched: images as they are, or .npy and .npz of the model's inputs. An index that knows its
encoder refuses embeddings of another model; of the rows of --query nobody knows. A file that is
bad is reported, the others are answered all the same, and the exit status is 1.

  keras-mrl search birds.index --query queries.npy --k 5
  keras-mrl search birds.index --target localhost:8500 --model birds new/*.jpg --json
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from . import asking


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("index", metavar="DIR", help="folder of the index")
    parser.add_argument(
        "files",
        metavar="FILES",
        nargs="*",
        help="with --target: images (.jpg .jpeg .png), .npy of rows, .npz of rows by input name",
    )
    parser.add_argument("--query", metavar="Q.npy", help="embeddings to search by, a row each")
    parser.add_argument("--k", type=int, help="neighbours of each query (as many as the funnel's)")
    parser.add_argument(
        "--among", metavar="IDS.npy", help="the only ids that may be returned, integers (all)"
    )
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="do not compare the index with its digests, which reads all of it once",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per query")
    served = parser.add_argument_group("a model that embeds the queries")
    served.add_argument(
        "--target", metavar="HOST:PORT", help="the server's gRPC port; several with commas"
    )
    asking.add_server_arguments(served)
    asking.add_file_arguments(served)


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Search for every query."""
    return asking.run(arguments, rest, _work)


def _work(arguments: argparse.Namespace) -> int:
    _check(arguments)
    from .indexing.searching import search

    return search(arguments)


def _check(arguments: argparse.Namespace) -> None:
    flags = asking.server_flags(arguments) + asking.file_flags(arguments)
    if arguments.target is not None:
        flags.insert(0, "--target")
    if (arguments.query is None) == (not arguments.files):
        raise asking.RefusalError(
            "Queries are the rows of --query, or files that a served model embeds. "
            f"Received: {'neither' if arguments.query is None else 'both'}. "
            "Give for example --query Q.npy, or --target localhost:8500 new.jpg.",
            status=2,
        )
    if arguments.query is not None and flags:
        raise asking.RefusalError(
            "The rows of --query are searched as they are, and no server is asked. "
            f"Received: {', '.join(flags)} with --query. Leave it out, or give files instead.",
            status=2,
        )
    if arguments.files and arguments.target is None:
        raise asking.RefusalError(
            "Files are embedded by a model that is served. "
            f"Received: {arguments.files[0]} without --target. "
            "Name the server's gRPC port, for example --target localhost:8500, "
            "or give embeddings as --query.",
            status=2,
        )
