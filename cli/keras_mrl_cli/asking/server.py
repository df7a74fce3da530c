"""The server that is asked, as the arguments name it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import prod

import numpy as np

from keras_mrl_serving import Client, KerasMrlError, Manifest, Options, Tls

from . import RefusalError, metadata, one_line
from .files import is_image

_CALL_BYTES = 2**24  # what one call holds, where nobody says how many rows
_MOST_ROWS = 1000


@contextmanager
def asked(arguments: argparse.Namespace) -> Iterator[tuple[Client, Manifest]]:
    """Give a client of the target and what its model says of itself.

    Raises:
        RefusalError: If an argument does not fit, or for every `KerasMrlError` meanwhile.
    """
    manifest = described(arguments)
    options = _options(arguments)
    rows = arguments.max_batch_size
    if rows is None:
        rows = _rows_of_a_call(manifest, arguments.files)
    try:
        with _client(arguments, replace(options, max_batch_size=rows)) as client:
            yield client, manifest
    except KerasMrlError as error:
        raise RefusalError(one_line(error)) from error


def described(arguments: argparse.Namespace) -> Manifest:
    """Return what the model of the target says of itself.

    Raises:
        RefusalError: If an argument does not fit, or for every `KerasMrlError`.
    """
    with connected(arguments) as client:
        return client.describe()


@contextmanager
def connected(arguments: argparse.Namespace) -> Iterator[Client]:
    """Give a client of the target.

    Raises:
        RefusalError: If an argument does not fit, or for every `KerasMrlError` meanwhile.
    """
    try:
        with _client(arguments, _options(arguments)) as client:
            yield client
    except KerasMrlError as error:
        raise RefusalError(one_line(error)) from error


def _options(arguments: argparse.Namespace) -> Options:
    options = Options(metadata=metadata(arguments.metadata))
    if arguments.timeout is not None:
        options = replace(options, timeout_s=arguments.timeout)
    if arguments.tls_ca is not None:
        try:
            tls = Tls.from_files(arguments.tls_ca)
        except OSError as error:
            raise RefusalError(
                "--tls-ca must be a file that can be read. "
                f"Received: {arguments.tls_ca} ({error.strerror}). Correct the path."
            ) from error
        options = replace(options, tls=tls)
    return options


def _client(arguments: argparse.Namespace, options: Options) -> Client:
    try:
        return Client(arguments.target.split(","), arguments.model, options=options)
    except ValueError as error:
        raise RefusalError(str(error), status=2) from error


def _rows_of_a_call(manifest: Manifest, files: list[str]) -> int:
    """So few that neither a call nor what waits to be sent grows with the size of an image."""
    largest = max(map(_size, filter(is_image, files)), default=0)
    row_bytes = 0
    for spec in manifest.inputs.values():
        if spec["dtype"] == "string":
            row_bytes += largest
        else:
            row_bytes += np.dtype(spec["dtype"]).itemsize * prod(n or 1 for n in spec["shape"])
    return max(1, min(_MOST_ROWS, _CALL_BYTES // max(row_bytes, 1)))


def _size(file: str) -> int:
    try:
        return os.stat(file).st_size
    except OSError:
        return 0


def check_value(check: Callable[[], int]) -> int:
    """Return what `check` returns; its `ValueError` is a refusal."""
    try:
        return check()
    except ValueError as error:
        raise RefusalError(str(error)) from error
