"""The work of `embed`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from keras_mrl_serving import Client, KerasMrlError, Manifest
from keras_mrl_serving.inputs import Inputs

from . import RefusalError
from .files import load
from .printing import Table, file_width, print_json
from .progress import Progress
from .server import asked, check_value
from .walk import walk

_COORDINATES = 6  # that a table shows


def embed(arguments: argparse.Namespace) -> int:
    """Print or write the embeddings of every row of every file."""
    with asked(arguments) as (client, manifest):
        dim = manifest.width
        if arguments.dim is not None:
            dim = manifest.check_dim(arguments.dim)
        elif arguments.quality is not None:
            measure, share = arguments.quality
            dim = check_value(lambda: client.cheapest_dim(share, measure))
        if arguments.out is not None:
            return _write(arguments, client, manifest, dim)
        show = _json_row if arguments.json else _Rows(arguments, dim).show
        return walk(
            arguments,
            client,
            manifest,
            lambda arrays, progress: client.embed(arrays, dim, progress=progress),
            show,
        )


def _write(arguments: argparse.Namespace, client: Client, manifest: Manifest, dim: int) -> int:
    total = _check_all(arguments, manifest)
    try:
        with Progress(lambda: total) as progress:
            data = _all(arguments, manifest)
            rows = client.embed_dataset(
                data, dim, arguments.out, progress=lambda done, _: progress.show(done)
            )
    except KerasMrlError:
        raise
    except OSError as error:
        if error.errno is None:  # a sentence of ours
            raise RefusalError(str(error)) from error
        raise RefusalError(
            "--out must be a file that can be written. "
            f"Received: {arguments.out} ({error.strerror}). Name another."
        ) from error
    except ValueError as error:
        raise RefusalError(str(error)) from error
    if arguments.json:
        print_json(out=arguments.out, rows=len(rows), dim=dim)
    else:
        print(f"{len(rows)} rows of dim {dim} are in {arguments.out}.")
    return 0


def _check_all(arguments: argparse.Namespace, manifest: Manifest) -> int:
    """Return how many rows there are; raise `RefusalError` for the first file that is bad."""
    total = 0
    sizes: dict[str, tuple[int, ...]] = {}
    for file in arguments.files:
        for name, array in load(file, manifest, arguments.scale).items():
            rows = len(array)
            if sizes.setdefault(name, array.shape[1:]) != array.shape[1:]:
                raise RefusalError(
                    "The rows of one --out must be of one size. "
                    f"Received: {file} with {array.shape[1:]} after {sizes[name]}. "
                    "Resize them, or write several."
                )
        total += rows
    return total


def _all(arguments: argparse.Namespace, manifest: Manifest) -> Iterator[Inputs]:
    """Give the rows of one file after the other; the client cuts what is large."""
    for file in arguments.files:
        yield load(file, manifest, arguments.scale)


def _json_row(file: str, row: int, answer: npt.NDArray[np.float32]) -> None:
    coordinates: list[Any] = answer[0].tolist()
    print_json(file=file, row=row, dim=len(coordinates), embedding=coordinates)


class _Rows:
    def __init__(self, arguments: argparse.Namespace, dim: int) -> None:
        self._more = " ..." if dim > _COORDINATES else ""
        width = file_width(arguments.files)
        self._table = Table({"FILE": width, "ROW": -6, "DIM": -len(str(dim)), "EMBEDDING": 0})

    def show(self, file: str, row: int, answer: npt.NDArray[np.float32]) -> None:
        first = " ".join(f"{value:8.4f}" for value in answer[0, :_COORDINATES])
        self._table.row(file, row, answer.shape[1], first + self._more)
