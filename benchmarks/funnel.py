"""The planned funnel against FAISS's own indexes, on embeddings of real texts.

    python benchmarks/funnel.py --embeddings E.npy --splits splits.npz --name minilm --work FOLDER
    python benchmarks/funnel.py --embeddings E.npy --splits splits.npz --name adapted --work FOLDER
        --adaptor DIR

`--splits` is what `benchmarks/adapt.py --splits` writes: which rows train projections, plan, judge
and are searched; no row is in two parts. With `--fresh` the queries that plan and judge are taken
from the rows that are in none, which nobody looked at while the planner was written. The planner is
asked for a recall@10 of 0.95 and of 0.98 on the queries that plan; the rivals are set on the same
queries, to the fastest setting whose recall less 1.64 standard errors reaches it. What is shown was
measured on the queries that judge.

Single queries are timed by the processor time of their one thread. Right after each lap of a rival
come laps of ours: how many times as fast ours are is the median of those pairs, which other work
on the machine slows alike. 100 queries at once are timed by the processor time of the process.

With `--adaptor` the gallery is projected by it, and rivals search the rows as they were: turning
them changes no cosine. `--svs` and `--hnswlib` name folders with Intel's library and with hnswlib;
nothing here depends on them. Graphs are built once and kept in `--work`. `--against` names reports
of this script, whose plans are rivals as well: is an adapted funnel faster than one over the rows
as they were, or over PCA's? The last line is one JSON object; `--out` is written after each rival.
"""

from __future__ import annotations

import argparse
import bisect
import functools
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import faiss
import numpy as np
import numpy.typing as npt
from memory import measured_memory
from rivals import (
    FACTORIES,
    Ids,
    Rival,
    hnswlib_rival,
    over_prefixes,
    rival_of,
    svs_rival,
)

from keras_mrl_serving import FaissIndex, FirstStage, FunnelSchedule, Projection, open_index
from keras_mrl_serving.index import Choice, Plan
from keras_mrl_serving.index.facts import IndexFacts
from keras_mrl_serving.index.faiss import wider_dims
from keras_mrl_serving.index.first_stage import lists_for
from keras_mrl_serving.index.plan import sure
from keras_mrl_serving.index.planner import Trials, choose_funnel
from keras_mrl_serving.index.shortlister import Shortlister
from keras_mrl_serving.projection import principal_directions

Vectors = npt.NDArray[np.float32]

K = 10
LAPS = 7
QUERIES_A_LAP = 200
BATCH = 100


class KeptTrials(Trials):
    """Trials that build every first stage once, whatever the target, the queries and the run."""

    kept: ClassVar[dict[tuple[int, str], Shortlister]] = {}
    files: ClassVar[str] = ""  # what the names of their files begin with
    skipped: ClassVar[str | None] = None  # what the factories of those have that are not tried

    def first(self, dim: int, spec: FirstStage) -> Shortlister | None:
        """Return a first stage, built now or before."""
        key = (dim, spec.factory)
        if self.skipped is not None and self.skipped in spec.factory:
            return None
        if key not in self.kept:
            path = Path(f"{self.files}-{dim}-{spec.factory.replace(',', '+')}.faiss")
            if path.exists():
                facts = IndexFacts(FunnelSchedule((dim,), (), K))
                self.kept[key] = Shortlister.read(path, spec, self.num_rows, facts)
            else:
                first = super().first(dim, spec)
                if first is None:
                    return None
                first.write(path)
                self.kept[key] = first
        return self.kept[key]

    def timed_again(self, choices: Sequence[Choice]) -> list[Choice]:
        """As ever, with what was built before."""
        self._firsts = dict(self.kept)
        return super().timed_again(choices)


@dataclass
class Data:
    """Unit vectors: a gallery, and disjoint queries that plan and that judge."""

    gallery: Vectors
    planning: Vectors
    judging: Vectors


@dataclass
class Measured:
    """What was measured of a setting of a rival.

    Args:
        setting: The setting.
        recall: On the queries that judge.
        seconds: Laps, per single query.
        ratios: Of each lap: its seconds by those of our lap beside it.
        many: Seconds per query of 100 at once.
    """

    setting: str
    recall: float
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    many: float = 0.0


