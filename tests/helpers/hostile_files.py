"""Files made to hurt whoever reads them, and a process that measures what reading them costs."""

import bz2
import io
import os
import random
import socket
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MIB = 2**20


def npy(
    shape: object = (2, 3),
    descr: object = "<f4",
    *,
    is_fortran: object = False,
    version: tuple[int, int] = (1, 0),
    length: int | None = None,
    values: bytes = bytes(24),
    header: str | None = None,
) -> bytes:
    """An .npy file whose header says what a test wants it to say."""
    text = f"{{'descr': {descr!r}, 'fortran_order': {is_fortran!r}, 'shape': {shape!r}, }}\n"
    encoded = (text if header is None else header).encode("latin1")
    size = struct.pack("<H" if version == (1, 0) else "<I", length or len(encoded))
    return b"\x93NUMPY" + bytes(version) + size + encoded + values


@dataclass(frozen=True)
class Member:
    """A member of a zip as its two headers describe it; the defaults are the truth."""

    name: bytes
    data: bytes
    method: int = zipfile.ZIP_STORED
    size: int | None = None
    crc: int | None = None
    flags: int = 0
    packed: bytes | None = None

    def body(self) -> bytes:
        if self.packed is not None:
            return self.packed
        if self.method == zipfile.ZIP_DEFLATED:
            packer = zlib.compressobj(wbits=-15)
            return packer.compress(self.data) + packer.flush()
        return bz2.compress(self.data) if self.method == zipfile.ZIP_BZIP2 else self.data

    def header(self) -> bytes:
        crc = zlib.crc32(self.data) if self.crc is None else self.crc
        size = len(self.data) if self.size is None else self.size
        facts = (self.flags, self.method, 0, 33, crc, len(self.body()), size, len(self.name), 0)
        return struct.pack("<HHHHHIIIHH", 20, *facts)


def raw_zip(*members: Member, share: bool = False) -> bytes:
    """A zip of these members; with `share` all name the bytes of the first."""
    file, entries = io.BytesIO(), []
    for number, member in enumerate(members):
        offset = 0 if share else file.tell()
        if not share or not number:
            file.write(b"PK\x03\x04" + member.header() + member.name + member.body())
        rest = struct.pack("<HHHII", 0, 0, 0, 0, offset)
        entries.append(b"PK\x01\x02\x14\x00" + member.header() + rest + member.name)
    body, directory = file.getvalue(), b"".join(entries)
    count = min(len(members), 2**16 - 1)
    end = struct.pack("<HHHHIIH", 0, 0, count, count, len(directory), len(body), 0)
    return body + directory + b"PK\x05\x06" + end


