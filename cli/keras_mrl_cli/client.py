"""The one connection of a command that asks a server, and the files it asks about.

Rows of several files go out together, in windows of as many rows as the client has under way at
once. Files are checked before anything is sent. If the server refuses a window as invalid input all
the same, its halves are asked, down to the file that is bad; that file is reported, and the walk
goes on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np

from keras_mrl_serving import Client, InvalidInputError, KerasMrlError, Manifest, Options, Tls
from keras_mrl_serving.corpus import window_rows
from keras_mrl_serving.images import is_image
from keras_mrl_serving.untrusted import UntrustedFileError, read_bytes

from .files import Arrays, check_rows, count_rows, load_rows
from .output import Progress
from .shared import DONE, MISUSED, RefusalError, one_line, refuse, refusing

Ask = Callable[[Arrays, Callable[[int, int], object]], Any]
Show = Callable[[str, int, Any], None]  # a file, the number of its row, and that row's answer

_METADATA_NAME = re.compile(r"[0-9a-z_.-]+")
_METADATA_VARIABLE = "KERAS_MRL_METADATA"
_VALUE_BYTES = 2**16  # of a file that holds a value
_CALL_BYTES = 2**24  # of one call, where --max-batch-size does not say how many rows
_MOST_ROWS = 1000
_MOST_TEXTS = 64  # each may have as many tokens as the model reads, which takes a while


@contextmanager
def connect(arguments: SimpleNamespace) -> Iterator[Client]:
    """Give a client of `--target`, whose errors are refusals.

    Raises:
        RefusalError: If a flag does not fit, for every `KerasMrlError` meanwhile, or if a library
            is not installed.
    """
    options = _options(arguments)
    try:
        with refusing(KerasMrlError, ImportError):  # images need Pillow
            with refusing(ValueError, status=MISUSED):
                client = Client(arguments.target.split(","), arguments.model, options=options)
            with client:
                if arguments.wait:
                    client.wait_until_ready(arguments.wait)
                yield client
    except RefusalError as refusal:
        raise RefusalError(in_flags(str(refusal)), refusal.status) from refusal


# What the remedies of the client name, longest first, and what a command has for it.
_FLAGS = {
    "Options(tls=Tls(private_key=..., certificate_chain=...))": "--tls-key and --tls-cert",
    "private_key=... and certificate_chain=...": "--tls-key and --tls-cert",
    "Options(tls=Tls(root_certificates=...))": "--tls-ca",
    "Options(tls=Tls(server_name=...))": "--tls-server-name",
    "Options(metadata={'authorization': ...})": "--metadata authorization=@FILE",
    "Options(tls=Tls())": "--tls-server-name",
    "leave out Options(tls=...)": "leave out the --tls flags",
    "Options(max_batch_size=...)": "--max-batch-size",
    "Leave other_tower out": "Leave --other-tower out",
    "Leave prompt out": "Leave --prompt out",
    "other_tower=True": "--other-tower",
    "Options(timeout_s=...)": "--timeout",
    "Options(proxy=False)": "--no-proxy",
    "Client(target, model=NAME)": "--model NAME",
    "call Client.wait_until_ready() first": "give --wait 60",
    "Client.describe().inputs": "keras-mrl inspect --target",
    "client.regress(inputs, dim)": "keras-mrl regress",
    "export_saved_model(..., activation='none')": "keras-mrl export --activation none",
    "root_certificates": "--tls-ca",
    "certificate_chain": "--tls-cert",
    "private_key": "--tls-key",
}
_PROMPT = re.compile(r"prompt=(?:manifest\.prompts\[)?'([^']+)'\]?")
_BATCH_SIZE = re.compile(r"Options\(max_batch_size=(\d+)\)")


def in_flags(sentence: str) -> str:
    """Return an error of the client with the flags that a command has for settings of the client.

    Examples:
        >>> in_flags("Set Options(max_batch_size=64), or raise Options(timeout_s=...).")
        'Set --max-batch-size 64, or raise --timeout.'
    """
    sentence = _PROMPT.sub(r"--prompt \1", sentence)
    sentence = _BATCH_SIZE.sub(r"--max-batch-size \1", sentence)
    for setting, flag in _FLAGS.items():
        sentence = sentence.replace(setting, flag)
    return sentence


@contextmanager
def connect_and_describe(arguments: SimpleNamespace) -> Iterator[tuple[Client, Manifest]]:
    """Give a client whose calls have as many rows as suit the model and the files; its manifest.

    Raises:
        RefusalError: If a flag does not fit, or for every `KerasMrlError` meanwhile.
    """
    with connect(arguments) as client:
        manifest = client.describe()
        if arguments.max_batch_size is None:
            tower = manifest.tower(getattr(arguments, "other_tower", False))
            client = client.with_batch_size(_rows_of_a_call(tower, arguments.files))
        yield client, manifest


def _options(arguments: SimpleNamespace) -> Options:
    settings: dict[str, Any] = {
        "metadata": _metadata(arguments.metadata),
        "timeout_s": arguments.timeout,
        "proxy": not arguments.no_proxy,
        "max_batch_size": getattr(arguments, "max_batch_size", None),
    }
    files = (arguments.tls_ca, arguments.tls_key, arguments.tls_cert)
    if any(file is not None for file in (*files, arguments.tls_server_name)):
        settings["tls"] = _tls(*files, arguments.tls_server_name)
    return Options(**{name: value for name, value in settings.items() if value is not None})


def _tls(ca: str | None, key: str | None, cert: str | None, server_name: str | None) -> Tls:
    rule = "The files of --tls-ca, --tls-key and --tls-cert must be files that can be read."
    try:
        with refusing(ValueError, rule=rule, remedy="Correct the path.", status=MISUSED):
            return Tls.from_files(ca, key, cert, server_name)
    except RefusalError as refusal:
        raise RefusalError(in_flags(str(refusal)), refusal.status) from refusal


def _metadata(pairs: Sequence[str]) -> dict[str, str]:
    """Return the metadata of every call: that of the environment, then that of the flags.

    Raises:
        RefusalError: For a pair that gRPC cannot send. It may be a secret, or have one on the wrong
            side of its "=": nothing of it is repeated.
    """
    lines = os.environ.get(_METADATA_VARIABLE, "").splitlines()
    places = [
        (f"line {number} of {_METADATA_VARIABLE}", line)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    places += [(f"--metadata number {number}", pair) for number, pair in enumerate(pairs, 1)]
    value_by_key = {}
    for place, pair in places:
        key, equals, value = pair.strip().partition("=")
        key = key.lower()
        if value.startswith("@"):
            value = _value_of_file(value[1:], place)
        if not equals:
            raise _unfit_metadata(f"{place}, which has no '='")
        if key.endswith("-bin") or not _METADATA_NAME.fullmatch(key):
            raise _unfit_metadata(f"{place}, whose key is another")
        if not (value.isascii() and value.isprintable()):
            raise _unfit_metadata(f"{place}, whose value is another")
        value_by_key[key] = value
    return value_by_key


def _value_of_file(file: str, place: str) -> str:
    try:
        value = read_bytes(file, _VALUE_BYTES).decode("latin-1").strip()
    except UntrustedFileError as error:
        raise _unfit_metadata(f"{place}, whose file is {error}") from error
    except OSError as error:
        raise _unfit_metadata(f"{place}, whose file does not read ({error.strerror})") from error
    if not value:
        raise _unfit_metadata(f"{place}, whose file is empty")
    return value


def _unfit_metadata(received: str) -> RefusalError:
    return RefusalError(
        "Metadata must be KEY=VALUE or KEY=@FILE in printable ASCII, its key of letters, digits "
        f"and _.- and not ending in -bin. Received: {received}. "
        "Give for example --metadata authorization=@token, a file that holds 'Bearer 5e1f'.",
        MISUSED,
    )


def _rows_of_a_call(manifest: Manifest, files: Sequence[str]) -> int:
    """Return so few that neither a call nor the rows in memory grow with the size of an image."""
    if manifest.preprocessor is not None:
        return _MOST_TEXTS
    largest_image = max(map(_file_bytes, filter(is_image, files)), default=0)
    row_bytes = 0
    for spec in manifest.inputs.values():
        if spec["dtype"] == "string":
            row_bytes += largest_image
        else:
            row_bytes += _item_bytes(spec["dtype"]) * prod(n or 1 for n in spec["shape"])
    return max(1, min(_MOST_ROWS, _CALL_BYTES // max(row_bytes, 1)))


def _item_bytes(dtype: str) -> int:
    try:
        return np.dtype(dtype).itemsize
    except TypeError:  # one that NumPy has not: its rows are refused
        return 1


def _file_bytes(file: str) -> int:
    try:
        return os.stat(file).st_size
    except OSError:
        return 0


# File after file.


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

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of a row, by input."""
        return {name: array.shape[1:] for name, array in self.arrays.items()}


