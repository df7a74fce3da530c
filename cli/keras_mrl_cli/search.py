"""Search an index by embeddings, or by texts and images.

Prints a line for each query, its nearest rows as id:score, best first; a higher score is nearer.
With --query the rows of an .npy file are the queries, as wide as the index or wider. With
--target the queries go to a model that is served, are embedded at the index's width and then
searched: words with a blank, lines of .txt files or of standard input (-), images as they are, or
.npy and .npz of the model's inputs. Without a folder the model's own gallery is searched, the one
it was exported with: one call from query to neighbours.

Texts are searched with the model's prompt for queries before them, where it has one; --prompt
names another, and --prompt '' none. An index that knows its encoder and its prompt refuses
embeddings of another model, and a gallery with another prompt; the rows of --query cannot be
checked. Every file is checked before anything is sent, and bad ones are named all at once;
--skip-unreadable goes on without them.

  keras-mrl search birds.index --query queries.npy --k 5
  keras-mrl search birds.index --query queries.npy --shortlists 500
  keras-mrl search birds.index --target localhost:8500 --model birds new/*.jpg
  keras-mrl search notes.index --target localhost:8500 "how do bees see?"
  keras-mrl search --target localhost:8500 "how do bees see?" more.txt
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from .index import shortlists
from .output import Progress, Table, file_width, print_json
from .shared import (
    DONE,
    FILE_FLAGS,
    MISUSED,
    SERVER_FLAGS,
    Option,
    RefusalError,
    command,
    dims,
    file_options,
    files_argument,
    flag_of,
    given_flags,
    json_option,
    refusing_index_errors,
    server_options,
    target_option,
    under,
)
from .words import (
    STANDARD_INPUT,
    Text,
    is_there,
    place_of,
    prompt_option,
    take_texts,
    text_options,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from keras_mrl_serving import FunnelSchedule, Manifest, Neighbors, Partial
    from keras_mrl_serving.index import Index
    from keras_mrl_serving.prompts import Prompt

    from .files import Arrays

    Search = Callable[[npt.NDArray[np.float32]], Neighbors]

_AT_ONCE = 1000  # rows of --query
_SHOWN = 5  # neighbours that a table shows without --k

Show = Callable[[str, int, "Neighbors"], None]  # a file, the number of its row, its one answer


@command(
    __doc__,
    click.Argument(
        ["index"],
        required=False,
        metavar="[DIR]",
        help="folder of the index; without it, the gallery of the model of --target",
    ),
    files_argument("with --target: "),
    Option("--query", metavar="Q.npy", help="embeddings to search by, a row each"),
    Option(
        "--k",
        type=int,
        metavar="K",
        help="neighbours of each query, up to the last shortlist (as many as the funnel's)",
    ),
    Option(
        "--among",
        metavar="IDS",
        help="the only ids that may be returned: an .npy of integers, or text with one string a "
        "line (all)",
    ),
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
    *under(
        "Another funnel than the index was built with",
        Option("--dims", type=dims, metavar="M,...", help="dims of its stages (as it was built)"),
        Option(
            "--shortlists",
            type=shortlists,
            metavar="N,...",
            help="rows each stage hands to the next, none for one dim (as it was built)",
        ),
    ),
    *under(
        "A model that embeds the queries",
        *text_options(),
        prompt_option("put this prompt of the model before each text (query, where there is one)"),
        target_option(),
        *server_options(),
        *file_options(),
    ),
)
def search(arguments: SimpleNamespace) -> int:
    """Print the neighbours of every query."""
    _take_index(arguments)
    take_texts(arguments)
    _check(arguments)
    if arguments.index is None:
        return _search_served(arguments)
    from keras_mrl_serving import Projection, open_index
    from keras_mrl_serving.index.ids import check_among

    from .files import load_ids

    with refusing_index_errors():
        schedule = _other_schedule(arguments)
        opened = open_index(arguments.index, schedule, verify=not arguments.no_verify)
        k = opened.facts.check_k(arguments.k)
        index: Index = opened
        if arguments.adaptor is not None:
            index = Projection.load(arguments.adaptor).bind(opened)
        among = None if arguments.among is None else check_among(load_ids(arguments.among))
        files = arguments.files if arguments.query is None else [arguments.query]
        shown = min(k, arguments.k or _SHOWN)
        show = _print_json if arguments.json else _table(files, shown)
        if arguments.query is not None:
            return _search_rows(arguments.query, partial(index.search, k=k, among=among), show)
        return _search_files(arguments, index, k, among, show)


_OF_AN_INDEX = ("query", "among", "adaptor", "no_verify", "dims", "shortlists")


def _other_schedule(arguments: SimpleNamespace) -> FunnelSchedule | None:
    """Return the funnel of the flags; None without them, for that of the index."""
    if arguments.dims is None and arguments.shortlists is None:
        return None
    from keras_mrl_serving import FunnelSchedule
    from keras_mrl_serving.index.facts import IndexFacts
    from keras_mrl_serving.index.storage import read

    built = IndexFacts.from_json(read(arguments.index, verify=False).card).schedule
    sizes = built.shortlists if arguments.shortlists is None else arguments.shortlists
    return FunnelSchedule(arguments.dims or built.dims, sizes, arguments.k or built.k)


def _take_index(arguments: SimpleNamespace) -> None:
    """Take the first word as a query where it is no folder: the gallery is the model's then."""
    word = arguments.index
    if word is None or arguments.target is None:
        return
    words = SimpleNamespace(files=[word], text=())
    take_texts(words)
    is_text = isinstance(words.files[0], Text) or word == STANDARD_INPUT
    if is_text or (is_there(word) and not Path(word).is_dir()):
        arguments.index, arguments.files = None, [word, *arguments.files]