def bomb(name: bytes, size: int, head: bytes = b"") -> Member:
    """A deflated member of a thousandth of `size`: `head`, then zeros."""
    packer = zlib.compressobj(9, wbits=-15)
    packed = packer.compress(head) + packer.flush(zlib.Z_FULL_FLUSH)
    packer = zlib.compressobj(9, wbits=-15)
    zeros = packer.compress(bytes(MIB)) + packer.flush(zlib.Z_FULL_FLUSH)
    packed += zeros * (size // MIB) + packer.flush()
    return Member(name, b"", zipfile.ZIP_DEFLATED, len(head) + size // MIB * MIB, 0, 0, packed)


@cache
def archives() -> dict[str, bytes]:
    """Archives by what is wrong with them."""
    good = npy()
    huge = npy((2**29,), "<f8", values=b"")
    return {
        "no zip": b"PK\x03\x04 no zip",
        "cut": raw_zip(Member(b"x.npy", good))[:-40],
        "no npy": raw_zip(Member(b"x.txt", good)),
        "nested": raw_zip(Member(b"x.npz", raw_zip(Member(b"x.npy", good)))),
        "encrypted": raw_zip(Member(b"x.npy", good, flags=1)),
        "upwards": raw_zip(Member(b"../x.npy", good)),
        "absolute": raw_zip(Member(b"/x.npy", good)),
        "of a drive": raw_zip(Member(b"C:\\x.npy", good)),
        "with NUL": raw_zip(Member(b"x.npy\0.txt", good)),
        "twice": raw_zip(Member(b"x.npy", good), Member(b"x.npy", good)),
        "twice by separators": raw_zip(Member(b"a/x.npy", good), Member(b"a\\x.npy", good)),
        "objects": raw_zip(Member(b"x.npy", npy(descr="|O"))),
        "other bytes": raw_zip(Member(b"x.npy", good, crc=7)),
        "shorter than declared": raw_zip(Member(b"x.npy", good, size=10**6)),
        "longer than declared": raw_zip(Member(b"x.npy", good, zipfile.ZIP_DEFLATED, size=90)),
        "unknown method": raw_zip(Member(b"x.npy", good, method=77)),
        "bomb of 3 GiB": raw_zip(bomb(b"x.npy", 3 * 2**30, huge)),
        "bomb that declares little": raw_zip(
            Member(b"x.npy", b"", 8, 200, 0, 0, bomb(b"", 3 * 2**30, npy()).packed)
        ),
        "bomb by bzip2": raw_zip(
            Member(b"x.npy", b"", zipfile.ZIP_BZIP2, 200, 0, 0, bz2.compress(bytes(MIB)) * 256)
        ),
        "many of 200 MiB": raw_zip(*(bomb(b"%d.npy" % n, 200 * MIB, good) for n in range(10))),
        "many that share": raw_zip(
            *(bomb(b"%d.npy" % n, 100 * MIB, good) for n in range(99)), share=True
        ),
        "header of 8 GiB": raw_zip(Member(b"x.npy", npy((2**30,), "<f8"))),
        "65,000 members": raw_zip(*(Member(b"%d.txt" % n, b"") for n in range(65_000))),
    }


def arrays() -> dict[str, bytes]:
    """Files of arrays by what is wrong with them."""
    return {
        "empty": b"",
        "no npy": b"no array",
        "an npz": archives()["nested"],
        "cut in the header": npy()[:30],
        "cut in the values": npy(values=bytes(23)),
        "pickle": npy(descr="|O", values=b"cos\nsystem\n(S'true'\ntR."),
        "objects inside": npy(descr=[("a", "|O"), ("b", "<f4")]),
        "4 GiB of float64": npy((2**29,), "<f8"),
        "product beyond 64 bits": npy((2**33, 2**33)),
        "product that wraps to 24": npy((2**62 + 6, 4)),
        "negative": npy((-2, -3)),
        "no integers": npy((2.0, 3.0)),
        "booleans": npy((True, True)),
        "none, and huge": npy((0, 2**62, 2**62)),
        "forty axes": npy((1,) * 40),
        "items of no bytes": npy((10**15,), "<U0"),
        "an item of 2 GB": npy((4,), "<U500000000"),
        "sub-arrays": npy((2,), ("<f4", (2**20, 2**20))),
        "header of 4 GiB": npy(version=(2, 0), length=2**32 - 1),
        "header of 60 kB": npy(header="(" * 60_000),
        "header of brackets": npy(header="(" * 9_000),
        "header that is code": npy(header="{'descr': __import__('os').getcwd()}\n"),
        "header of other keys": npy(header="{'descr': '<f4', 'shape': (2, 3)}\n"),
        "no header": npy(header=""),
        "unknown dtype": npy(descr="<q99"),
        "version 3.0": npy(version=(3, 0)),
        "version 9.9": npy(version=(9, 9)),
    }


def fuzzed(whole: bytes, chance: random.Random) -> bytes:
    """A file with a few bytes changed, most often in its first or last ones, or cut."""
    data = bytearray(whole)
    for _ in range(chance.choice([1, 1, 2, 5])):
        places = [chance.randrange(min(len(data), 130)), -1 - chance.randrange(min(len(data), 130))]
        at = chance.choice([*places, chance.randrange(len(data))]) % len(data)
        width = chance.choice([1, 1, 2, 4, 8])
        number = chance.choice([0, 1, 2**31, 2**63, 2**64 - 1, chance.randrange(2**64)])
        data[at : at + width] = (number % 256**width).to_bytes(width, "little")
    if chance.random() < 0.1:
        del data[chance.randrange(len(data)) :]
    return bytes(data)


def put_special_files(folder: Path) -> list[str]:
    """Make what is no regular file in a folder; return the names."""
    os.mkfifo(folder / "fifo")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "tty").symlink_to("/dev/tty")
    (folder / "loop").symlink_to("loop")
    (folder / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(folder / "socket"))
    return ["fifo", "zero", "tty", "loop", "folder", "socket"]


READER = """
import resource, sys
import numpy as np
{setup}
def peak():  # of this program: ru_maxrss would count its parent's, too
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) // 1024
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
before = peak()
resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30, 8 * 2**30))
for path in sys.stdin.read().splitlines():
    try:
        read(path)
        result = "answered"
    except refusals as error:
        result = f"{{type(error).__name__}} {{' '.join(str(error).split())!a:.300}}"
    except BaseException as error:
        result = f"RAISED {{type(error).__name__}} {{error!a:.300}}"
    print(peak() - before, result, flush=True)
"""


def read_in_process(setup: str, paths: Sequence[Path]) -> tuple[list[str], int]:
    """Read files one after the other in a process of its own.

    Args:
        setup: Program that defines `read`, of a path, and `refusals`, a tuple of exceptions.
        paths: The files.

    Returns:
        What became of each, "answered" or its error; and the most memory that the process took
        beyond what it had before the first, in MiB.
    """
    done = subprocess.run(
        [sys.executable, "-c", READER.format(setup=setup)],
        input="\n".join(map(str, paths)),
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,  # or a pipe that is waited for would hang the tests
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = [line.split(" ", 1) for line in done.stdout.splitlines()]
    assert len(results) == len(paths)
    return [result for _, result in results], max(int(peak) for peak, _ in results)
