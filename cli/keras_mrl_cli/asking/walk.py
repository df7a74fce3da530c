"""Asks about file after file, prints what is answered, and goes on past files that are bad."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from keras_mrl_serving import Client, InvalidInputError, KerasMrlError, Manifest
from keras_mrl_serving.corpus import window_rows

from ..refuse import refuse
from . import RefusalError, one_line
from .files import Arrays, count, load
from .progress import Progress

Ask = Callable[[Arrays, Callable[[int, int], object]], Any]
Show = Callable[[str, int, Any], None]  # a file, which of its rows, and the answer of one row


@dataclass(frozen=True)
class Part:
    """Consecutive rows of a file.

    Args:
        file: The file.
        start: Which of its rows is the first.
        arrays: The rows.
    """

    file: str
    start: int
    arrays: Arrays

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))


def walk(
    arguments: argparse.Namespace, client: Client, manifest: Manifest, ask: Ask, show: Show
) -> int:
    """Ask about all files in windows of rows; return the exit status.

    Args:
        arguments: Of the command.
        client: Whose options say how large a window is.
        manifest: What the files are loaded for.
        ask: Asks about rows, with a function to be told of progress.
        show: Prints one row.

    Raises:
        KerasMrlError: If the server answers no more; what it did answer is shown before.
    """
    status = 0

    def bad(sentence: str) -> None:
        nonlocal status
        progress.clear()
        status = refuse(sentence)

    with Progress(lambda: sum(map(count, arguments.files))) as progress:
        done = 0
        size = window_rows(client.options)
        for window in _windows(arguments, manifest, size, bad):
            _ask_window(window, ask, show, progress, done, bad)
            done += sum(map(len, window))
    return status


def _windows(
    arguments: argparse.Namespace, manifest: Manifest, size: int, bad: Callable[[str], None]
) -> Iterator[list[Part]]:
    waiting: list[Part] = []
    for file in arguments.files:
        try:
            arrays = load(file, manifest, arguments.scale)
        except RefusalError as refusal:
            bad(str(refusal))
            continue
        whole = Part(file, 0, arrays)
        if waiting and _shapes(waiting[0].arrays) != _shapes(arrays):
            yield waiting
            waiting = []
        start = 0
        while start < len(whole):
            stop = min(len(whole), start + size - sum(map(len, waiting)))
            waiting.append(Part(file, start, {n: a[start:stop] for n, a in arrays.items()}))
            start = stop
            if sum(map(len, waiting)) >= size:
                yield waiting
                waiting = []
    if waiting:
        yield waiting


def _ask_window(
    window: list[Part],
    ask: Ask,
    show: Show,
    progress: Progress,
    done: int,
    bad: Callable[[str], None],
) -> None:
    owners = [(part.file, part.start + row) for part in window for row in range(len(part))]
    joined = {n: np.concatenate([p.arrays[n] for p in window]) for n in window[0].arrays}
    try:
        answer = ask(joined, lambda now, _: progress.show(done + now))
    except InvalidInputError as error:
        if len(window) > 1:  # one file spoils the call of them all
            half = len(window) // 2
            _ask_window(window[:half], ask, show, progress, done, bad)
            done += sum(map(len, window[:half]))
            _ask_window(window[half:], ask, show, progress, done, bad)
            return
        _show_partial(error, owners, show, progress)
        bad(f"{window[0].file}: {one_line(error)}")
        return
    except KerasMrlError as error:
        _show_partial(error, owners, show, progress)
        raise
    progress.clear()
    for number, owner in enumerate(owners):
        show(owner[0], owner[1], answer[number : number + 1])


def _show_partial(
    error: KerasMrlError, owners: list[tuple[str, int]], show: Show, progress: Progress
) -> None:
    progress.clear()
    if error.partial is not None:
        for number, row in enumerate(error.partial.rows.tolist()):
            file, start = owners[row]
            show(file, start, error.partial.answer[number : number + 1])


def _shapes(arrays: Arrays) -> dict[str, tuple[int, ...]]:
    return {name: array.shape[1:] for name, array in arrays.items()}
