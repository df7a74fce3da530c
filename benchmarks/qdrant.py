"""A gallery in a folder, with Qdrant's own engine: recall and latency while rows are upserted.

    python benchmarks/qdrant.py --embeddings E.npy --out FILE.json

`--embeddings` are the rows of an `.npy` file: 80,000 of them are the gallery, 5,000 others give
PCA, and the rest are new rows. Queries are asked one at a time in five phases: with every row
compared, which tells what the graph changes; by the graph, at rest; while a thread upserts batches
of rows, half of them new and half in the place of others; after it, when the new rows are in no
graph yet; and after `optimize`. Recall is against the exact neighbours among the rows that were
there before the query. Latencies are of the wall clock.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import qdrant_edge

from keras_mrl_serving import FunnelSchedule, QdrantIndex
from keras_mrl_serving.projection import principal_directions

K = 10
BATCH = 50  # rows of an upsert
PAUSE_S = 0.02  # after each
ROUNDS = 4  # over the queries, while rows are upserted


class Gallery:
    """Rows by id, and how many are in the index.

    Args:
        rows: Of unit length, `(ids, width)`.
        count: How many are there at first.
    """

    def __init__(self, rows: npt.NDArray[np.float32], count: int) -> None:
        self.rows = rows
        self.count = count

    def upsert(self, index: QdrantIndex, until: threading.Event) -> None:
        """Upsert batches until there are no new rows, or the event is set."""
        rng = np.random.default_rng(1)
        while not until.is_set() and self.count + BATCH // 2 <= len(self.rows):
            new = np.arange(self.count, self.count + BATCH // 2)
            ids = np.concatenate([new, rng.choice(self.count, BATCH // 2, replace=False)])
            index.add(self.rows[ids], ids)
            self.count += len(new)
            time.sleep(PAUSE_S)


def main() -> None:
    """Build, search, change and search, and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--embeddings", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=80_000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--shortlist", type=int, default=100)
    parser.add_argument("--ef", type=int, default=128, help="how hard the graph is searched")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = np.load(arguments.embeddings, mmap_mode="r")
    order = np.random.default_rng(0).permutation(len(rows))
    parts = np.split(order, np.cumsum([arguments.queries, 5000]))
    queries, others, all_rows = (np.array(rows[part], np.float32) for part in parts)
    turn = principal_directions(others).astype(np.float32).T
    queries, all_rows = (_unit(some @ turn) for some in (queries, all_rows))
    gallery = Gallery(all_rows, arguments.rows)
    schedule = FunnelSchedule((96, queries.shape[1]), (arguments.shortlist,), K)
    graph = {96: qdrant_edge.SearchParams(hnsw_ef=arguments.ef)}
    exact = {96: qdrant_edge.SearchParams(exact=True)}
    report: dict[str, Any] = {"rows": arguments.rows, "queries": arguments.queries}
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        index = QdrantIndex.build(
            folder, "pets", all_rows[: arguments.rows], schedule, params=graph
        )
        report["build_s"] = time.perf_counter() - start
        every_row = QdrantIndex.open(folder, "pets", params=exact)
        report["every_row"] = _judged(index, gallery, *_asked(every_row, queries, gallery))
        report["at_rest"] = _judged(index, gallery, *_asked(index, queries, gallery))
        is_over = threading.Event()
        writer = threading.Thread(target=gallery.upsert, args=(index, is_over))
        writer.start()
        asked = _asked(index, np.tile(queries, (ROUNDS, 1)), gallery)
        is_over.set()
        writer.join()
        report["while_upserting"] = _judged(index, gallery, *asked)
        report["afterwards"] = _judged(index, gallery, *_asked(index, queries, gallery))
        start = time.perf_counter()
        index.optimize()
        report["optimize_s"] = time.perf_counter() - start
        report["optimized"] = _judged(index, gallery, *_asked(index, queries, gallery))
        index.close()
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


Answers = list[tuple[Any, int, npt.NDArray[np.int64]]]  # a query, the rows there before, the ids


def _asked(index: QdrantIndex, queries: Any, gallery: Gallery) -> tuple[Answers, list[float]]:
    """Return the answers of queries asked one by one, and the seconds each took."""
    answers, seconds = [], []
    for query in queries:
        count = gallery.count
        start = time.perf_counter()
        ids = index.search(query[None]).ids[0]
        seconds.append(time.perf_counter() - start)
        answers.append((query, count, np.asarray(ids, np.int64)))
    return answers, seconds


def _judged(
    index: QdrantIndex, gallery: Gallery, answers: Answers, seconds: list[float]
) -> dict[str, float]:
    """Return the recall of the exact neighbours, the latencies, and what is in the graph."""
    hits = []
    for query, count, ids in answers:
        of_before = ids[ids < count]  # rows that came meanwhile push others out of the answer
        scores = gallery.rows[:count] @ query
        nearest = np.argpartition(-scores, K)[:K]
        nearest = nearest[np.argsort(-scores[nearest])][: max(1, len(of_before))]
        hits.append(np.isin(nearest, of_before).mean())
    info = index._collection._engine.info()  # type: ignore[attr-defined]
    return {
        "rows": info.points_count,
        "indexed_vectors": info.indexed_vectors_count,  # of all dims
        "recall": float(np.mean(hits)),
        "p50_ms": float(np.median(seconds) * 1e3),
        "p99_ms": float(np.quantile(seconds, 0.99) * 1e3),
    }


def _unit(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), np.float32)


if __name__ == "__main__":
    main()
