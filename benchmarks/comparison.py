"""What a benchmark of searches found: its tables, and the summary of its last line."""

from __future__ import annotations

import statistics
from typing import Any

from rivals import Rival

NEAR, NEAR_RECALL = 0.001, 0.005  # what counts as equal to the funnel's


def summary(funnel: Rival, others: list[Rival], memory: dict[str, Any]) -> dict[str, Any]:
    """Return the funnel beside the others: what `benchmarks/funnel.py` prints last."""
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
        "funnel_over_exact": times(exact, funnel),
        "funnel_over_hnsw": times(hnsw, funnel),
        "funnel_over_best_rival": times(beaten, funnel),
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
        "faiss_own_funnel_qps": plain and _best(plain).get("one_qps"),
        "hnsw_build_s": reference.build_s,
        "funnel_build_s": funnel.build_s,
        "funnel_plan_s": funnel.planned_s,
    }


def times(point: dict[str, Any], funnel: Rival) -> float | None:
    """Return how many times as fast a funnel is as what was timed beside it; None: it was not."""
    ratios = point.get("ratios", {}).get(funnel.name)
    return statistics.median(ratios) if ratios else None


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


def show(every: list[Rival], leads: list[Rival], memory: dict[str, Any]) -> None:
    """Print the tables: every setting that was timed, and what every index takes."""
    print(
        "\n| index | setting | precision@10 | recall@10 | QPS, one | QPS, 100 at once |",
        *(f"{lead.name} over it |" for lead in leads),
    )
    print("|---" * (6 + len(leads)) + "|")
    for rival in every:
        for setting, point in rival.points.items():
            if "one_qps" not in point:
                continue
            over = (times(point, lead) for lead in leads)
            shown = " | ".join("" if x is None else f"{x:.2f}" for x in over)
            print(
                f"| {rival.name} | {setting} | {point['precision']:.4f} | {point['recall']:.4f} "
                f"| {point['one_qps']:,.0f} | {point['many_qps']:,.0f} | {shown} |"
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
