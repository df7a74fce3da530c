"""Files that somebody else wrote: what is opened, and how much of what they say is believed.

Only a regular file is opened, since a pipe or a device may never end. A file of a folder lies in
that folder: a link may lead elsewhere inside it, as Kubernetes makes them, but not out of it. The
header of an array is compared with the size of its file before a value is read, and the sizes that
an archive declares with its own before it is unpacked: a small file never takes much memory.

The errors here are short: each room says what the file was to be, and what to do.
"""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite, prod
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

JSON_BYTES = 2**20  # of a file of JSON that describes something: a card, a manifest, a policy

_DEEPEST = 32  # levels of a JSON value; copying or writing one recurses for each level
_HEADER_BYTES = 10_000  # of an .npy file, as NumPy itself has it
_UNPACKED_BYTES = 2**28  # that any archive may unpack to
_UNPACKED_RATIO = 100  # bytes that a larger archive may unpack to, for each of its own
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # zipfile bounds what each step unpacks
_HEADER_ERRORS = (
    ValueError,
    TypeError,
    SyntaxError,
    MemoryError,
    RecursionError,
    OverflowError,
    tokenize.TokenError,
)
_IS_ENCRYPTED = 1  # bit of a member's flags

Path = str | os.PathLike[str]


class UntrustedFileError(ValueError):
    """Says in a few words what a file is, where it cannot be taken: "a FIFO"."""


def open_file(path: Path, within: Path | None = None) -> io.BufferedReader:
    """Open a regular file to read.

    Args:
        path: The file.
        within: Folder that the file must lie in, once links are followed; None for anywhere.

    Raises:
        UntrustedFileError: If it is no regular file, or lies outside.
        OSError: If it cannot be opened.

    Examples:
        >>> open_file(os.devnull)
        Traceback (most recent call last):
        ...
        keras_mrl_serving.untrusted.UntrustedFileError: a device, not a regular file
    """
    path = os.fspath(path)
    if "\0" in path:
        raise UntrustedFileError("a name with NUL")
    if within is not None:
        folder, real = os.path.realpath(within), os.path.realpath(path)
        if os.path.commonpath((folder, real)) != folder:
            raise UntrustedFileError("a link out of its folder")
        path = real
    _check_regular(os.stat(path), path)
    # The path may have become another since: no waiting for the writer of a pipe.
    no_wait = getattr(os, "O_NONBLOCK", 0)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | no_wait))
    try:
        _check_regular(os.fstat(file.fileno()), path)
    except BaseException:
        file.close()
        raise
    return file


def _check_regular(status: os.stat_result, path: str) -> None:
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    if not stat.S_ISREG(mode):
        kind = (
            "a FIFO" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        )
        raise UntrustedFileError(f"{kind}, not a regular file")


def read_bytes(path: Path, most: int, within: Path | None = None) -> bytes:
    """Return the bytes of a regular file.

    Args:
        path: The file.
        most: How many bytes it may have.
        within: As for `open_file`.

    Raises:
        UntrustedFileError: If it is larger, no regular file, or lies outside.
        OSError: If it cannot be read.

    Examples:
        >>> read_bytes(__file__, most=10)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        keras_mrl_serving.untrusted.UntrustedFileError: ... bytes, more than 10
    """
    with open_file(path, within) as file:
        size = _size(file)
        if size > most:
            raise UntrustedFileError(f"{size:,} bytes, more than {most:,}")
        data = file.read(size + 1)
        if len(data) > size:
            raise UntrustedFileError("a file that grows while it is read")
        return data


def parse_json(text: str | bytes) -> Any:
    """Return a JSON value of finite numbers, whole characters, keys that differ and few levels.

    Raises:
        ValueError: If it is none.

    Examples:
        >>> parse_json("[" * 40 + "]" * 40)
        Traceback (most recent call last):
        ...
        ValueError: it is nested more than 32 levels deep
    """
    too_deep = ValueError(f"it is nested more than {_DEEPEST} levels deep")
    try:
        value = json.loads(
            text, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_object
        )
    except RecursionError as error:
        raise too_deep from error
    level = [value]
    for _ in range(_DEEPEST):
        level = [child for parent in level for child in _children(parent)]
    if level:
        raise too_deep
    json.dumps(value, ensure_ascii=False).encode()  # fails for half of a surrogate pair
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not isfinite(number):
        raise ValueError(f"{text} is no number of JSON, or too large a one")
    return number


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return value


