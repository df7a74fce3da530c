"""What a filter costs that was prepared once, beside the same query without one.

    python benchmarks/filters.py --embeddings E.npy

`--embeddings` are the rows of an `.npy` file; 50,000 of them are the gallery, 300 others the
queries, 5,000 others give PCA. Filters leave random rows. Every figure is the CPU time of one
thread, the least of three laps that take turns. `prepared` is what making the filter costs, the
first query by it included, in batches of 100 queries without a filter.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from keras_mrl_serving import FaissIndex, FirstStage, FunnelSchedule
from keras_mrl_serving.projection import principal_directions

SHARES = (0.98, 0.5, 0.1)
STAGES = {
    "HNSW32": (FirstStage("HNSW32", "efSearch=64"), 40),
    "HNSW32_SQ8": (FirstStage("HNSW32_SQ8", "efSearch=64"), 40),
    "PQ48x4fs": (FirstStage("PQ48x4fs", ""), 100),
}


def main() -> None:
    """Build, filter, time, and print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--embeddings", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=300)
    arguments = parser.parse_args()
    import faiss

    faiss.omp_set_num_threads(1)
    rows = np.load(arguments.embeddings, mmap_mode="r")
    order = np.random.default_rng(0).permutation(len(rows))
    ends = np.cumsum([arguments.rows, arguments.queries, 5000])
    gallery, queries, others = (np.array(rows[np.sort(part)]) for part in np.split(order, ends)[:3])
    turn = principal_directions(others).astype(np.float32).T
    gallery, queries = gallery @ turn, queries @ turn
    unit = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    results = {name: measured(gallery, queries, unit, *stage) for name, stage in STAGES.items()}
    for name, result in results.items():
        print(f"{name}: {result['us']:.0f} us, recall@10 {result['recall']:.3f} without a filter")
        for share in SHARES:
            print(
                f"  {share:4.0%}  "
                + "  ".join(
                    f"{key} {value:.3f}" for key, value in result["filters"][str(share)].items()
                )
            )
    print(json.dumps({"rows": len(gallery), "stages": results}))


def measured(
    gallery: Any, queries: Any, unit: Any, first_stage: FirstStage, shortlist: int
) -> dict[str, Any]:
    """Return what queries cost and find, without a filter and by filters."""
    width = gallery.shape[1]
    schedule = FunnelSchedule((96, width), (shortlist,), 10)
    index = FaissIndex.build(gallery, schedule, first_stage=first_stage)
    filters: dict[str, Any] = {}
    prepared = {}
    for share in SHARES:
        rng = np.random.default_rng(int(share * 100))
        ids = rng.permutation(len(gallery))[: int(share * len(gallery))]

        def prepare(ids: Any = ids) -> Any:
            only = index.prepare_filter(ids)
            index.search(queries[:1], filter=only)
            return only

        prepared[str(share)], filters[str(share)] = min(
            (cpu_seconds(prepare) for _ in range(3)), key=lambda pair: pair[0]
        )
    searches: dict[Any, Any] = {None: None, **filters}
    seconds: dict[Any, float] = dict.fromkeys(searches, float("inf"))
    batch = float("inf")
    found: dict[Any, Any] = {}
    for _ in range(3):
        for name, only in searches.items():
            spent, found[name] = cpu_seconds(partial(one_by_one, index, queries, only))
            seconds[name] = min(seconds[name], spent / len(queries))
        batch = min(batch, cpu_seconds(lambda: index.search(queries[:100]))[0])
    return {
        "us": seconds[None] * 1e6,
        "recall": recall(found[None], queries, unit, None),
        "filters": {
            name: {
                "times": seconds[name] / seconds[None],
                "recall": recall(found[name], queries, unit, only.rows),
                "all_k": float((found[name] >= 0).all()),
                "prepared": prepared[name] / batch,
            }
            for name, only in filters.items()
        },
    }


def one_by_one(index: FaissIndex, queries: Any, only: Any) -> Any:
    """Return the ids of each query, asked alone."""
    return np.concatenate(
        [index.search(queries[row : row + 1], filter=only).ids for row in range(len(queries))]
    )


def recall(found: Any, queries: Any, unit: Any, rows: Any) -> float:
    """Return the share of the exact neighbours that were found."""
    allowed = np.arange(len(unit)) if rows is None else rows
    exact = allowed[np.argsort(-(queries @ unit[allowed].T), axis=1)[:, : found.shape[1]]]
    return float(np.mean([np.isin(*pair).mean() for pair in zip(exact, found, strict=True)]))


def cpu_seconds(act: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU time of this thread that a function takes, and what it returns."""
    start = time.thread_time()
    result = act()
    return time.thread_time() - start, result


if __name__ == "__main__":
    main()
