"""The funnel against FAISS's own indexes over whole vectors, measured in one run.

    python benchmarks/funnel.py [--embeddings FOLDER] [--n 200000] [--d 1024]

First, where `--embeddings` names a folder of `benchmarks/cifar_embeddings.py`, on embeddings of
real images. Then on synthetic vectors: 1,000 Gaussian centres and in-cluster noise of 0.7, both
scaled per coordinate by i**-0.6, unit length. Such data flatter prefixes (the first coordinates
carry most) and inverted lists (they are clusters) by construction.

The funnels are those the planner chooses on a sample of queries; what is shown was measured on
others. Every index answers the same queries, in turns, one query at a time and 100 at once; what
it holds in memory is read in a process of its own. `anon` is memory of the process's own, `mapped`
what it reads of files. FAISS has one thread for single queries and all cores for batches; so
have its parts in ours. The graphs and lists of the rivals are set in steps of a third or so; a
setting whose recall is below 0.9 is not timed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt
from rivals import Ids, Rival, Vectors, over_prefixes, rivals

from keras_mrl_serving import FaissIndex, FirstStage, open_index
from keras_mrl_serving.index import plan_funnel

K = 10
ROUNDS = 3
NEAR, NEAR_RECALL = 0.001, 0.005  # what counts as equal to the funnel's
LONGEST_S = 0.5  # of one index, one setting and one round
BATCH = 100
LEAST_RECALL = 0.9


@dataclass(frozen=True)
class Data:
    """Unit vectors and their labels: a gallery, queries, and a sample of others to plan on."""

    gallery: Vectors
    gallery_labels: npt.NDArray[Any]
    queries: Vectors
    query_labels: npt.NDArray[Any]
    sample: Vectors


def main() -> None:
    """Measure on real data, then on synthetic ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--embeddings", type=Path, help="folder of real embeddings (none)")
    parser.add_argument("--n", type=int, default=200_000, help="synthetic rows (%(default)s)")
    parser.add_argument("--d", type=int, default=1024, help="their width (%(default)s)")
    parser.add_argument("--target-recall", type=float, default=0.98, help="(%(default)s)")
    parser.add_argument("--only", help="rivals to compare with, with commas (all)")
    parser.add_argument("--ram", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ram:
        print(json.dumps(_ram(arguments.ram)))
        return
    only = arguments.only.split(",") if arguments.only else None
    found: dict[str, Any] = {}
    if arguments.embeddings:
        mrl, fixed = (_real(arguments.embeddings, name) for name in ("mrl", "ff"))
        print(f"\n# Real embeddings: {len(mrl.gallery):,} x {mrl.gallery.shape[1]}")
        found["real"] = _compare(mrl, arguments.target_recall, only, fixed)
    data = _synthetic(arguments.n, arguments.d)
    print(f"\n# Synthetic vectors: {arguments.n:,} x {arguments.d}")
    found |= _compare(data, arguments.target_recall, only, data)
    print(json.dumps(found))


def _compare(data: Data, target: float, only: list[str] | None, fixed: Data) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        contenders = [(rival, data) for rival in _ours("funnel", data, target, Path(folder))]
        ours = len(contenders)
        rotated = _principal(fixed)
        contenders += [(r, rotated) for r in _ours("PCA funnel", rotated, target, Path(folder))]
        lists = 2 ** round(np.log2(4 * np.sqrt(len(data.gallery))))
        contenders += [(r, data) for r in _plain(data, contenders[:ours])]
        for rival in rivals(data.gallery, lists, Path(folder), _timed, only):
            contenders.append((rival, data))
        truths = {id(part): _exact(part) for part in (data, rotated)}
        for rival, part in contenders:
            _judge(rival, part, truths[id(part)])
        for _ in range(ROUNDS):
            for rival, part in contenders:
                _time(rival, part)
        memory = {r.name: _measure_ram(r, part) for r, part in contenders if r.files != Path()}
        every = [rival for rival, _ in contenders]
        _show(every, memory)
        return _summary(every[:ours], every[ours:], memory)


def _ours(name: str, data: Data, target: float, folder: Path) -> list[Rival]:
    """Plan once, and build the chosen funnel and the fastest of every other kind of first stage."""
    width = data.gallery.shape[1]
    dims = (*(2**power for power in range(4, 31) if 2**power < width), width)
    lists = 2 ** round(np.log2(4 * np.sqrt(len(data.gallery))))
    kinds = [
        FirstStage("Flat", ""),
        FirstStage("HNSW32_SQ8", "efSearch=16"),
        FirstStage(f"IVF{lists},Flat", "nprobe=1"),
        FirstStage(f"IVF{lists},RaBitQ", "nprobe=1"),
    ]
    start = time.perf_counter()
    chosen = []
    for kind in kinds:  # one by one, so that the best of each is seen
        began = time.perf_counter()
        try:
            plan = plan_funnel(data.gallery, data.sample, target, dims=dims, first_stages=[kind])
        except ValueError as error:
            print(f"  {name}, {kind.factory}: {error}")
            continue
        print(f"  {name}, {kind.factory}: planned in {time.perf_counter() - began:.0f} s")
        print(plan.table(), flush=True)
        chosen.append(plan)
    planned_s = time.perf_counter() - start
    built = []
    for number, plan in enumerate(sorted(chosen, key=lambda plan: plan.choice.seconds)):
        path = folder / f"{name} {number}"
        began = time.perf_counter()
        FaissIndex.build(data.gallery, plan.schedule, first_stage=plan.first_stage, path=path)
        seconds = time.perf_counter() - began
        index = open_index(path)
        stages = " -> ".join(map(str, plan.schedule.dims))
        shown = f"{name} {plan.first_stage.factory} {stages} ({plan.schedule.shortlists})"
        searched = _our_search(index)
        settings = (plan.first_stage.settings,)
        rival = Rival(shown, settings, lambda _: None, searched, path, seconds)
        rival.plan, rival.planned_s = plan, planned_s
        built.append(rival)
    return built


def _plain(data: Data, ours: list[tuple[Rival, Data]]) -> list[Rival]:
    """Build what FAISS's own parts make of our plans of two stages."""
    plans = [rival.plan for rival, _ in ours if len(rival.plan.schedule.dims) == 2]
    return [over_prefixes(data.gallery, p.schedule, p.first_stage, _timed) for p in plans]


def _our_search(index: Any) -> Callable[[Vectors, int], Ids]:
    def search(queries: Vectors, k: int) -> Ids:
        ids: Ids = index.search(queries, k).ids
        return ids

    return search


def _judge(rival: Rival, data: Data, truth: Ids) -> None:
    for setting in rival.settings:
        rival.set_to(setting)
        found = rival.search(data.queries, K)
        hits = data.gallery_labels[found] == data.query_labels[:, None]
        recall = (found[:, :, None] == truth[:, None, :]).any(axis=1).mean()
        rival.points[setting] = {"recall": float(recall), "precision": float(hits.mean())}


def _time(rival: Rival, data: Data) -> None:
    for setting, point in rival.points.items():
        if point["recall"] < LEAST_RECALL:
            continue
        rival.set_to(setting)
        for key, size in (("one", 1), ("many", BATCH)):
            faiss.omp_set_num_threads(1 if size == 1 else os.cpu_count() or 1)
            rival.search(data.queries[:size], K)
            taken, rows = 0.0, 0
            for start in range(0, len(data.queries), size):
                some = data.queries[start : start + size]
                began = time.perf_counter()
                rival.search(some, K)
                taken += time.perf_counter() - began
                rows += len(some)
                if taken > LONGEST_S:
                    break
            point.setdefault(f"{key}_runs", []).append(rows / taken)
            point[f"{key}_qps"] = statistics.median(point[f"{key}_runs"])


def _summary(ours: list[Rival], others: list[Rival], memory: dict[str, Any]) -> dict[str, Any]:
    funnel = max(ours, key=_speed)
    point = _best(funnel)
    by_name = {rival.name: rival for rival in others}
    exact = _fastest(by_name["exact"])
    # As the comparison is defined: HNSW as precise; any other as precise, and finding as many.
    # None can be more precise than exact search but by luck, and none has to be.
    precision = min(point["precision"], exact["precision"])
    hnsw = _fastest(by_name["HNSW32"], precision=precision)
    as_good = {"precision": precision - NEAR, "recall": point["recall"] - NEAR_RECALL}
    equals = {
        name: _fastest(rival, **as_good)
        for name, rival in by_name.items()
        if not name.startswith("FAISS's own funnel")  # ours without Python: shown beside
    }
    plain = max((r for r in others if r.name.startswith("FAISS's own funnel")), key=_speed)
    rival = max(equals, key=lambda name: equals[name].get("one_qps", 0))
    beaten = equals[rival]
    reference = by_name["HNSW32"]
    return {
        "exact_qps": exact["one_qps"],
        "hnsw_full_qps": hnsw.get("one_qps"),
        "best_rival": rival,
        "best_rival_qps": beaten["one_qps"],
        "funnel": funnel.name,
        "funnel_qps": point["one_qps"],
        "funnel_over_exact": point["one_qps"] / exact["one_qps"],
        "funnel_over_hnsw": point["one_qps"] / hnsw["one_qps"] if hnsw else None,
        "funnel_over_best_rival": point["one_qps"] / beaten["one_qps"],
        "precision_exact": exact["precision"],
        "precision_hnsw": hnsw.get("precision"),
        "precision_funnel": point["precision"],
        "precision_best_rival": beaten["precision"],
        "recall_exact": exact["recall"],
        "recall_hnsw": hnsw.get("recall"),
        "recall_funnel": point["recall"],
        "recall_best_rival": beaten["recall"],
        "funnel_batch_qps": point["many_qps"],
        "hnsw_batch_qps": hnsw.get("many_qps"),
        "best_rival_batch_qps": beaten["many_qps"],
        "hnsw_full_ram_mib": memory["HNSW32"]["anon_mib"],
        "funnel_ram_mib": memory[funnel.name]["anon_mib"],
        "funnel_mapped_mib": memory[funnel.name]["mapped_mib"],
        "faiss_own_funnel": plain.name,
        "faiss_own_funnel_qps": _best(plain)["one_qps"],
        "hnsw_build_s": reference.build_s,
        "funnel_build_s": funnel.build_s,
        "funnel_plan_s": funnel.planned_s,
    }


def _best(rival: Rival) -> dict[str, Any]:
    return max(rival.points.values(), key=lambda point: point["recall"])


def _speed(rival: Rival) -> float:
    return float(_best(rival).get("one_qps", 0))


def _fastest(rival: Rival, precision: float = 0.0, recall: float = 0.0) -> dict[str, Any]:
    """The fastest setting that is as precise and finds as many; empty if none is."""
    enough = [
        point
        for point in rival.points.values()
        if point["precision"] >= precision and point["recall"] >= recall and "one_qps" in point
    ]
    return max(enough, key=lambda point: point["one_qps"], default={})


def _show(every: list[Rival], memory: dict[str, Any]) -> None:
    print("\n| index | setting | precision@10 | recall@10 | QPS, one | QPS, 100 at once |")
    print("|---|---|---|---|---|---|")
    for rival in every:
        for setting, point in rival.points.items():
            if "one_qps" not in point:
                continue
            print(
                f"| {rival.name} | {setting} | {point['precision']:.4f} | {point['recall']:.4f} "
                f"| {point['one_qps']:,.0f} | {point['many_qps']:,.0f} |"
            )
    print("\n| index | build s | anon MiB | mapped MiB | first 100 queries, cold, ms each | warm |")
    print("|---|---|---|---|---|---|")
    for rival in every:
        if rival.name not in memory:
            print(f"| {rival.name} | {rival.build_s:.1f} | | | | |")
            continue
        m = memory[rival.name]
        print(
            f"| {rival.name} | {rival.build_s:.1f} | {m['anon_mib']:.0f} | {m['mapped_mib']:.0f} "
            f"| {m['cold_ms']:.3f} | {m['warm_ms']:.3f} |"
        )
    print(flush=True)


def _measure_ram(rival: Rival, data: Data) -> dict[str, float]:
    np.save(rival.files.parent / "queries.npy", data.queries[:BATCH])
    for file in rival.files.iterdir() if rival.files.is_dir() else [rival.files]:
        with open(file, "rb") as opened:  # out of the page cache, so that it is read cold
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, __file__, "--ram", str(rival.files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def _ram(path: Path) -> dict[str, float]:
    queries = np.load(path.parent / "queries.npy")
    before = _memory()
    if path.is_dir():
        search = _our_search(open_index(path, verify=False))
    else:
        index = faiss.read_index(str(path))
        search = lambda some, k: index.search(some, k)[1]  # noqa: E731
    laps = []
    for _ in range(2):
        began = time.perf_counter()
        for start in range(len(queries)):
            search(queries[start : start + 1], K)
        laps.append(1e3 * (time.perf_counter() - began) / len(queries))
    anon, mapped = (b - a for a, b in zip(before, _memory(), strict=True))
    return {"anon_mib": anon, "mapped_mib": mapped, "cold_ms": laps[0], "warm_ms": laps[1]}


def _memory() -> tuple[float, float]:
    said = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    anon, mapped = (int(said[key].split()[0]) / 1024 for key in ("RssAnon", "RssFile"))
    return anon, mapped


def _exact(data: Data) -> Ids:
    return np.asarray(
        faiss.knn(data.queries, data.gallery, K, metric=faiss.METRIC_INNER_PRODUCT)[1]
    )


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _unit(vectors: npt.NDArray[Any]) -> Vectors:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def _synthetic(rows: int, width: int, centres: int = 1000, queries: int = 500) -> Data:
    rng = np.random.default_rng(0)
    scale = (np.arange(1, width + 1) ** -0.6).astype(np.float32)
    places = rng.standard_normal((centres, width), dtype=np.float32) * scale

    def draw(count: int) -> tuple[Vectors, npt.NDArray[Any]]:
        labels = rng.integers(0, centres, count)
        vectors = rng.standard_normal((count, width), dtype=np.float32)
        vectors *= np.float32(0.7) * scale
        vectors += places[labels]
        return _unit(vectors), labels

    gallery, asked, sample = draw(rows), draw(queries), draw(queries)
    return Data(*gallery, *asked, sample[0])


def _real(folder: Path, name: str, queries: int = 500) -> Data:
    gallery, asked = (
        _unit(np.load(folder / f"{name}_{part}.npy")) for part in ("gallery", "queries")
    )
    labels = [np.load(folder / f"{part}_labels.npy") for part in ("gallery", "queries")]
    order = np.random.default_rng(0).permutation(len(asked))
    first, others = order[:queries], order[queries : 2 * queries]
    return Data(gallery, labels[0], asked[first], labels[1][first], asked[others])


def _principal(data: Data) -> Data:
    """Turn vectors so that the first coordinates carry the most: PCA without moving the origin."""
    _, axes = np.linalg.eigh(data.gallery.T @ data.gallery)
    turn = np.ascontiguousarray(axes[:, ::-1], np.float32)
    gallery, queries, sample = (_unit(v @ turn) for v in (data.gallery, data.queries, data.sample))
    return Data(gallery, data.gallery_labels, queries, data.query_labels, sample)


if __name__ == "__main__":
    main()