def main() -> None:
    """Plan, tune, measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--embeddings", type=Path, required=True)
    parser.add_argument("--splits", type=Path, required=True)
    parser.add_argument("--name", required=True, help="of the set, in tables and files")
    parser.add_argument("--adaptor", type=Path, help="folder of `keras-mrl adapt`")
    parser.add_argument("--work", type=Path, required=True, help="folder of graphs that were built")
    parser.add_argument("--fresh", action="store_true", help="queries are rows of no part")
    parser.add_argument("--rows", type=int, help="of the gallery; needs a --work of its own (all)")
    parser.add_argument("--svs", type=Path, help="folder with Intel's library")
    parser.add_argument("--hnswlib", type=Path, help="folder with hnswlib")
    parser.add_argument("--dims", default="64,96,128", help="besides the width")
    parser.add_argument("--queries", type=int, default=1000, help="that plan")
    parser.add_argument("--targets", default="0.95,0.98", help="of recall@10 (%(default)s)")
    parser.add_argument("--kinds", help="first stages that the planner tries, with ; (its own)")
    parser.add_argument("--skip", help="text in names of first stages that are not tried (none)")
    parser.add_argument("--only", help="rivals, with ; between them (all)")
    parser.add_argument("--given", type=Path, help="an --out, whose plans are taken: none are made")
    parser.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="OUT[=DIR]",
        help="an --out over the same rows, projected by the --adaptor DIR: its plans are rivals",
    )
    parser.add_argument("--promise", type=int, default=0, help="splits of fresh queries")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    plain, data = _read(arguments)
    width = data.gallery.shape[1]
    dims = (*(dim for dim in map(int, arguments.dims.split(",")) if dim < width), width)
    began = time.process_time()
    kinds = None
    if arguments.kinds is not None:
        kinds = [FirstStage.least(factory) for factory in arguments.kinds.split(";")]
    targets = [float(target) for target in arguments.targets.split(",")]
    KeptTrials.files = str(arguments.work / f"{arguments.name}-first")
    KeptTrials.skipped = arguments.skip
    if arguments.given is None:
        plans = _plans(data, dims, kinds, targets)
    else:
        plans = list(map(Plan.from_json, json.loads(arguments.given.read_text())["plans"]))
    report: dict[str, Any] = {"name": arguments.name, "rows": len(data.gallery)}
    report |= {"plan_cpu_s": time.process_time() - began, "plans": [p.to_json() for p in plans]}
    with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
        leads = [_built(data, plan, Path(folder)) for plan in plans]
        report |= _compare(
            arguments, plain, data, plans, leads, lambda found: _write(arguments, report | found)
        )
        for given in arguments.against:
            report |= _against(given, plain, data, plans, leads)
    if arguments.promise:
        report["promise"] = _promise(data, plans, arguments.promise)
    _write(arguments, report)
    print(json.dumps(report))


def _write(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def _read(arguments: argparse.Namespace) -> tuple[Data, Data]:
    """Return the rows as they were, and as we search them."""
    part = np.load(arguments.splits)["part"]
    rows = np.load(arguments.embeddings, mmap_mode="r")

    def unit(chosen: npt.NDArray[np.bool_]) -> Vectors:
        vectors = np.asarray(rows[chosen], np.float32)
        return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)

    if arguments.fresh:  # every third row of those that no part has plans, and the next one judges
        rest = np.flatnonzero(part == 0)
        part[part <= 3] = 0
        part[rest[0::3]], part[rest[1::3]] = 2, 3
    plain = Data(
        unit(part >= 4)[: arguments.rows], unit(part == 2)[: arguments.queries], unit(part == 3)
    )
    return plain, _turned(plain, arguments.adaptor)


def _turned(plain: Data, adaptor: Path | None) -> Data:
    """Return the rows, projected where there is an adaptor."""
    if adaptor is None:
        return plain
    projection = Projection.load(adaptor)
    turned = (plain.gallery, plain.planning, plain.judging)
    return Data(*(projection.transform(vectors) for vectors in turned))


def _plans(
    data: Data,
    dims: Sequence[int],
    kinds: Sequence[FirstStage] | None,
    targets: Sequence[float],
) -> list[Plan]:
    def says(line: str) -> None:
        print(f"  {line}", file=sys.stderr, flush=True)

    facts = (dims[-1], K, "cosine", None, None, 1, says)
    trials = KeptTrials(data.gallery, data.planning, *facts)
    plans = [choose_funnel(trials, target, dims, kinds) for target in targets]
    for plan in plans:
        print(plan.table(), flush=True)
    return plans


def _built(data: Data, plan: Plan, folder: Path) -> Rival:
    path, spec = folder / f"ours-{plan.target}", plan.first_stage
    if spec.factory.startswith("Projected") and spec.projection is None:  # a plan that was read
        step = max(1, len(data.gallery) // 10_000)  # as the planner
        components = principal_directions(data.gallery[::step][:10_000])
        spec = replace(spec, projection=Projection(components, (data.gallery.shape[1],)))
    began = time.process_time()
    FaissIndex.build(data.gallery, plan.schedule, first_stage=spec, path=path)
    seconds = time.process_time() - began
    index = open_index(path, verify=False)
    name = plan.choice.line().split(" us  ")[1]

    def search(queries: Vectors, k: int) -> Ids:
        return np.asarray(index.search(queries, k).ids, np.int64)

    return Rival(f"ours: {name}", (("",),), lambda _: None, search, path, seconds, plan)


def _compare(
    arguments: argparse.Namespace,
    plain: Data,
    data: Data,
    plans: Sequence[Plan],
    leads: Sequence[Rival],
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    planned_truth, truth = (_exact(plain, q) for q in (plain.planning, plain.judging))
    targets = [plan.target for plan in plans]
    report: dict[str, Any] = {"ours": [], "rivals": {}, "memory": {}}
    for plan, lead in zip(plans, leads, strict=True):
        recall = _recall(lead.search(data.judging, K), truth)
        memory = measured_memory(lead.files, data.judging)
        own = over_prefixes(lead.files, plan.schedule, plan.first_stage)
        measured = Measured("", recall)
        same = _same(lead, own, data)
        for _ in range(2 * LAPS):
            _lap(measured, own, data.judging, lead, data.judging)
        point = {
            "target": plan.target,
            "funnel": lead.name,
            "planned_us": 1e6 * plan.choice.seconds,
            "recall": recall,
            "us": 1e6 * statistics.median(s / r for s, r in _pairs(measured)),
            "many_us": 1e6 * _many(lead, data.judging),
            "over_faiss_own": statistics.median(measured.ratios),
            "same_ids": same,
            "faiss_own_many_us": 1e6 * _many(own, data.judging),
            "build_cpu_s": lead.build_s,
            **memory,
        }
        report["ours"].append(point)
        print(json.dumps(point), flush=True)
    for rival in _rivals(arguments, plain, plans):
        points = _tuned(rival, plain, planned_truth, targets)
        for target, setting in points.items():
            rival.set_to(setting)
            measured = Measured(setting, _recall(rival.search(plain.judging, K), truth))
            lead = leads[targets.index(target)]
            for _ in range(LAPS):
                _lap(measured, rival, plain.judging, lead, data.judging)
            measured.many = _many(rival, plain.judging)
            found = report["rivals"].setdefault(rival.name, {})
            found[str(target)] = {
                "setting": setting,
                "recall": measured.recall,
                "us": 1e6 * statistics.median(measured.seconds),
                "many_us": 1e6 * measured.many,
                "ours_times_as_fast": statistics.median(measured.ratios),
            }
            print(rival.name, target, json.dumps(found[str(target)]), flush=True)
        if rival.files != Path() and rival.files.is_file():
            report["memory"][rival.name] = measured_memory(rival.files, plain.judging)
        rival.let_go()
        save(report | _summary(report))
    return report | _summary(report)


def _against(
    given: str, plain: Data, data: Data, plans: Sequence[Plan], leads: Sequence[Rival]
) -> dict[str, float]:
    """Return how many times as fast each of our plans is as that of another report."""
    file, _, adaptor = given.partition("=")
    report = json.loads(Path(file).read_text())
    turned = _turned(plain, Path(adaptor) if adaptor else None)
    truth = _exact(plain, plain.judging)
    found = {}
    for plan, lead, other in zip(plans, leads, map(Plan.from_json, report["plans"]), strict=True):
        with tempfile.TemporaryDirectory() as folder:
            rival = _built(turned, other, Path(folder))
            measured = Measured("", _recall(rival.search(turned.judging, K), truth))
            for _ in range(LAPS):
                _lap(measured, rival, turned.judging, lead, data.judging)
        name = f"{report['name']}_{round(100 * plan.target)}"
        found[f"over_{name}"] = statistics.median(measured.ratios)
        found[f"recall_of_{name}"] = measured.recall
        print(rival.name, json.dumps(found), flush=True)
    return found


def _rivals(arguments: argparse.Namespace, plain: Data, plans: Sequence[Plan]) -> Iterator[Rival]:
    """Build the rivals, each when the one before it may be dropped."""
    chosen = None if arguments.only is None else set(arguments.only.split(";"))
    width = plain.gallery.shape[1]
    cuts = sorted({_first_width(plan) for plan in plans} - {width}) or [96]
    # Turned rows have the same cosines, so both sets share what was built of the rows as they were.
    shared = "minilm" if arguments.adaptor else arguments.name
    for name, (factory, effort) in FACTORIES.items():
        if chosen is None or name in chosen:
            sizes = {"lists": lists_for(len(plain.gallery)), "width": width, "half": width // 2}
            for cut in cuts if "{cut}" in name else cuts[:1]:
                text = factory.format(**sizes, cut=cut, half_cut=cut // 2)
                path = arguments.work / f"{shared}-{text.replace(',', '+')}.faiss"
                label = name.format(cut=cut, width=width)
                try:
                    yield rival_of(label, text, effort, plain.gallery, path)
                except RuntimeError as error:
                    print(f"  {label}: {str(error)[-120:]}", flush=True)
    if arguments.hnswlib is not None and (chosen is None or "hnswlib" in chosen):
        yield hnswlib_rival(arguments.hnswlib, plain.gallery)
    if arguments.svs is not None and (chosen is None or "SVS" in chosen):
        yield svs_rival(arguments.svs, plain.gallery)


def _first_width(plan: Plan) -> int:
    """Return how many coordinates a first stage looks at, of the rows or of a projection."""
    projected = re.match(r"(?:Projected|OPQ[0-9]+_)([0-9]+),", plan.first_stage.factory)
    return plan.schedule.dims[0] if projected is None else int(projected[1])


def _tuned(rival: Rival, data: Data, truth: Ids, targets: Sequence[float]) -> dict[float, str]:
    """Return the fastest setting that surely reaches each target, as a plan's must."""
    best: dict[float, tuple[float, str]] = {}

    @functools.cache
    def surely(setting: str) -> float:
        rival.set_to(setting)
        hits = _hits(rival.search(data.planning, K), truth)
        return sure(float(hits.mean()), float(hits.std(ddof=1)) / len(hits) ** 0.5)

    @functools.cache
    def seconds(setting: str) -> float:
        rival.set_to(setting)
        return min(_seconds(rival, data.planning, start) for start in (0, 200))

    for group in rival.settings:
        for target in targets:
            first = bisect.bisect_left(group, target, key=surely)  # recall grows with effort
            if first < len(group):
                found = (seconds(group[first]), group[first])
                best[target] = min(best.get(target, (np.inf, "")), found)
    return {target: setting for target, (_, setting) in best.items()}


