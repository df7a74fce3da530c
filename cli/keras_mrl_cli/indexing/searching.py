"""The work of `search`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving import (
    Client,
    InvalidInputError,
    KerasMrlError,
    Neighbors,
    Partial,
    open_index,
)
from keras_mrl_serving.flows import check_encoder
from keras_mrl_serving.index import Index
from keras_mrl_serving.index.base import check_among
from keras_mrl_serving.results import Embedded

from ..asking.files import Arrays, load_array
from ..asking.printing import Table, file_width, print_json
from ..asking.progress import Progress
from ..asking.server import asked
from ..asking.walk import walk
from .reading import load_embeddings
from .refusing import refusing

_AT_ONCE = 1000  # rows of --query
_SHOWN = 5  # neighbours that a table shows where nobody says how many

Show = Callable[[str, int, Neighbors], None]  # a file, which of its rows, and its one answer


Search = Callable[[npt.NDArray[np.float32]], Neighbors]


def search(arguments: argparse.Namespace) -> int:
    """Print the neighbours of every query."""
    with refusing():
        index = open_index(arguments.index, verify=not arguments.no_verify)
        k = index.facts.check_k(arguments.k)
        among = None if arguments.among is None else check_among(load_array(arguments.among))
        files = arguments.files if arguments.query is None else [arguments.query]
        shown = min(k, arguments.k or _SHOWN)
        show = _json_row if arguments.json else _table(files, shown)
        if arguments.query is not None:
            return _by_rows(arguments.query, partial(index.search, k=k, among=among), show)
        ask = partial(_ask, index=index, k=k, among=among)
        return _by_files(arguments, index, ask, show)


def _by_rows(file: str, search: Search, show: Show) -> int:
    queries = load_embeddings("--query", file)
    with Progress(lambda: len(queries)) as progress:
        for start in range(0, max(len(queries), 1), _AT_ONCE):
            found = search(queries[start : start + _AT_ONCE])
            progress.clear()
            for row in range(len(found)):
                show(file, start + row, found[row : row + 1])
            progress.show(start + len(found))
    return 0


def _by_files(
    arguments: argparse.Namespace,
    index: Index,
    ask: Callable[..., Neighbors],
    show: Show,
) -> int:
    with asked(arguments) as (client, manifest):
        check_encoder(index.encoder_fingerprint, manifest.fingerprint)
        manifest.check_dim(index.width)
        return walk(arguments, client, manifest, partial(ask, client), show)


def _ask(
    client: Client,
    arrays: Arrays,
    progress: Callable[[int, int], object],
    *,
    index: Index,
    k: int,
    among: npt.NDArray[np.int64] | None,
) -> Neighbors:
    try:
        found = client.retrieve(arrays, index, k=k, among=among)
    except KerasMrlError as error:
        error.partial = _searched(partial(index.search, k=k, among=among), error.partial)
        raise
    except ValueError as error:  # of the index: what the model answered cannot be searched by
        raise InvalidInputError(str(error)) from error
    progress(len(found), len(found))
    return found


def _searched(search: Search, partly: Partial | None) -> Partial | None:
    """Return the neighbours of what was embedded before an error."""
    if partly is None:
        return None
    answer: Any = partly.answer
    embeddings = answer.embeddings if isinstance(answer, Embedded) else answer
    try:
        return Partial(partly.rows, search(embeddings))
    except ValueError:
        return None


def _json_row(file: str, row: int, found: Neighbors) -> None:
    print_json(file=file, row=row, ids=found.ids[0].tolist(), scores=found.scores[0].tolist())


def _table(files: Sequence[str], shown: int) -> Show:
    table = Table({"FILE": file_width(files), "ROW": -6, "NEIGHBORS": 0})

    def show(file: str, row: int, found: Neighbors) -> None:
        pairs = [f"{id_}:{score:.4f}" for id_, score in found[0][:shown]]
        more = ["..."] if found.ids.shape[1] > shown else []
        table.row(file, row, " ".join(pairs + more))

    return show
