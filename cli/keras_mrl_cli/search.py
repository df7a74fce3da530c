"""Search an index by embeddings, or by images that a server embeds.

Prints a line for each query, its nearest rows as id:score, best first; a higher score is nearer.
With --query the rows of an .npy file are the queries, as wide as the index or wider. With
--target the files go to a model that is served, are embedded at the index's width and then
searched: images as they are, or .npy and .npz of the model's inputs. An index that knows its
encoder refuses embeddings of another model; the rows of --query cannot be checked. Every file is
checked before anything is sent, and bad ones are named all at once; --skip-unreadable goes on
without them.

  keras-mrl search birds.index --query queries.npy --k 5
  keras-mrl search birds.index --target localhost:8500 --model birds new/*.jpg
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from .output import Progress, Table, file_width, print_json
from .shared import (
    DONE,
    FILE_FLAGS,
    MISUSED,
    SERVER_FLAGS,
    Option,
    RefusalError,
    command,
    file_options,
    files_argument,
    given_flags,
    json_option,
    refusing_index_errors,
    server_options,
    target_option,
    under,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from keras_mrl_serving import Neighbors, Partial
    from keras_mrl_serving.index import Index

    from .files import Arrays

    Search = Callable[[npt.NDArray[np.float32]], Neighbors]

_AT_ONCE = 1000  # rows of --query
_SHOWN = 5  # neighbours that a table shows without --k

Show = Callable[[str, int, "Neighbors"], None]  # a file, the number of its row, its one answer


@command(
    __doc__,
    click.Argument(["index"], metavar="DIR", help="folder of the index"),
    files_argument("with --target: "),
    Option("--query", metavar="Q.npy", help="embeddings to search by, a row each"),
    Option("--k", type=int, metavar="K", help="neighbours of each query (as many as the funnel's)"),
    Option("--among", metavar="IDS.npy", help="the only ids that may be returned, integers (all)"),
    Option(
        "--no-verify",
        is_flag=True,
        help="do not compare the index with its digests, which reads all of it once",
    ),
    Option(
        "--adaptor",
        metavar="DIR",
        help="folder of `keras-mrl adapt` that the index was built with: projects the queries",
    ),
    json_option("print one JSON object per query"),
    *under("A model that embeds the queries", target_option(), *server_options(), *file_options()),
)
def search(arguments: SimpleNamespace) -> int:
    """Print the neighbours of every query."""
    _check(arguments)
    from keras_mrl_serving import Projection, open_index
    from keras_mrl_serving.index.base import check_among

    from .files import load_array

    with refusing_index_errors():
        opened = open_index(arguments.index, verify=not arguments.no_verify)
        k = opened.facts.check_k(arguments.k)
        index: Index = opened
        if arguments.adaptor is not None:
            index = Projection.load(arguments.adaptor).bind(opened)
        among = None if arguments.among is None else check_among(load_array(arguments.among))
        files = arguments.files if arguments.query is None else [arguments.query]
        shown = min(k, arguments.k or _SHOWN)
        show = _print_json if arguments.json else _table(files, shown)
        if arguments.query is not None:
            return _search_rows(arguments.query, partial(index.search, k=k, among=among), show)
        return _search_files(arguments, index, k, among, show)


def _check(arguments: SimpleNamespace) -> None:
    flags = given_flags(arguments, ("target", *SERVER_FLAGS, *FILE_FLAGS))
    if (arguments.query is None) == (not arguments.files):
        raise RefusalError(
            "Queries are the rows of --query, or files that a served model embeds. "
            f"Received: {'neither' if arguments.query is None else 'both'}. "
            "Give for example --query Q.npy, or --target localhost:8500 new.jpg.",
            MISUSED,
        )
    if arguments.query is not None and flags:
        raise RefusalError(
            "The rows of --query are searched as they are, and no server is asked. "
            f"Received: {', '.join(flags)} with --query. Leave it out, or give files instead.",
            MISUSED,
        )
    if arguments.files and arguments.target is None:
        raise RefusalError(
            "Files are embedded by a model that is served. "
            f"Received: {arguments.files[0]} without --target. "
            "Name the server's gRPC port, for example --target localhost:8500, "
            "or give embeddings as --query.",
            MISUSED,
        )


def _search_rows(file: str, search: Search, show: Show) -> int:
    from .files import load_embeddings

    queries = load_embeddings("--query", file)
    with Progress(lambda: len(queries)) as progress:
        for start in range(0, max(len(queries), 1), _AT_ONCE):
            neighbors = search(queries[start : start + _AT_ONCE])
            progress.clear()
            for row in range(len(neighbors)):
                show(file, start + row, neighbors[row : row + 1])
            progress.show(start + len(neighbors))
    return DONE


def _search_files(
    arguments: SimpleNamespace,
    index: Index,
    k: int,
    among: npt.NDArray[np.int64] | None,
    show: Show,
) -> int:
    from keras_mrl_serving import InvalidInputError, KerasMrlError
    from keras_mrl_serving.flows import check_encoder

    from .client import ask_files, connect_and_describe

    with connect_and_describe(arguments) as (client, manifest):
        check_encoder(index.encoder_fingerprint, manifest.fingerprint)
        manifest.check_dim(index.width)

        def ask(rows: Arrays, progress: Callable[[int, int], object]) -> Neighbors:
            try:
                neighbors = client.retrieve(rows, index, k=k, among=among)
            except KerasMrlError as error:
                search = partial(index.search, k=k, among=among)
                error.partial = _neighbors_of(error.partial, search)
                raise
            except ValueError as error:  # of the index: it cannot search by these embeddings
                raise InvalidInputError(str(error)) from error
            progress(len(neighbors), len(neighbors))
            return neighbors

        return ask_files(arguments, client, manifest, ask, show)


def _neighbors_of(embedded: Partial | None, search: Search) -> Partial | None:
    """Return the neighbours of the rows that were embedded before an error."""
    from keras_mrl_serving import Partial
    from keras_mrl_serving.results import Embedded

    if embedded is None:
        return None
    answer: Any = embedded.answer
    embeddings = answer.embeddings if isinstance(answer, Embedded) else answer
    try:
        return Partial(embedded.rows, search(embeddings))
    except ValueError:
        return None


def _print_json(file: str, row: int, neighbors: Neighbors) -> None:
    ids, scores = neighbors.ids[0].tolist(), neighbors.scores[0].tolist()
    print_json(file=file, row=row, ids=ids, scores=scores)


def _table(files: Sequence[str], shown: int) -> Show:
    table = Table({"FILE": file_width(files), "ROW": -6, "NEIGHBORS": 0})

    def show(file: str, row: int, neighbors: Neighbors) -> None:
        pairs = [f"{id_}:{score:.4f}" for id_, score in neighbors[0][:shown]]
        more = ["..."] if neighbors.ids.shape[1] > shown else []
        table.row(file, row, " ".join(pairs + more))

    return show
