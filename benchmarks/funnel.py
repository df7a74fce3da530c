"""The funnel against FAISS's own indexes over whole vectors, measured in one run.

    python benchmarks/funnel.py [--embeddings FOLDER] [--n 200000] [--d 1024]

First, where `--embeddings` names a folder of `benchmarks/cifar_embeddings.py`, on embeddings of
real images. Then on synthetic vectors: 1,000 Gaussian centres and in-cluster noise of 0.7, both
scaled per coordinate by i**-0.6, unit length. Such data flatter prefixes (the first coordinates
carry most) and inverted lists (they are clusters) by construction.

The funnels are those the planner chooses on a sample of queries, to find the exact neighbours and,
with `--target-precision`, neighbours of the query's label; what is shown was measured on others.
Every index answers the same queries, one at a time and 100 at once. A rival is built, timed and
dropped before the next one, so that memory holds one of them. Right after every setting of it our
fastest funnels are timed: how many times as fast they are is the median of those pairs, which other
work on the machine slows alike. Single queries are timed by the processor time of their one thread,
which is what a clock shows where nothing else runs; batches by the clock.
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
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np
from comparison import show, summary
from galleries import Data, Vectors, principal, real, synthetic
from memory import measured_memory
from rivals import Ids, Rival, over_prefixes, rivals

from keras_mrl_serving import FaissIndex, FirstStage, open_index
from keras_mrl_serving.index import plan_funnel
from keras_mrl_serving.index.first_stage import lists_for
from keras_mrl_serving.index.plan import precision_by_label

K = 10
ROUNDS = 3
LONGEST_S = 0.3  # of one index, one setting and one round
BATCH = 100
LEAST_RECALL = 0.9
KINDS = {
    "flat": ("Flat", ""),
    "graph": ("HNSW32_SQ8", "efSearch=16"),
    "lists": ("IVF{lists},SQ8", "nprobe=1"),
    "rabitq": ("IVF{lists},RaBitQ", "nprobe=1"),
}


class Goal(NamedTuple):
    """What funnels are planned for: a recall, or a precision by label."""

    name: str
    target: float
    is_precision: bool


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
    parser.add_argument(
        "--target-recall", type=float, default=0.98, help="0: do not plan for one (%(default)s)"
    )
    parser.add_argument(
        "--target-precision", type=float, default=0.0, help="0: do not plan by label (%(default)s)"
    )
    parser.add_argument("--kinds", default=",".join(KINDS), help="our first stages (%(default)s)")
    parser.add_argument("--only", help="rivals besides exact and HNSW32, with commas (all)")
    arguments = parser.parse_args()
    goals = [
        Goal("funnel by label", arguments.target_precision, True),
        Goal("funnel", arguments.target_recall, False),
    ]
    goals = [goal for goal in goals if goal.target]
    only = None if arguments.only is None else {"exact", "HNSW32", *arguments.only.split(",")}
    kinds = arguments.kinds.split(",")
    found: dict[str, Any] = {}
    if arguments.embeddings:
        mrl, fixed = (real(arguments.embeddings, name) for name in ("mrl", "ff"))
        print(f"\n# Real embeddings: {len(mrl.gallery):,} x {mrl.gallery.shape[1]}")
        found["real"] = _compare(mrl, goals, kinds, only, principal(fixed))
        del mrl, fixed
    if arguments.n:
        # No PCA funnel: the axes of these data are their principal ones already.
        data = synthetic(arguments.n, arguments.d)
        print(f"\n# Synthetic vectors: {arguments.n:,} x {arguments.d}")
        found |= _compare(data, goals, kinds, only)
    print(json.dumps(found))


def _compare(
    data: Data,
    goals: list[Goal],
    kinds: list[str],
    only: set[str] | None,
    turned: Data | None = None,
) -> dict[str, Any]:
    memory: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        by_goal = [_ours(data, goal, kinds, Path(folder)) for goal in goals]
        leads = [ours[0] for ours in by_goal]  # the fastest, as the planner timed them
        ours = list(chain(*by_goal))
        _measure(ours, data, memory)
        others = []
        if turned is not None:
            others = _ours(turned, goals[-1]._replace(name="PCA funnel"), kinds, Path(folder))
            _measure(others, turned, memory)
        for rival in [*ours, *others]:
            if rival not in leads:
                rival.drop()
        truth = _exact(data)
        for rival in chain(_plain(data, ours), rivals(data.gallery, Path(folder), _timed, only)):
            _judge(rival, data, truth)
            for _ in range(ROUNDS):
                _time(rival, data, leads)
            if rival.files != Path():
                memory[rival.name] = measured_memory(rival.files, data.queries)
            rival.drop()
            others.append(rival)
            print(f"  {rival.name}: built in {rival.build_s:.0f} s, measured", flush=True)
        show([*ours, *others], leads, memory)
        found = [summary(lead, others, memory) for lead in leads]
        return found[0] | ({"by_recall": found[1]} if len(found) > 1 else {})


def _measure(some: list[Rival], data: Data, memory: dict[str, dict[str, float]]) -> None:
    truth = _exact(data)
    for rival in some:
        _judge(rival, data, truth)
    for _ in range(ROUNDS):
        for rival in some:
            _time(rival, data)
    memory |= {rival.name: measured_memory(rival.files, data.queries) for rival in some}


def _ours(data: Data, goal: Goal, kinds: list[str], folder: Path) -> list[Rival]:
    """Plan for each kind of first stage, and build what was chosen; the fastest comes first."""
    width = data.gallery.shape[1]
    dims = (*(2**power for power in range(4, 31) if 2**power < width), width)
    name, measure = goal.name, None
    if goal.is_precision:
        measure = precision_by_label(data.gallery_labels, data.sample_labels)
    chosen = []
    for kind in kinds:  # one by one, so that the best of each is seen
        factory, settings = KINDS[kind]
        spec = FirstStage(factory.format(lists=lists_for(len(data.gallery))), settings)
        began = time.perf_counter()
        try:
            plan = plan_funnel(
                data.gallery,
                data.sample,
                goal.target,
                dims=dims,
                measure=measure,
                first_stages=[spec],
            )
        except ValueError as error:
            print(f"  {name}, {kind}: {error}")
            continue
        seconds = time.perf_counter() - began
        print(f"  {name}, {spec.factory}: planned in {seconds:.0f} s")
        print(plan.table(), flush=True)
        chosen.append((plan, seconds))
    if not chosen:
        raise SystemExit(f"No {name} reaches the target: nothing to compare.")
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


def _time(rival: Rival, data: Data, beside: Sequence[Rival] = ()) -> None:
    """Time every setting, and right after each the funnels it is compared with."""
    for setting, point in rival.points.items():
        if rival.plan is None and point["recall"] < LEAST_RECALL:
            continue
        rival.set_to(setting)
        for key, size in (("one", 1), ("many", BATCH)):
            point.setdefault(f"{key}_runs", []).append(_qps(rival, data, size))
            point[f"{key}_qps"] = statistics.median(point[f"{key}_runs"])
        for lead in beside:
            ratios = point.setdefault("ratios", {}).setdefault(lead.name, [])
            ratios.append(_qps(lead, data, 1) / point["one_runs"][-1])


def _qps(rival: Rival, data: Data, size: int) -> float:
    faiss.omp_set_num_threads(1 if size == 1 else os.cpu_count() or 1)
    clock = time.thread_time if size == 1 else time.perf_counter
    rival.search(data.queries[:size], K)
    taken, rows = 0.0, 0
    for start in range(0, len(data.queries), size):
        some = data.queries[start : start + size]
        began = clock()
        rival.search(some, K)
        taken += clock() - began
        rows += len(some)
        if taken > LONGEST_S:
            break
    return rows / taken


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
