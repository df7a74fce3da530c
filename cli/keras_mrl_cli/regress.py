"""Ask a server for the values of texts, images or rows.

Prints what a regressor gives each row, one value or several, at its full dim or that of --dim. A
model of classes is asked with `keras-mrl classify`. Every file is checked before anything is
sent, and bad ones are named all at once; --skip-unreadable goes on without them. A model that
decodes images gets a JPEG or PNG as it is, and as a PNG what it would read otherwise; for one that
takes pixels, images are decoded and resized here (pip install 'keras-mrl[images]').

  keras-mrl regress --target localhost:8500 --model prices houses.npy
  keras-mrl regress --target localhost:8500 --model ages faces/*.jpg --dim 16
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING

from .output import Table, file_width, print_json
from .shared import (
    Option,
    command,
    file_options,
    files_argument,
    json_option,
    server_options,
    take_target,
    target_option,
)
from .words import place_of, take_texts, text_options

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .files import Arrays

    Values = npt.NDArray[np.float32]  # (rows, num_values)


@command(
    __doc__,
    files_argument(),
    target_option(),
    *server_options(),
    Option("--dim", type=int, metavar="M", help="ask the head of this dim (the full one)"),
    *text_options(),
    *file_options(),
    json_option("print one JSON object per row"),
)
def regress(arguments: SimpleNamespace) -> int:
    """Print the values of every row of every file."""
    take_target(arguments)
    take_texts(arguments)
    from .client import ask_files, connect_and_describe

    with connect_and_describe(arguments) as (client, manifest):
        manifest.check_values()
        dim = manifest.width if arguments.dim is None else manifest.check_dim(arguments.dim)

        def ask(rows: Arrays, progress: Callable[[int, int], object]) -> Values:
            return client.regress(rows, dim, progress=progress)

        columns = {"FILE": file_width(arguments.files), "ROW": -6, "DIM": -len(str(dim))}
        table = Table({**columns, "VALUES": 0})

        def show(file: str, row: int, answer: Values) -> None:
            values = answer[0].tolist()
            if arguments.json:
                print_json(**place_of(file, row), dim=dim, values=values)
            else:
                table.row(file, row, dim, " ".join(f"{value:.6g}" for value in values))

        return ask_files(arguments, client, manifest, ask, show)
