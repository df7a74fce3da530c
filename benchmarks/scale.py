"""What ten million to a billion rows would need, from constants measured here.

    python benchmarks/scale.py [--d 1024] [--sizes 50000,100000,200000,400000]

Over galleries of growing size, drawn as in `benchmarks/funnel.py`: the shortlist that exact
prefixes of 64 dims need for a recall@10 of 0.95, bytes per row of the first stages, the time of a
search and of building; and how fast the disk reads rows that are not in memory. Then the growth is
carried on to the sizes that were not measured. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from galleries import synthetic

from keras_mrl_serving import FaissIndex, FirstStage, FunnelSchedule
from keras_mrl_serving.index.first_stage import lists_for
from keras_mrl_serving.index.trials import Trials

DIM, K, RECALL = 64, 10, 0.95
FIRST = {
    "HNSW32_SQ8": ("HNSW32_SQ8", "efSearch=64"),
    "IVF,SQ8": ("IVF{lists},SQ8", "nprobe=16"),
    "IVF,RaBitQ": ("IVF{lists},RaBitQ", "nprobe=16"),
}
LARGE = (10**7, 10**8, 10**9)
READS = 4000


def main() -> None:
    """Measure, carry on, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d", type=int, default=1024, help="width (%(default)s)")
    parser.add_argument("--sizes", default="50000,100000,200000,400000", help="(%(default)s)")
    arguments = parser.parse_args()
    sizes = [int(size) for size in arguments.sizes.split(",")]
    data = synthetic(sizes[-1], arguments.d)
    measured = {size: _measured(data.gallery[:size], data.queries) for size in sizes}
    random_read_s, parallel_reads = _disk(4 * arguments.d)
    print(f"\nreading a row of {4 * arguments.d:,} bytes from disk: {1e6 * random_read_s:.0f} us ")
    print(f"one after another, {parallel_reads:,.0f} a second with 32 at once")
    shortlist = _growth({size: found["shortlist"] for size, found in measured.items()})
    print(f"shortlist of exact prefixes grows as rows**{shortlist[1]:.2f}\n")
    print(
        "| rows | shortlist | first stage | RAM GiB | disk GiB | CPU ms a query | QPS of a disk |"
    )
    print("|---|---|---|---|---|---|---|")
    table = []
    for rows in LARGE:
        size = _carried(shortlist, rows)
        for name in FIRST:
            row = {
                "rows": rows,
                "first_stage": name,
                "shortlist": math.ceil(size),
                "ram_gib": rows * measured[sizes[-1]][name]["bytes"] / 2**30,
                "disk_gib": rows * 4 * arguments.d / 2**30,
                "cpu_ms": 1e3
                * _carried(_growth({n: m[name]["seconds"] for n, m in measured.items()}), rows),
                "disk_qps": parallel_reads / size,
            }
            table.append(row)
            print(
                f"| {rows:.0e} | {row['shortlist']} | {name} | {row['ram_gib']:,.1f} "
                f"| {row['disk_gib']:,.0f} | {row['cpu_ms']:.2f} | {row['disk_qps']:,.0f} |"
            )
    print(
        json.dumps(
            {
                "measured": measured,
                "random_read_us": 1e6 * random_read_s,
                "parallel_reads_per_s": parallel_reads,
                "shortlist_exponent": shortlist[1],
                "carried": table,
            }
        )
    )


def _measured(gallery: Any, queries: Any) -> dict[str, Any]:
    rows, width = gallery.shape
    trials = Trials(gallery, queries, width, K, "cosine", None, None, 1, lambda _: None)
    enough = trials.shortest_shortlist(DIM, RECALL)
    shortlist = enough if enough is not None else 64 * K
    found: dict[str, Any] = {"shortlist": shortlist}
    for name, (factory, settings) in FIRST.items():
        spec = FirstStage(factory.format(lists=lists_for(rows)), settings)
        schedule = FunnelSchedule((DIM, width), (shortlist,), K)
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            index = FaissIndex.build(gallery, schedule, first_stage=spec, path=folder)
            built = time.perf_counter() - began
            size = next(Path(folder).glob("first-*")).stat().st_size
            for query in queries[:50]:
                index.search(query[None])
            laps = []
            for query in queries:
                began = time.perf_counter()
                index.search(query[None])
                laps.append(time.perf_counter() - began)
        seconds = statistics.median(laps)
        found[name] = {"bytes": size / rows, "seconds": seconds, "build_s": built}
        print(
            f"{rows:>9,} rows, {name:11s} shortlist {shortlist:3d}: {size / rows:5.0f} bytes "
            f"a row, {1e6 * seconds:5.0f} us a query, built in {built:5.1f} s",
            flush=True,
        )
    return found


def _growth(values: dict[int, float]) -> tuple[float, float]:
    """Fit a * rows**b by least squares of the logarithms; return a and b."""
    x, y = np.log(list(values)), np.log(list(values.values()))
    exponent, offset = np.polyfit(x, y, 1)
    return float(np.exp(offset)), float(exponent)


def _carried(fit: tuple[float, float], rows: int) -> float:
    return float(fit[0] * float(rows) ** fit[1])


def _disk(size: int) -> tuple[float, float]:
    """Return the seconds a random read takes, and how many are done a second with 32 at once."""
    rows = 2**28 // size
    with tempfile.NamedTemporaryFile() as file:
        file.write(os.urandom(rows * size))
        file.flush()
        os.fsync(file.fileno())
        places = [int(row) * size for row in np.random.default_rng(0).permutation(rows)[:READS]]

        def lap(workers: int) -> float:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            began = time.perf_counter()
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(lambda place: os.pread(file.fileno(), size, place), places))
            return time.perf_counter() - began

        return lap(1) / READS, READS / lap(32)


if __name__ == "__main__":
    main()
