"""Ask a server for the embeddings of texts, images or rows.

Prints the first coordinates of each row, or all of them with --json. With --out they are
written to one .npy file instead, a row for every row of the files in the order given; --json
says at which row each file begins. If that is interrupted, the same command goes on after the
last row that was safe. Every file is checked before anything is sent, and bad ones are named
all at once; --skip-unreadable goes on without them, and they have no rows in --out. .npy files
are memory-mapped and may be larger than the memory. A model that decodes images gets a JPEG or
PNG as it is, and as a PNG what it would read otherwise; for one that takes pixels, images are
decoded and resized here (pip install 'keras-mrl[images]').

A model of texts takes a line of a .txt file as a text, a column of a .csv, .tsv or .jsonl, the
lines of standard input (-), and words with a blank. Models of sentences often want a prompt
before each text, passage or document in a gallery and query in what is searched for:
`keras-mrl inspect` names those of a model, and --prompt puts one there.

  keras-mrl embed --target localhost:8500 a.npy b.npy --out E.npy
  keras-mrl embed --target localhost:8500 birds/*.jpg --quality 0.98 --json
  keras-mrl embed --target localhost:8500 --other-tower items.npz --out E.npy
  keras-mrl embed --target localhost:8500 a.txt --prompt passage --out E.npy
  keras-mrl embed --target localhost:8500 --prompt query "how do bees see?"
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .output import Progress, Table, file_width, print_json, print_line
from .shared import (
    DONE,
    Option,
    RefusalError,
    check_one_of,
    command,
    ended_by_signals,
    file_options,
    files_argument,
    json_option,
    one_line,
    refuse,
    refusing,
    server_options,
    share,
    take_target,
    target_option,
)
from .words import place_of, prompt_option, take_texts, text_options

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from keras_mrl_serving import Client, Manifest

    from .files import Arrays

    Embeddings = npt.NDArray[np.float32]  # (rows, dim)

_COORDINATES = 6  # shown by a table


def quality(text: str) -> tuple[str | None, float]:
    """Return the measure and the share of a flag, `[MEASURE=]SHARE`."""
    measure, _, number = text.rpartition("=")
    return measure or None, share(number)


@command(
    __doc__,
    files_argument(),
    target_option(),
    *server_options(),
    Option("--dim", type=int, metavar="M", help="dim of the embeddings (the full one)"),
    Option(
        "--quality",
        type=quality,
        metavar="[MEASURE=]SHARE",
        help="take the smallest dim that keeps this share of the full one's quality, by the "
        "manifest's measure of this name (its only one, or top1)",
    ),
    Option(
        "--other-tower",
        is_flag=True,
        help="the rows are of the side of galleries, in a model of two towers",
    ),
    Option(
        "--exit",
        metavar="NAME",
        help="ask this exit of the backbone, where it was exported (the last)",
    ),
    *text_options(),
    prompt_option("put this prompt of the model before each text (none)"),
    Option("--out", metavar="E.npy", help="write there, and go on there after an interruption"),
    *file_options(),
    json_option("print one JSON object per row"),
)
def embed(arguments: SimpleNamespace) -> int:
    """Print or write the embeddings of every row of every file."""
    take_target(arguments)
    take_texts(arguments)
    check_one_of(arguments, "dim", "quality")
    from keras_mrl_serving.quality import cheapest_dim

    from .client import ask_files, connect_and_describe

    with connect_and_describe(arguments) as (client, manifest):
        dim = manifest.width
        if arguments.dim is not None:
            dim = manifest.check_dim(arguments.dim)
        elif arguments.quality is not None:
            measure, least = arguments.quality
            with refusing(ValueError):
                dim = cheapest_dim(manifest, least, measure)
        if arguments.exit is not None:
            manifest.check_exit(arguments.exit)
        other_tower, prompt = arguments.other_tower, arguments.prompt
        manifest.tower(other_tower).check_prompt(prompt)
        if arguments.out is not None:
            return _write(arguments, client, manifest, dim)

        def ask(rows: Arrays, progress: Callable[[int, int], object]) -> Embeddings:
            return client.embed(
                rows,
                dim,
                other_tower=other_tower,
                exit=arguments.exit,
                prompt=prompt,
                progress=progress,
            )

        show = _print_json if arguments.json else _table(arguments, dim)
        return ask_files(arguments, client, manifest.tower(other_tower), ask, show)


def _write(arguments: SimpleNamespace, client: Client, manifest: Manifest, dim: int) -> int:
    from keras_mrl_serving import KerasMrlError

    from .files import load_rows

    tower = manifest.tower(arguments.other_tower)
    first_rows, total = _checked_rows(arguments, tower)
    batches = (
        load_rows(file, tower, arguments.scale, arguments.column) for file in arguments.files
    )
    done = 0

    def report(rows: int, _: int | None) -> None:
        nonlocal done
        done = rows
        progress.show(rows)

    try:
        with (
            Progress(lambda: total) as progress,
            refusing(KerasMrlError, ValueError),
            ended_by_signals(),
        ):
            embeddings = client.embed_dataset(
                batches,
                dim,
                arguments.out,
                other_tower=arguments.other_tower,
                exit=arguments.exit,
                prompt=arguments.prompt,
                progress=report,
                manifest=manifest,
            )
    except (KeyboardInterrupt, SystemExit):
        safe = f"{done:,} of {total:,} rows are embedded; " if done else ""
        refuse(f"{safe}the same command goes on after the last row that was safe.")
        raise
    except OSError as error:
        if error.errno is None:  # a sentence of the client
            raise RefusalError(one_line(error)) from error
        raise RefusalError(  # the error may name the file that E.npy is written to first
            "--out must be a file that can be written. "
            f"Received: {arguments.out} ({error.strerror}). Name another."
        ) from error
    if arguments.json:
        files = [{"file": file, "row": row} for file, row in first_rows]
        print_json(out=arguments.out, rows=len(embeddings), dim=dim, files=files)
    else:
        print_line(f"{len(embeddings)} rows of dim {dim} are in {arguments.out}.")
    return DONE


def _checked_rows(
    arguments: SimpleNamespace, manifest: Manifest
) -> tuple[list[tuple[str, int]], int]:
    """Return the files that can be used, each with its first row, and leave only those.

    Returns:
        The files with the numbers of their first rows, and the number of all rows.

    Raises:
        RefusalError: If a file is bad, or its rows are of another size.
    """
    from .client import checked_files

    total = 0
    first_rows = []
    shapes: dict[str, tuple[int, ...]] = {}
    for file, arrays in checked_files(arguments, manifest):
        first_rows.append((file, total))
        for name, array in arrays.items():
            if shapes.setdefault(name, array.shape[1:]) != array.shape[1:]:
                raise RefusalError(
                    "The rows of one --out must be of one size. "
                    f"Received: {file} with {array.shape[1:]} after {shapes[name]}. "
                    "Resize them, or write several."
                )
        total += len(next(iter(arrays.values())))
    arguments.files = [file for file, _ in first_rows]
    return first_rows, total


def _print_json(file: str, row: int, answer: Embeddings) -> None:
    coordinates: list[Any] = answer[0].tolist()
    print_json(**place_of(file, row), dim=len(coordinates), embedding=coordinates)


def _table(arguments: SimpleNamespace, dim: int) -> Callable[[str, int, Embeddings], None]:
    columns = {"FILE": file_width(arguments.files), "ROW": -6, "DIM": -len(str(dim))}
    table = Table({**columns, "EMBEDDING": 0})
    more = " ..." if dim > _COORDINATES else ""

    def show(file: str, row: int, answer: Embeddings) -> None:
        first = " ".join(f"{value:8.4f}" for value in answer[0, :_COORDINATES])
        table.row(file, row, answer.shape[1], first + more)

    return show
