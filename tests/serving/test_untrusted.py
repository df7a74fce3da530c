"""Files that somebody else wrote: answered right, or refused by name, in little memory."""

import io
import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from keras_mrl_serving.untrusted import (
    UntrustedFileError,
    open_archive,
    open_file,
    parse_json,
    read_array,
    read_arrays,
    read_bytes,
)
from tests.helpers.hostile_files import (
    archives,
    arrays,
    fuzzed,
    put_special_files,
    read_in_process,
)

SOAK = bool(os.environ.get("KERAS_MRL_SOAK"))

Reads = Callable[[Path], object]

SETUP = """
from keras_mrl_serving.untrusted import *
from keras_mrl_serving.untrusted import UntrustedFileError
refusals = (UntrustedFileError, OSError)
def read(path):
    reads = read_arrays if path.endswith("npz") else read_array
    values = reads(path)
    for array in values.values() if isinstance(values, dict) else [values]:
        array.sum() if array.dtype.kind in "fiu" else array.tobytes()
"""


def written(folder: Path, suffix: str, files: dict[str, bytes]) -> list[Path]:
    paths = []
    for number, data in enumerate(files.values()):
        paths.append(folder / f"{number}{suffix}")
        paths[-1].write_bytes(data)
    return paths


def test_hostile_arrays_and_archives_are_refused_in_little_memory(tmp_path: Path) -> None:
    """An archive may unpack to 256 MiB, or to 100 times its size."""
    paths = [*written(tmp_path, ".npy", arrays()), *written(tmp_path, ".npz", archives())]
    assert max(path.stat().st_size for path in paths) < 8 * 2**20
    results, peak = read_in_process(SETUP, paths)
    by_name = dict(zip([*arrays(), *archives()], results, strict=True))
    wrong = {n: r for n, r in by_name.items() if not r.startswith("UntrustedFileError")}
    assert wrong == {}
    assert peak <= 64


@pytest.mark.soak
def test_any_damage_is_refused_or_read_in_little_memory(tmp_path: Path) -> None:
    """300 files, and 20,000 in `make soak`."""
    chance = random.Random(0)
    values = np.arange(600, dtype=np.float32).reshape(30, 20)
    files = {}
    for suffix in (".npy", ".npz"):
        file = io.BytesIO()
        if suffix == ".npy":
            np.save(file, values)
        else:
            np.savez_compressed(file, a=values, b=np.arange(5), c=np.array(["x", "y"]))
        files[suffix] = file.getvalue()
    paths = []
    for number in range(20_000 if SOAK else 300):
        suffix = chance.choice([".npy", ".npz"])
        paths.append(tmp_path / f"{number}{suffix}")
        paths[-1].write_bytes(fuzzed(files[suffix], chance))
    results, peak = read_in_process(SETUP, paths)
    assert [r for r in results if not r.startswith(("UntrustedFileError", "answered"))] == []
    assert {result.partition(" ")[0] for result in results} == {"UntrustedFileError", "answered"}
    assert peak <= 300


@pytest.mark.parametrize("reads", [read_array, read_arrays, open_file])
def test_only_regular_files_are_opened(reads: Reads, tmp_path: Path) -> None:
    reasons = {}
    for name in put_special_files(tmp_path):
        with pytest.raises((UntrustedFileError, OSError)) as caught:
            reads(tmp_path / name)
        error = caught.value
        reasons[name] = error.strerror if isinstance(error, OSError) else str(error)
    assert reasons == {
        "fifo": "a FIFO, not a regular file",
        "zero": "a device, not a regular file",
        "tty": "a device, not a regular file",
        "socket": "a socket, not a regular file",
        "loop": "Too many levels of symbolic links",
        "folder": "Is a directory",
    }


def test_a_file_that_turns_into_a_pipe_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "x")
    (tmp_path / "before").touch()
    before = os.stat(tmp_path / "before")
    monkeypatch.setattr(os, "stat", lambda _path: before)
    with pytest.raises(UntrustedFileError, match=r"^a FIFO, not a regular file$"):
        open_file(tmp_path / "x")


def test_a_link_leads_elsewhere_in_its_folder_and_not_out_of_it(tmp_path: Path) -> None:
    """Kubernetes mounts a volume so: x -> ..data/x, and ..data -> ..2026."""
    folder = tmp_path / "mount"
    (folder / "..2026").mkdir(parents=True)
    (folder / "..2026" / "x").write_bytes(b"inside")
    (folder / "..data").symlink_to("..2026")
    (folder / "x").symlink_to(Path("..data") / "x")
    (tmp_path / "other").write_bytes(b"outside")
    (tmp_path / "mount2").mkdir()
    (tmp_path / "mount2" / "x").write_bytes(b"outside")
    (folder / "absolute").symlink_to(tmp_path / "other")
    (folder / "upwards").symlink_to(Path("..") / "other")
    (folder / "sibling").symlink_to(Path("..") / "mount2")
    (tmp_path / "link").symlink_to(folder)
    for within in (folder, tmp_path / "link"):
        assert read_bytes(within / "x", 10, within) == b"inside"
        for name in ("absolute", "upwards", "sibling/x", "../other"):
            with pytest.raises(UntrustedFileError, match=r"^a link out of its folder$"):
                read_bytes(within / name, 10, within)
    assert read_bytes(folder / "absolute", 10) == b"outside"  # a path that the user names