def _check(arguments: SimpleNamespace) -> None:
    flags = given_flags(arguments, ("target", *SERVER_FLAGS, *FILE_FLAGS, "column", "prompt"))
    if arguments.index is None:
        if arguments.target is None:
            raise RefusalError(
                "What is searched is the folder of an index, or the gallery of a model that is "
                f"served. Received: neither{_first(arguments)}. "
                "Name a folder, or a server: --target localhost:8500.",
                MISUSED,
            )
        if given := given_flags(arguments, _OF_AN_INDEX):
            raise RefusalError(
                f"{', '.join(map(flag_of, _OF_AN_INDEX))} are of an index in a folder. "
                f"Received: {', '.join(given)} without a folder. Name it, or leave them out.",
                MISUSED,
            )
    if (arguments.query is None) == (not arguments.files):
        raise RefusalError(
            "Queries are the rows of --query, or texts and files that a served model embeds. "
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
            "Texts and files are embedded by a model that is served. "
            f"Received: {arguments.files[0]} without --target. "
            "Name the server's gRPC port, for example --target localhost:8500, "
            "or give embeddings as --query.",
            MISUSED,
        )


def _first(arguments: SimpleNamespace) -> str:
    return f", for {arguments.files[0]}" if arguments.files else ""


def _search_served(arguments: SimpleNamespace) -> int:
    """Search the gallery that a model was exported with: one call from query to neighbours."""
    from .client import ask_files, connect_and_describe

    with connect_and_describe(arguments) as (client, manifest):
        manifest.check_index()
        k = (manifest.funnel or {}).get("k", 1)
        if arguments.k is not None and not 1 <= arguments.k <= k:
            raise RefusalError(
                f"--k must lie in 1..{k}, as many as the served gallery answers. "
                f"Received: {arguments.k}. Give fewer, or export with a larger k."
            )
        shown = min(k, arguments.k or _SHOWN)
        show = _print_json if arguments.json else _table(arguments.files, shown)
        prompt = _prompt(arguments, manifest)

        def ask(rows: Arrays, progress: Callable[[int, int], object]) -> Neighbors:
            neighbors = client.retrieve(rows, prompt=prompt)
            progress(len(neighbors), len(neighbors))
            return type(neighbors)(
                neighbors.ids[:, : arguments.k], neighbors.scores[:, : arguments.k]
            )

        return ask_files(arguments, client, manifest, ask, show)


def _prompt(arguments: SimpleNamespace, manifest: Manifest) -> Prompt:
    """Return the prompt of the queries: that of the flag, or the model's own for queries."""
    if arguments.prompt is None:
        return ...
    name = arguments.prompt or None
    manifest.check_prompt(name)
    return name


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
    among: npt.NDArray[Any] | None,
    show: Show,
) -> int:
    from keras_mrl_serving import InvalidInputError, KerasMrlError
    from keras_mrl_serving.flows import check_gallery

    from .client import ask_files, connect_and_describe

    with connect_and_describe(arguments) as (client, manifest):
        check_gallery(index, manifest.fingerprint, manifest.gallery_prompts)
        manifest.check_dim(index.width)
        prompt = _prompt(arguments, manifest)

        def ask(rows: Arrays, progress: Callable[[int, int], object]) -> Neighbors:
            try:
                neighbors = client.retrieve(rows, index, k=k, among=among, prompt=prompt)
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
    print_json(**place_of(file, row), ids=ids, scores=scores)


def _table(files: Sequence[str], shown: int) -> Show:
    table = Table({"FILE": file_width(files), "ROW": -6, "NEIGHBORS": 0})

    def show(file: str, row: int, neighbors: Neighbors) -> None:
        pairs = [f"{id_}:{score:.4f}" for id_, score in neighbors[0][:shown]]
        more = ["..."] if neighbors.ids.shape[1] > shown else []
        table.row(file, row, " ".join(pairs + more))

    return show
