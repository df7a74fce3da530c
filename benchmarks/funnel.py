"""The funnel against FAISS's own indexes over whole vectors, measured in one run.

    python benchmarks/funnel.py [--embeddings FOLDER] [--n 200000] [--d 1024]

First, where `--embeddings` names a folder of `benchmarks/cifar_embeddings.py`, on embeddings of
real images. Then on synthetic vectors: 1,000 Gaussian centres and in-cluster noise of 0.7, both
scaled per coordinate by i**-0.6, unit length. Such data flatter prefixes (the first coordinates
carry most) and inverted lists (they are clusters) by construction.

The funnels are those the planner chooses on a sample of queries; what is shown was measured on
others. Every index answers the same queries, one at a time and 100 at once. A rival is built, timed
in turns with our fastest funnel, and dropped before the next one, so that memory holds one of them.
What an index holds in memory is read in a process of its own: `anon` is memory of the process's
own, `mapped` what it reads of files. FAISS has one thread for single queries and all cores for
batches; so have its parts in ours. The graphs and lists of the rivals are set in steps of a third
or so; a setting whose recall is below 0.9 is not timed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from galleries import Data, Vectors, principal, real, synthetic
from memory import measured_memory
from rivals import Ids, Rival, over_prefixes, rivals

from keras_mrl_serving import FaissIndex, FirstStage, open_index
from keras_mrl_serving.index import plan_funnel
from keras_mrl_serving.index.first_stage import lists_for

K = 10
ROUNDS = 3
NEAR, NEAR_RECALL = 0.001, 0.005  # what counts as equal to the funnel's
LONGEST_S = 0.5  # of one index, one setting and one round
BATCH = 100
LEAST_RECALL = 0.9
KINDS = {
    "flat": ("Flat", ""),
    "graph": ("HNSW32_SQ8", "efSearch=16"),
    "lists": ("IVF{lists},Flat", "nprobe=1"),
    "rabitq": ("IVF{lists},RaBitQ", "nprobe=1"),
}


def main() -> None:
    """Measure on real data, then on synthetic ones."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--embeddings", type=Path, help="folder of real embeddings (none)")
    parser.add_argument(
        "--n", type=int, default=200_000, help="synthetic rows, 0: none (%(default)s)"
    )
    parser.add_argument("--d", type=int, default=1024, help="their width (%(default)s)")
    parser.add_argument("--target-recall", type=float, default=0.98, help="(%(default)s)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="our first stages (%(default)s)")
    parser.add_argument("--only", help="rivals besides exact and HNSW32, with commas (all)")
    arguments = parser.parse_args()
    only = None if arguments.only is None else {"exact", "HNSW32", *arguments.only.split(",")}
    kinds = arguments.kinds.split(",")
    found: dict[str, Any] = {}
    if arguments.embeddings:
        mrl, fixed = (real(arguments.embeddings, name) for name in ("mrl", "ff"))
        print(f"\n# Real embeddings: {len(mrl.gallery):,} x {mrl.gallery.shape[1]}")
        found["real"] = _compare(mrl, arguments.target_recall, kinds, only, principal(fixed))
        del mrl, fixed
    if arguments.n:
        # No PCA funnel: the axes of these data are their principal ones already.
        data = synthetic(arguments.n, arguments.d)
        print(f"\n# Synthetic vectors: {arguments.n:,} x {arguments.d}")
        found |= _compare(data, arguments.target_recall, kinds, only)
    print(json.dumps(found))


def _compare(
    data: Data, target: float, kinds: list[str], only: set[str] | None, turned: Data | None = None
) -> dict[str, Any]:
    memory: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        ours = _ours("funnel", data, target, kinds, Path(folder))
        fastest = ours[0]  # as the planner timed them
        _measure(ours, data, memory)
        others = []
        if turned is not None:
            others = _ours("PCA funnel", turned, target, kinds, Path(folder))
            _measure(others, turned, memory)
            for rival in others:
                rival.drop()
        for rival in ours[1:]:
            rival.drop()
        truth = _exact(data)
        for rival in chain(_plain(data, ours), rivals(data.gallery, Path(folder), _timed, only)):
            _judge(rival, data, truth)
            for _ in range(ROUNDS):
                _time(rival, data)
                _time(fastest, data)
            if rival.files != Path():
                memory[rival.name] = measured_memory(rival.files, data.queries)
            rival.drop()
            others.append(rival)
            print(f"  {rival.name}: built in {rival.build_s:.0f} s, measured", flush=True)
        _show([*ours, *others], memory)
        return _summary(fastest, others, memory)


def _measure(some: list[Rival], data: Data, memory: dict[str, dict[str, float]]) -> None:
    truth = _exact(data)
    for rival in some:
        _judge(rival, data, truth)
    for _ in range(ROUNDS):
        for rival in some:
            _time(rival, data)
    memory |= {rival.name: measured_memory(rival.files, data.queries) for rival in some}


def _ours(name: str, data: Data, target: float, kinds: list[str], folder: Path) -> list[Rival]:
    """Plan for each kind of first stage, and build what was chosen; the fastest comes first."""
    width = data.gallery.shape[1]
    dims = (*(2**power for power in range(4, 31) if 2**power < width), width)
    chosen = []
    for kind in kinds:  # one by one, so that the best of each is seen
        factory, settings = KINDS[kind]
        spec = FirstStage(factory.format(lists=lists_for(len(data.gallery))), settings)
        began = time.perf_counter()
        try:
            plan = plan_funnel(data.gallery, data.sample, target, dims=dims, first_stages=[spec])
        except ValueError as error:
            print(f"  {name}, {kind}: {error}")
            continue
        seconds = time.perf_counter() - began
        print(f"  {name}, {spec.factory}: planned in {seconds:.0f} s")
        print(plan.table(), flush=True)
        chosen.append((plan, seconds))
    built = []
    chosen.sort(key=lambda one: one[0].choice.seconds)
    for number, (plan, planned_s) in enumerate(chosen):
        path = folder / f"{name} {number}"
        began = time.perf_counter()
        FaissIndex.build(data.gallery, plan.schedule, first_stage=plan.first_stage, path=path)
        seconds = time.perf_counter() - began
        index = open_index(path)
        stages = " -> ".join(map(str, plan.schedule.dims))
        lists = ", ".join(map(str, plan.schedule.shortlists))
        shown = f"{name} {plan.first_stage.factory} {stages} ({lists})"
        setting, search = plan.first_stage.settings, _our_search(index)
        rival = Rival(shown, (setting,), lambda _: None, search, path, seconds, plan, planned_s)
        built.append(rival)
    return built


def _plain(data: Data, ours: list[Rival]) -> Iterator[Rival]:
    """Build what FAISS's own parts make of our plans of two stages."""
    for plan in [rival.plan for rival in ours if len(rival.plan.schedule.dims) == 2]:
        yield over_prefixes(data.gallery, plan.schedule, plan.first_stage, _timed)


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


def _summary(funnel: Rival, others: list[Rival], memory: dict[str, Any]) -> dict[str, Any]:
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
    plain = max(
        (r for r in others if r.name.startswith("FAISS's own funnel")), key=_speed, default=None
    )
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
        "faiss_own_funnel": plain and plain.name,
        "faiss_own_funnel_qps": plain and _best(plain)["one_qps"],
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


def _exact(data: Data) -> Ids:
    return np.asarray(
        faiss.knn(data.queries, data.gallery, K, metric=faiss.METRIC_INNER_PRODUCT)[1]
    )


def _timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