def _lap(measured: Measured, rival: Rival, asked: Vectors, lead: Rival, turned: Vectors) -> None:
    start = len(measured.seconds) * QUERIES_A_LAP % (len(asked) - QUERIES_A_LAP)
    ours = _seconds(lead, turned, start)
    seconds = _seconds(rival, asked, start)
    ours = (ours + _seconds(lead, turned, start)) / 2
    measured.seconds.append(seconds)
    measured.ratios.append(seconds / ours)


def _pairs(measured: Measured) -> Iterator[tuple[float, float]]:
    return zip(measured.seconds, measured.ratios, strict=True)


def _seconds(rival: Rival, queries: Vectors, start: int) -> float:
    faiss.omp_set_num_threads(1)
    search: Callable[[Vectors, int], Ids] = rival.search
    search(queries[:1], K)
    began = time.thread_time()
    for row in range(start, start + QUERIES_A_LAP):
        search(queries[row : row + 1], K)
    return (time.thread_time() - began) / QUERIES_A_LAP


def _many(rival: Rival, queries: Vectors) -> float:
    faiss.omp_set_num_threads(1)
    laps = []
    for start in range(0, 5 * BATCH, BATCH):
        began = time.process_time()
        rival.search(queries[start : start + BATCH], K)
        laps.append((time.process_time() - began) / BATCH)
    return statistics.median(laps)