def checked_files(arguments: SimpleNamespace, manifest: Manifest) -> Iterator[tuple[str, Arrays]]:
    """Yield each file and its rows; report all that are bad, before anything is sent.

    Raises:
        RefusalError: At the end, if files are bad and `--skip-unreadable` was not given, or none is
            left.
    """
    bad = 0
    for file in arguments.files:
        try:
            rows = check_rows(file, manifest, arguments.scale, arguments.column)
        except RefusalError as refusal:
            if len(arguments.files) == 1:
                raise
            refuse(str(refusal))
            bad += 1
        else:
            yield file, rows
    count = len(arguments.files)
    if bad == count or (bad and not arguments.skip_unreadable):
        raise RefusalError(
            "All files are checked before anything is sent. "
            f"Received: {bad} of {count} that cannot be used, named above. Mend them"
            + ("." if bad == count else ", or go on without them: --skip-unreadable.")
        )
    if bad:
        refuse(f"{bad} of {count} files are left out, named above.")


def ask_files(
    arguments: SimpleNamespace, client: Client, manifest: Manifest, ask: Ask, show: Show
) -> int:
    """Ask about all files; return the exit status.

    Args:
        arguments: Of the command.
        client: Whose options say how large a window is.
        manifest: Of the model that takes the rows.
        ask: Asks about rows, with a function to be told of progress.
        show: Prints one row.

    Raises:
        RefusalError: As `checked_files`.
        KerasMrlError: If the server answers no more; the answers before that are shown.
    """
    arguments.files = [file for file, _ in checked_files(arguments, manifest)]
    walk = _Walk(ask, show, lambda: sum(map(count_rows, arguments.files)))
    size = window_rows(client.options)
    with walk.progress:
        for window in _windows(arguments, manifest, size, walk.report):
            walk.ask_window(window)
    return walk.status