def test_bytes_are_counted_before_they_are_read(tmp_path: Path) -> None:
    with open(tmp_path / "hole", "wb") as file:
        file.truncate(2**40)  # a hole: no disk is used
    with pytest.raises(UntrustedFileError, match=r"^1,099,511,627,776 bytes, more than 9$"):
        read_bytes(tmp_path / "hole", 9)
    with pytest.raises(UntrustedFileError, match=r"^a name with NUL$"):
        read_bytes("x\0y", 9)
    if Path("/proc/self/status").exists():  # a regular file that says it has no bytes
        with pytest.raises(UntrustedFileError, match=r"^a file that grows while it is read$"):
            read_bytes("/proc/self/status", 9)


@pytest.mark.parametrize(
    "text",
    ["[" * 33 + "]" * 33, "[" * 10**5, "1e999", "NaN", '{"a": -Infinity}', "1" * 5000, b"\xff", ""],
)
def test_json_that_is_refused(text: str | bytes) -> None:
    with pytest.raises((ValueError, RecursionError)):
        parse_json(text)
    assert parse_json("[" * 32 + "]" * 32)


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("is_fortran", [False, True])
@pytest.mark.parametrize("shape", [(), (0, 3), (6,), (2, 3), (1, 2, 3)])
@pytest.mark.parametrize("dtype", ["<f4", ">i8", "<U3", "|S5", "|b1", "|u1"])
def test_arrays_come_back_as_numpy_reads_them(
    version: tuple[int, int], is_fortran: bool, shape: tuple[int, ...], dtype: str, tmp_path: Path
) -> None:
    expected = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    expected = np.asfortranarray(expected) if is_fortran and shape else expected
    with open(tmp_path / "x.npy", "wb") as file:
        np.lib.format.write_array(file, expected, version)
    np.savez(tmp_path / "x.npz", x=expected)
    np.savez_compressed(tmp_path / "y.npz", x=expected)
    mapped = read_array(tmp_path / "x.npy")
    unpacked = [read_arrays(tmp_path / name)["x"] for name in ("x.npz", "y.npz")]
    for array in (mapped, *unpacked):
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(array, expected)
        assert array.flags.c_contiguous == np.load(tmp_path / "x.npy").flags.c_contiguous
    assert isinstance(mapped, np.memmap) == bool(expected.size)


def test_what_is_not_wanted_is_not_unpacked(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.arange(3), y=np.arange(4))
    assert set(read_arrays(tmp_path / "x.npz", lambda name: name == "y")) == {"y"}
    with open_archive(tmp_path / "x.npz") as archive:
        assert archive.names == ["x.npy", "y.npy"]


def test_an_archive_of_zeros_may_unpack_to_a_hundred_times_its_size(tmp_path: Path) -> None:
    """As np.savez_compressed makes them of masks: the small ones are all taken."""
    np.savez_compressed(tmp_path / "x.npz", mask=np.zeros(2**27, np.uint8))
    assert (tmp_path / "x.npz").stat().st_size < 2**18
    assert read_arrays(tmp_path / "x.npz")["mask"].nbytes == 2**27


def test_the_reasons_are_short(tmp_path: Path) -> None:
    """The names in them are whatever somebody wrote."""
    reasons = {}
    for name, data in {**arrays(), **archives()}.items():
        path = tmp_path / ("x.npz" if name in archives() else "x.npy")
        path.write_bytes(data)
        with pytest.raises(UntrustedFileError) as caught:
            read_arrays(path) if name in archives() else read_array(path)
        reasons[name] = str(caught.value)
    assert max(map(len, reasons.values())) < 250
    sentences = {
        "cut in the values": "an array of float32 (2, 3), 24 bytes, in 93 bytes",
        "pickle": "an array of Python objects",
        "header of 4 GiB": "a header of 4,294,967,295 bytes, more than 10,000",
        "product that wraps to 24": "an array of float32 (4611686018427387910, 4), "
        "73,786,976,294,838,206,560 bytes, in 112 bytes",
        "version 3.0": "an .npy of version 3.0, not 1.0 or 2.0",
        "nested": "an archive with 'x.npz', which is no .npy",
        "encrypted": "an archive with 'x.npy', which is encrypted",
        "upwards": "an archive with '../x.npy'",
        "with NUL": "an archive with 'x.npy\\x00.txt'",
        "twice": "an archive with two of 'x.npy'",
        "unknown method": "an archive with 'x.npy', packed by a method other than deflate",
        "shorter than declared": "an archive with 'x.npy', shorter than it declares",
        "bomb of 3 GiB": "an archive that unpacks to 3,221,225,548 bytes, more than 318,585,200",
        "other bytes": "no zip, or not a whole one (Bad CRC-32 for file 'x.npy')",
    }
    assert {name: reasons[name] for name in sentences} == sentences
