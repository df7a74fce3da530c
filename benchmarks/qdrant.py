"""A gallery in a folder, with Qdrant's own engine: recall and latency while rows come and go.

    python benchmarks/qdrant.py --embeddings E.npy

`--embeddings` are the rows of an `.npy` file, 80,000 of which are the gallery and 5,000 others give
PCA. Queries are asked one at a time; between two of them, in the second round, 100 rows come and 10
go. Latencies are of the wall clock, on a machine that may be busy.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from keras_mrl_serving import FunnelSchedule, QdrantIndex
from keras_mrl_serving.projection import principal_directions


def main() -> None:
    """Build, search, change and search, and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--embeddings", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=80_000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--shortlist", type=int, default=40)
    arguments = parser.parse_args()
    rows = np.load(arguments.embeddings, mmap_mode="r")
    order = np.random.default_rng(0).permutation(len(rows))
    ends = np.cumsum([arguments.rows, arguments.queries, 5000])
    gallery, queries, others = (np.array(rows[np.sort(part)]) for part in np.split(order, ends)[:3])
    turn = principal_directions(others).astype(np.float32).T
    gallery, queries = gallery @ turn, queries @ turn
    schedule = FunnelSchedule((96, gallery.shape[1]), (arguments.shortlist,), 10)
    half = arguments.rows - 100 * arguments.queries
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        index = QdrantIndex.build(folder, "pets", gallery[:half], schedule)
        built = time.perf_counter() - start
        still = asked(index, queries, gallery, half, changes=False)
        changing = asked(index, queries, gallery, half, changes=True)
        start = time.perf_counter()
        index.optimize()
        optimized = time.perf_counter() - start
        index.close()
    print(
        json.dumps(
            {
                "rows": arguments.rows,
                "built_s": built,
                "optimize_s": optimized,
                "still": still,
                "changing": changing,
            }
        )
    )


def asked(
    index: QdrantIndex, queries: Any, gallery: Any, rows: int, *, changes: bool
) -> dict[str, float]:
    """Return the recall of the exact neighbours and the latencies of queries asked one by one."""
    unit = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    is_there = np.arange(len(gallery)) < rows
    seconds, found = [], []
    for number, query in enumerate(queries):
        if changes:
            new = np.arange(rows + 100 * number, rows + 100 * (number + 1))
            gone = np.arange(10 * number, 10 * (number + 1))
            index.add(gallery[new], new)
            index.remove(gone)
            is_there[new], is_there[gone] = True, False
        start = time.perf_counter()
        ids = index.search(query[None]).ids[0]
        seconds.append(time.perf_counter() - start)
        scores = np.where(is_there, unit @ query, -np.inf)
        found.append(np.isin(np.argsort(-scores)[:10], ids).mean())
    return {
        "recall": float(np.mean(found)),
        "p50_ms": float(np.median(seconds) * 1e3),
        "p99_ms": float(np.quantile(seconds, 0.99) * 1e3),
    }


if __name__ == "__main__":
    main()