def _windows(
    arguments: SimpleNamespace, manifest: Manifest, size: int, report: Callable[[str], None]
) -> Iterator[list[Part]]:
    """Cut the files into windows of rows of one shape; report the files that are bad."""
    window: list[Part] = []
    for file in arguments.files:
        try:
            whole = Part(file, 0, load_rows(file, manifest, arguments.scale, arguments.column))
        except RefusalError as refusal:
            report(str(refusal))
            continue
        if window and window[0].shapes != whole.shapes:
            yield window
            window = []
        start = 0
        while start < len(whole):
            stop = min(len(whole), start + size - sum(map(len, window)))
            rows = {name: array[start:stop] for name, array in whole.arrays.items()}
            window.append(Part(file, start, rows))
            start = stop
            if sum(map(len, window)) >= size:
                yield window
                window = []
    if window:
        yield window


class _Walk:
    """How far a command has come with its files."""

    def __init__(self, ask: Ask, show: Show, count: Callable[[], int]) -> None:
        self.status = DONE
        self.progress = Progress(count)
        self._ask = ask
        self._show = show
        self._done = 0

    def report(self, sentence: str) -> None:
        """Say that a file is bad; the exit status says so too."""
        self.progress.clear()
        self.status = refuse(sentence)

    def ask_window(self, window: list[Part]) -> None:
        """Ask about the rows of a window, and print each answer."""
        owners = [(part.file, part.start + row) for part in window for row in range(len(part))]
        rows = {n: np.concatenate([p.arrays[n] for p in window]) for n in window[0].arrays}
        try:
            answer = self._ask(rows, lambda done, _: self.progress.show(self._done + done))
        except InvalidInputError as error:
            if len(window) > 1:  # one file spoils the call of all
                half = len(window) // 2
                self.ask_window(window[:half])
                self.ask_window(window[half:])
                return
            self._show_partial(error, owners)
            self.report(f"{window[0].file}: {in_flags(one_line(error))}")
        except KerasMrlError as error:
            self._show_partial(error, owners)
            raise
        else:
            self.progress.clear()
            for number, (file, row) in enumerate(owners):
                self._show(file, row, answer[number : number + 1])
        self._done += len(owners)

    def _show_partial(self, error: KerasMrlError, owners: list[tuple[str, int]]) -> None:
        """Print what was answered before an error."""
        self.progress.clear()
        if error.partial is not None:
            for number, owner in enumerate(error.partial.rows.tolist()):
                file, row = owners[owner]
                self._show(file, row, error.partial.answer[number : number + 1])