def _same(lead: Rival, own: Rival, data: Data) -> float:
    """Return the share of single queries whose ids FAISS's own funnel returns as well."""
    queries = data.judging[:500]
    rows = [queries[row : row + 1] for row in range(len(queries))]
    return float(np.mean([np.array_equal(lead.search(q, K), own.search(q, K)) for q in rows]))


def _exact(data: Data, queries: Vectors) -> Ids:
    found: Ids = faiss.knn(queries, data.gallery, K, metric=faiss.METRIC_INNER_PRODUCT)[1]
    return found


def _hits(found: Ids, truth: Ids) -> npt.NDArray[np.float64]:
    return np.asarray((found[:, :, None] == truth[:, None, :]).any(axis=1).mean(axis=1))


def _recall(found: Ids, truth: Ids) -> float:
    return float(_hits(found, truth).mean())


def _promise(data: Data, plans: Sequence[Plan], splits: int) -> dict[str, Any]:
    """Return in how many splits of fresh queries a plan keeps what it promised.

    Each split draws 1,000 queries to plan on, and measures the plan on the others. The planner
    chooses among the settings and shortlists of the first stage that was planned.
    """
    queries = np.concatenate([data.planning, data.judging])
    spec, dims = plans[0].first_stage, tuple(dict.fromkeys(plans[0].schedule.dims))
    target, width = plans[0].target, data.gallery.shape[1]
    recalls = []
    for split in range(splits):
        order = np.random.default_rng(split).permutation(len(queries))
        mine, others = queries[order[:1000]], queries[order[1000:]]
        facts = (width, K, "cosine", None, None, 1, lambda _: None)
        trials = KeptTrials(data.gallery, mine, *facts)
        found = choose_funnel(trials, target, dims, [replace(spec, settings=_least(spec))])
        first = trials.kept[found.schedule.dims[0], found.first_stage.factory]
        first.set(found.first_stage.settings)
        facts_of = IndexFacts(found.schedule)
        stages = {dim: facts_of.prefix(data.gallery, dim) for dim in wider_dims(found.schedule)}
        index = FaissIndex(facts_of, np.arange(len(data.gallery)), first, stages)
        recalls.append(_recall(np.asarray(index.search(others).ids), _exact(data, others)))
    within = 0.005  # a standard error of 1,000 queries that plan
    return {
        "splits": splits,
        "kept": sum(recall >= target for recall in recalls),
        "kept_within_0.005": sum(recall >= target - within for recall in recalls),
        "least": min(recalls),
    }


