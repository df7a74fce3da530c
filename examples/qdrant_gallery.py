"""A gallery that changes, in Qdrant's own engine in this process, or on a server.

    pip install 'keras-mrl[qdrant-edge]'
    python examples/qdrant_gallery.py --folder galleries
    pip install 'keras-mrl[qdrant]'
    python examples/qdrant_gallery.py --url http://localhost:6333

Rows are drawn that only look like embeddings; `--embeddings` takes those of an `.npy` file.

What happens, and what to look at:

1. Most rows are uploaded with a string as their id and a payload: a named vector per stage, so that
   the funnel is one nested query inside the engine.
2. Rows come and go while queries are answered. Killed in between, the gallery opens whole.
3. Answers are compared with exact ones, and a filter by payload with what it lets through.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from keras_mrl_serving import ExactIndex, FunnelSchedule, QdrantIndex

COLOURS = ("red", "green", "blue")


def main() -> None:
    """Build, change, search, and say what was gained."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, help="of the gallery (a temporary one)")
    parser.add_argument("--url", help="of a Qdrant server instead")
    parser.add_argument("--embeddings", type=Path, help="rows of an .npy file (drawn)")
    parser.add_argument("--rows", type=int, default=3000)
    arguments = parser.parse_args()
    if arguments.url:
        from qdrant_client import QdrantClient

        run(arguments, QdrantClient(url=arguments.url))
    elif arguments.folder:
        run(arguments, arguments.folder)
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(arguments, folder)


def run(arguments: argparse.Namespace, place: Any) -> None:
    """Build a gallery in a place, change it and search it."""
    if arguments.embeddings:
        rows = np.load(arguments.embeddings, mmap_mode="r")[: arguments.rows].astype("float32")
    else:
        drawn = np.random.default_rng(0).normal(size=(arguments.rows, 64))
        rows = (drawn * np.geomspace(1, 0.05, 64)).astype("float32")
    rows, queries = rows[:-50], rows[-50:]
    width = rows.shape[1]
    names = [f"pet {number}" for number in range(len(rows))]
    payloads = [{"colour": COLOURS[number % 3]} for number in range(len(rows))]
    schedule = FunnelSchedule((min(32, width // 2), width), (100,), 10)
    half = len(rows) // 2
    index = QdrantIndex.build(
        place, "pets", rows[:half], schedule, names[:half], payloads=payloads[:half]
    )

    seconds = []
    for start in range(half, len(rows), 100):
        part = slice(start, start + 100)
        index.add(rows[part], names[part], payloads=payloads[part])
        index.remove(names[start - half : start - half + 10])
        started = time.perf_counter()
        index.search(queries[:1])
        seconds.append(time.perf_counter() - started)
    index.optimize()
    print(f"{len(index)} rows, after {len(rows) - half} came and some went")

    there = [row for row, payload in enumerate(index.payloads(names)) if payload is not None]
    exact = ExactIndex.build(
        rows[there], FunnelSchedule((width,), (), 10), [names[row] for row in there]
    )
    expected, result = exact.search(queries), index.search(queries)
    recall = np.mean([np.isin(*pair).mean() for pair in zip(expected.ids, result.ids, strict=True)])
    red = index.search(queries[:5], filter=index.prepare_filter(is_red(arguments.url)))
    colours = {payload["colour"] for payload in index.payloads(red.ids.ravel()) if payload}
    print(f"colours of answers that must be red: {sorted(colours)}")
    print(
        f"gained: rows come and go without a build, recall@10 {recall:.3f}, "
        f"{np.median(seconds) * 1e3:.2f} ms a query in between"
    )
    index.close()


def is_red(url: str | None) -> Any:
    """Return the engine's filter of red rows."""
    if url:
        from qdrant_client import models

        match: Any = models.MatchValue(value="red")
        return models.Filter(must=[models.FieldCondition(key="colour", match=match)])
    import qdrant_edge

    match = qdrant_edge.MatchValue("red")
    return qdrant_edge.Filter(must=[qdrant_edge.FieldCondition("colour", match=match)])


if __name__ == "__main__":
    main()