def _children(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


# Arrays.


class Header(NamedTuple):
    """The head of an .npy file, which fits the size of the file.

    Args:
        shape: Of the array.
        dtype: Without objects, so that nothing is unpickled.
        is_fortran: Whether the first axis varies fastest.
        offset: Where the values begin.

    Examples:
        >>> Header((2, 3), np.dtype("float32"), False, 128).is_fortran
        False
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool
    offset: int


def read_array(path: Path, within: Path | None = None) -> npt.NDArray[Any]:
    """Return the array of an .npy file, memory-mapped and read-only.

    Args:
        path: The file.
        within: As for `open_file`.

    Raises:
        UntrustedFileError: If it holds none, or less than its header says.
        OSError: If it cannot be read.

    Examples:
        >>> import tempfile
        >>> file = tempfile.mkdtemp() + "/x.npy"
        >>> np.save(file, np.eye(2))
        >>> read_array(file).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    with open_file(path, within) as file:
        header = _read_header(file, _size(file))
        if not prod(header.shape):  # nothing to map
            return np.empty(header.shape, header.dtype)
        order: Any = "F" if header.is_fortran else "C"
        return np.memmap(file, header.dtype, "r", header.offset, header.shape, order)


def read_arrays(
    path: Path, is_requested: Callable[[str], bool] = lambda _name: True
) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of an .npz file by name, read-only.

    Args:
        path: The file.
        is_requested: Whether the array of a name is read; the others are not unpacked.

    Raises:
        UntrustedFileError: If it holds something else, or would unpack to very much.
        OSError: If it cannot be read.

    Examples:
        >>> import tempfile
        >>> file = tempfile.mkdtemp() + "/pair.npz"
        >>> np.savez(file, a=np.eye(2), b=np.ones(3))
        >>> {name: array.shape for name, array in read_arrays(file).items()}
        {'a': (2, 2), 'b': (3,)}
    """
    with open_archive(path) as archive:
        members = {}
        for member in archive.names:
            name, dot, suffix = member.rpartition(".")
            if f"{dot}{suffix}" != ".npy":
                raise UntrustedFileError(f"an archive with {member!r:.80}, which is no .npy")
            if is_requested(name):
                members[name] = member
        archive.check_sizes(list(members.values()))
        return {name: _unpacked_array(archive.read(member)) for name, member in members.items()}


def _unpacked_array(data: bytes) -> npt.NDArray[Any]:
    header = _read_header(io.BytesIO(data), len(data))
    shape = header.shape[::-1] if header.is_fortran else header.shape
    values = np.frombuffer(data, header.dtype, prod(shape), header.offset).reshape(shape)
    return values.T if header.is_fortran else values


def _read_header(file: BinaryIO, size: int) -> Header:
    """Return the header of an array in a file of `size` bytes; nothing else is read."""
    try:
        version = np.lib.format.read_magic(file)
    except ValueError as error:
        raise UntrustedFileError("no .npy, or not a whole one") from error
    width = {(1, 0): 2, (2, 0): 4}.get(version)
    if width is None:
        raise UntrustedFileError(f"an .npy of version {version[0]}.{version[1]}, not 1.0 or 2.0")
    start = file.read(width)
    length = int.from_bytes(start, "little")
    if length > _HEADER_BYTES:
        raise UntrustedFileError(f"a header of {length:,} bytes, more than {_HEADER_BYTES:,}")
    reads = np.lib.format.read_array_header_1_0
    if version == (2, 0):
        reads = np.lib.format.read_array_header_2_0
    try:
        shape, is_fortran, dtype = reads(io.BytesIO(start + file.read(length)))
    except _HEADER_ERRORS as error:
        raise UntrustedFileError("an .npy whose header does not read") from error
    header = Header(tuple(shape), dtype, is_fortran, 8 + width + length)
    _check_header(header, size)
    return header


def _check_header(header: Header, size: int) -> None:
    shape, dtype = header.shape, header.dtype
    if dtype.hasobject:
        raise UntrustedFileError("an array of Python objects")
    if not dtype.itemsize or len(shape) > 32 or any(type(n) is not int or n < 0 for n in shape):
        raise UntrustedFileError(f"an array of {dtype!s:.80} {shape!r:.80}")
    needed = prod(shape) * dtype.itemsize
    if header.offset + needed > size:
        raise UntrustedFileError(
            f"an array of {dtype!s:.80} {shape!r:.80}, {needed:,} bytes, in {size:,} bytes"
        )
    if prod(filter(None, shape)) * dtype.itemsize >= 2**63:  # one without values
        raise UntrustedFileError(f"an array of {dtype!s:.80} {shape!r:.80}")


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


# Archives.


class Archive:
    """A zip whose names are fit to be shown and compared; made by `open_archive`.

    Args:
        archive: As the standard library reads it.
        size: Bytes of its file.

    Attributes:
        names: Of its members, none of them twice; those of folders end with "/".

    Examples:
        >>> file = io.BytesIO()
        >>> with zipfile.ZipFile(file, "w") as archive:
        ...     archive.writestr("cats/1.png", b"pixels")
        >>> Archive(zipfile.ZipFile(file), size=len(file.getvalue())).read("cats/1.png")
        b'pixels'
    """

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive = archive
        self._most = max(_UNPACKED_BYTES, _UNPACKED_RATIO * size)
        self._members: dict[str, zipfile.ZipInfo] = {}
        for member in archive.infolist():
            name = member.filename.replace("\\", "/")  # some programs write those of their system
            parts = name.split("/")
            if "\0" in member.orig_filename or ".." in parts or not parts[0] or ":" in parts[0]:
                raise UntrustedFileError(f"an archive with {member.orig_filename!r:.80}")
            if name in self._members:
                raise UntrustedFileError(f"an archive with two of {name!r:.80}")
            self._members[name] = member
        self.names: Sequence[str] = list(self._members)

    def check_sizes(self, names: Sequence[str]) -> None:
        """Raise `UntrustedFileError` if these members together unpack to very much."""
        total = sum(self._members[name].file_size for name in names)
        if total > self._most:
            raise UntrustedFileError(
                f"an archive that unpacks to {total:,} bytes, more than {self._most:,}"
            )

    def read(self, name: str) -> bytes:
        """Return the bytes of a member.

        Raises:
            UntrustedFileError: If it is not what the archive declares, or very large.
        """
        member = self._members[name]
        self.check_sizes([name])
        if member.flag_bits & _IS_ENCRYPTED:
            raise UntrustedFileError(f"an archive with {name!r:.80}, which is encrypted")
        if member.compress_type not in _METHODS:
            raise UntrustedFileError(
                f"an archive with {name!r:.80}, packed by a method other than deflate"
            )
        with _zip_errors(), self._archive.open(member) as file:
            data = file.read(member.file_size)
            if len(data) == member.file_size:
                return data
        raise UntrustedFileError(f"an archive with {name!r:.80}, shorter than it declares")


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Give the archive of a zip file.

    Raises:
        UntrustedFileError: If it is none, or one with a name that is not fit, or with one twice.
        OSError: If it cannot be read.

    Examples:
        >>> import tempfile
        >>> file = tempfile.mkdtemp() + "/pair.npz"
        >>> np.savez(file, a=np.eye(2), b=np.ones(3))
        >>> with open_archive(file) as archive:
        ...     archive.names
        ['a.npy', 'b.npy']
    """
    with open_file(path) as file:
        with _zip_errors():
            archive = Archive(zipfile.ZipFile(file), _size(file))
        yield archive


@contextmanager
def _zip_errors() -> Iterator[None]:
    try:
        yield
    except UntrustedFileError:
        raise
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        NotImplementedError,
        OSError,  # a place that the archive names, and its file has not
        RuntimeError,
        ValueError,
    ) as error:
        raise UntrustedFileError(f"no zip, or not a whole one ({error!s:.80})") from error
