"""What ten million to a billion rows would need, from constants measured here.

    python benchmarks/scale.py [--d 1024] [--sizes 50000,100000,200000,400000]

Over galleries of growing size, drawn as in `benchmarks/galleries.py`: the shortlist that exact
prefixes of 64 dims need for a recall@10 of 0.95, which is the rank among them that 95 of 100 true
neighbours do not exceed; bytes per row of the first stages, and the time of the fastest search by
each that finds as many; what comparing one prefix takes; and how fast the disk reads rows that are
not in memory. Then larger galleries are counted from these: the shortlist by the growth that was
seen, a graph's time as the logarithm of its rows, that of lists by the centroids and rows they
compare. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import faiss
import numpy as np
from galleries import synthetic

from keras_mrl_serving import FirstStage, FunnelSchedule
from keras_mrl_serving.index.facts import IndexFacts
from keras_mrl_serving.index.first_stage import lists_for
from keras_mrl_serving.index.plan import Choice
from keras_mrl_serving.index.planner import Trials
from keras_mrl_serving.index.shortlister import Shortlister

DIM, K, RECALL = 64, 10, 0.95
ID_BYTES = 8  # of an id in memory
MOST = 1000  # ranks among prefixes that are looked at
EFFORTS = (16, 32, 64, 128, 256)
SLACK = (1, 1.5, 2, 4, 8)  # times the shortlist of exact prefixes
FIRST = {
    "HNSW32_SQ8": ("HNSW32_SQ8", "efSearch"),
    "IVF,SQ8": ("IVF{lists},SQ8", "nprobe"),
    "IVF,RaBitQ": ("IVF{lists},RaBitQ", "nprobe"),
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
    table: list[dict[str, Any]] = []
    last = measured[sizes[-1]]
    for rows in LARGE:
        size = max(K, _carried(shortlist, rows, sizes[-1]))
        for name in FIRST:
            if "seconds" not in last[name]:
                continue
            row = {
                "rows": rows,
                "first_stage": name,
                "shortlist": math.ceil(size),
                "ram_gib": rows * (last[name]["bytes"] + ID_BYTES) / 2**30,
                "disk_gib": rows * 4 * arguments.d / 2**30,
                "cpu_ms": 1e3 * _seconds(last[name], sizes[-1], rows, last["scan_s"]),
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
    shortlist = _shortlist(queries, gallery)
    found: dict[str, Any] = {"shortlist": shortlist, "scan_s": _scan_s(gallery, queries)}
    trials = Trials(gallery, queries, width, K, "cosine", None, None, 1, lambda _: None)
    for name, (factory, effort) in FIRST.items():
        spec = FirstStage(factory.format(lists=lists_for(rows)))
        began = time.perf_counter()
        first = trials.first(DIM, spec)
        built = time.perf_counter() - began
        if first is None:
            continue
        with tempfile.NamedTemporaryFile() as file:
            first.write(file.name)
            size = os.stat(file.name).st_size / rows
        best = _fastest(trials, first, shortlist, effort)
        found[name] = {"bytes": size, "build_s": built}
        if best is not None:
            effort_found = int(best.first_stage.settings.partition("=")[2])
            found[name] |= {
                "seconds": best.seconds,
                "effort": effort_found,
                "lists": "IVF" in factory,
            }
        print(
            f"{rows:>9,} rows, shortlist {shortlist}: {name} of {size:.0f} bytes a row, built in "
            f"{built:.0f} s; {best.line() if best else 'none finds enough'}",
            flush=True,
        )
    return found


def _fastest(trials: Trials, first: Shortlister, shortlist: int, effort: str) -> Choice | None:
    """The fastest search that finds enough, of those with any shortlist and effort."""

    def measured(slack: float, value: int) -> Choice:
        harder = replace(first.spec, settings=f"{effort}={value}")
        return trials.measured(first, harder, trials.funnel(DIM, math.ceil(slack * shortlist)))

    enough = [measured(SLACK[-1], EFFORTS[-1])]
    if enough[0].quality < RECALL:
        return None
    for slack in SLACK:
        found = (measured(slack, value) for value in EFFORTS)
        enough += [next((choice for choice in found if choice.quality >= RECALL), enough[0])]
        if enough[-1].seconds > 1.5 * min(choice.seconds for choice in enough):
            break
    return min(enough, key=lambda choice: choice.seconds)


def _scan_s(gallery: Any, queries: Any) -> float:
    """Return what it takes to compare a query with one prefix, of many in a row."""
    facts = IndexFacts(FunnelSchedule((DIM,), (), 1))
    flat = faiss.IndexFlatIP(DIM)
    flat.add(facts.prefix(gallery, DIM))
    asked = facts.prefix(queries, DIM)
    laps = []
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    for query in asked[:100]:
        began = time.thread_time()
        flat.search(query[None], K)
        laps.append(time.thread_time() - began)
    faiss.omp_set_num_threads(threads)
    return float(np.median(laps)) / len(gallery)


def _seconds(found: dict[str, Any], measured: int, rows: int, scan_s: float) -> float:
    """Count the time of a search of more rows than were measured."""
    if not found["lists"]:
        return float(found["seconds"] * math.log(rows) / math.log(measured))
    compared = [lists_for(n) + found["effort"] * n / lists_for(n) for n in (measured, rows)]
    return float(found["seconds"] + (compared[1] - compared[0]) * scan_s)


def _nearest(queries: Any, gallery: Any, k: int) -> Any:
    return faiss.knn(queries, gallery, k, metric=faiss.METRIC_INNER_PRODUCT)[1]


def _shortlist(queries: Any, gallery: Any) -> int:
    truth = _nearest(queries, gallery, K)
    facts = IndexFacts(FunnelSchedule((DIM,), (), 1))
    order = _nearest(facts.prefix(queries, DIM), facts.prefix(gallery, DIM), MOST)
    is_it = order[:, None] == truth[:, :, None]
    ranks = np.where(is_it.any(axis=2), is_it.argmax(axis=2) + 1, MOST)
    return max(K, math.ceil(np.quantile(ranks, RECALL)))


def _growth(values: dict[int, float]) -> tuple[float, float]:
    """Fit a * rows**b by least squares of the logarithms; return a and b."""
    x, y = np.log(list(values)), np.log(list(values.values()))
    exponent, offset = np.polyfit(x, y, 1)
    return float(np.exp(offset)), float(exponent)


def _carried(fit: tuple[float, float], rows: int, measured: int) -> float:
    """Carry a growth on; what fell as rows were added is left at what it was."""
    return float(fit[0] * float(rows if fit[1] > 0 else measured) ** fit[1])


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
