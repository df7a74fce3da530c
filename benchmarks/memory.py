"""What a saved index holds in memory once it is opened and asked, in a process of its own.

    python benchmarks/memory.py INDEX QUERIES.npy

INDEX is a folder of ours or a file of FAISS's. The queries are asked one by one, twice: cold,
with the files out of the page cache, then warm. The last line is one JSON object.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
from rivals import Vectors

from keras_mrl_serving import open_index

QUERIES = 100
K = 10


def main() -> None:
    """Open, ask, print."""
    path, queries = Path(sys.argv[1]), np.load(sys.argv[2])
    before = _memory()
    index = open_index(path, verify=False) if path.is_dir() else faiss.read_index(str(path))
    faiss.omp_set_num_threads(1)
    laps: list[list[float]] = []
    for _ in range(2):
        laps.append([])
        for row in range(len(queries)):
            began = time.perf_counter()
            index.search(queries[row : row + 1], K)
            laps[-1].append(1e6 * (time.perf_counter() - began))
    files = list(path.iterdir()) if path.is_dir() else []
    found = {"anon_mib": _memory() - before, "resident_mib": sum(map(_resident, files))}
    for name, lap in zip(("cold", "warm"), laps, strict=True):
        for percent in (50, 99):
            found[f"{name}_p{percent}_us"] = float(np.percentile(lap, percent))
    print(json.dumps(found))


def measured_memory(index: Path, queries: Vectors) -> dict[str, float]:
    """Run this file on an index and the first of the queries; return what it printed."""
    for file in index.iterdir() if index.is_dir() else [index]:
        with open(file, "rb") as opened:  # out of the page cache, so that it is read cold
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with tempfile.NamedTemporaryFile(suffix=".npy") as asked:
        np.save(asked, queries[:QUERIES])
        asked.flush()
        command = [sys.executable, __file__, str(index), asked.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def _memory() -> float:
    """Return the MiB of memory that is of no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)["RssAnon"].split()[0]) / 1024


def _resident(path: Path) -> float:
    """Return the MiB of a file that lie in memory, whichever process read them (mincore)."""
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, prot=mmap.PROT_READ) as mapped:
        array = np.frombuffer(mapped, np.uint8)
        vector = (ctypes.c_ubyte * pages)()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mincore(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(size), vector):
            raise OSError(ctypes.get_errno(), "mincore")
        resident = sum(page & 1 for page in vector)
        del array
    return resident * mmap.PAGESIZE / 2**20


if __name__ == "__main__":
    main()