def _least(spec: FirstStage) -> str:
    return FirstStage.least(spec.factory).settings


def _summary(report: dict[str, Any]) -> dict[str, Any]:
    """Return how many times as fast ours are as the best of each kind of rival."""
    by_name = report["rivals"]

    def least(target: float, wanted: Callable[[str], bool]) -> float | None:
        ratios = [
            points[str(target)]["ours_times_as_fast"]
            for name, points in by_name.items()
            if wanted(name) and str(target) in points
        ]
        return min(ratios, default=None)

    found: dict[str, Any] = {
        "over_faiss_own": min(point["over_faiss_own"] for point in report["ours"])
    }
    kinds: dict[str, Callable[[str], bool]] = {
        "over_best_faiss": lambda name: name != "SVS",
        "over_faiss_pca": lambda name: "PCA" in name or "OPQ" in name,
        "over_hnsw": lambda name: name == "HNSW32",
        "over_svs": lambda name: name == "SVS",
    }
    for kind, wanted in kinds.items():
        for target in (0.95, 0.98):
            found[f"{kind}_{round(100 * target)}"] = least(target, wanted)
    hnsw = report["memory"].get("HNSW32")
    if hnsw is not None:
        ours = report["ours"][0]
        found["ram_over_hnsw"] = ours["anon_mib"] / hnsw["anon_mib"]
        both = [m["anon_mib"] + m["resident_mib"] for m in (ours, hnsw)]
        found["resident_over_hnsw"] = both[0] / both[1]
    return found


if __name__ == "__main__":
    main()
