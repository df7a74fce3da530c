"""What a saved index holds in memory once it is opened and asked, in a process of its own.

    python benchmarks/memory.py INDEX QUERIES.npy

INDEX is a folder of ours or a file of FAISS's. The queries are asked one by one, twice: cold,
with the files out of the page cache, then warm. The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
from galleries import Vectors

from keras_mrl_serving import open_index

QUERIES = 100
K = 10


def main() -> None:
    """Open, ask, print."""
    path, queries = Path(sys.argv[1]), np.load(sys.argv[2])
    before = _memory()
    index = open_index(path, verify=False) if path.is_dir() else faiss.read_index(str(path))
    laps = []
    for _ in range(2):
        began = time.perf_counter()
        for row in range(len(queries)):
            index.search(queries[row : row + 1], K)
        laps.append(1e3 * (time.perf_counter() - began) / len(queries))
    anon, mapped = (b - a for a, b in zip(before, _memory(), strict=True))
    print(
        json.dumps({"anon_mib": anon, "mapped_mib": mapped, "cold_ms": laps[0], "warm_ms": laps[1]})
    )


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


def _memory() -> tuple[float, float]:
    said = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anon, mapped = (int(said[key].split()[0]) / 1024 for key in ("RssAnon", "RssFile"))
    return anon, mapped


if __name__ == "__main__":
    main()
