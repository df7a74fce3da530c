"""A search service in one process: FAISS, filters by what rows are, eight threads.

    pip install 'keras-mrl[faiss]'
    python examples/search_service.py
    python examples/search_service.py --embeddings E.npy --rows 100000 --threads 8

`--embeddings` are the rows of an `.npy` file; without it rows are drawn that only look like
embeddings. Every row gets a string as its id and one of three shops.

What happens, and what to look at:

1. A short first stage in a graph, and the whole rows behind it, in a folder from which any number
   of processes can open the index, memory-mapped.
2. One filter per shop is prepared once. It is used by all threads; making it anew for every query
   (`among=`) is what it saves.
3. Eight threads ask one query at a time, each within the shop of its user.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from keras_mrl_serving import FaissIndex, FirstStage, FunnelSchedule, open_index

SHOPS = ("north", "south", "west")


def main() -> None:
    """Build, open, prepare, serve, and say what was gained."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--embeddings", type=Path, help="rows of an .npy file (drawn)")
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--threads", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.embeddings:
        rows = np.load(arguments.embeddings, mmap_mode="r")[: arguments.rows].astype("float32")
    else:
        drawn = np.random.default_rng(0).normal(size=(arguments.rows, 128))
        rows = (drawn * np.geomspace(1, 0.05, 128)).astype("float32")
    gallery, queries = rows[: -arguments.queries], rows[-arguments.queries :]
    width = rows.shape[1]
    names = [f"product {number}" for number in range(len(gallery))]
    shops = np.random.default_rng(1).choice(SHOPS, len(gallery), p=(0.6, 0.3, 0.1))

    with tempfile.TemporaryDirectory() as folder:
        schedule = FunnelSchedule((min(64, width // 2), width), (100,), 10)
        first_stage = FirstStage("HNSW32", "efSearch=64")
        FaissIndex.build(gallery, schedule, names, first_stage=first_stage, path=folder)
        index = open_index(folder)

        only = {shop: index.prepare_filter(shops == shop) for shop in SHOPS}
        users = np.random.default_rng(2).choice(SHOPS, len(queries))

        def answer(query: int) -> list[tuple[int | str, float]]:
            return index.search(queries[query : query + 1], filter=only[users[query]])[0]

        start = time.perf_counter()
        with ThreadPoolExecutor(arguments.threads) as threads:
            answers = list(threads.map(answer, range(len(queries))))
        seconds = time.perf_counter() - start

    shop_of = dict(zip(names, shops.tolist(), strict=True))
    kept = all(
        shop_of[str(name)] == user
        for user, hits in zip(users, answers, strict=True)
        for name, _ in hits
    )
    print(f"{len(queries)} queries by {arguments.threads} threads in {seconds:.2f} s")
    print(f"every answer is of the user's shop: {kept}")
    print(f"nearest to the first: {answers[0][0][0]}")
    few = range(min(20, len(queries)))
    prepared = cpu_seconds(lambda row: index.search(queries[row : row + 1], filter=only["north"]))
    anew = [name for name, shop in zip(names, shops, strict=True) if shop == "north"]
    made = cpu_seconds(lambda row: index.search(queries[row : row + 1], among=anew))
    print(
        f"gained: a query by a filter prepared once takes {prepared(few) * 1e3:.2f} ms, by one "
        f"made for each query {made(few) * 1e3:.2f} ms"
    )


def cpu_seconds(search: Any) -> Any:
    """Return a function that times a search, by the CPU time of this thread per query."""

    def timed(rows: range) -> float:
        start = time.thread_time()
        for row in rows:
            search(row)
        return (time.thread_time() - start) / len(rows)

    return timed


if __name__ == "__main__":
    main()
