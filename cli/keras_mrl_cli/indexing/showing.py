"""What an index is, read from its folder; the work of `index show`."""

from __future__ import annotations

import argparse
from typing import Any

from keras_mrl_serving import FunnelSchedule
from keras_mrl_serving.index.base import IndexFacts
from keras_mrl_serving.index.plan import Plan
from keras_mrl_serving.index.storage import read

from ..asking.printing import print_json, printable
from .places import in_bytes
from .refusing import refusing


def show(arguments: argparse.Namespace) -> int:
    """Print what an index is, its files and its plan, after a look at every byte."""
    with refusing():
        index = read_index(arguments.index, verify=True)
    if arguments.json:
        print_json(**index, verified=True)
        return 0
    print_index(index)
    print(f"  made with    keras-mrl {index['made_with']}")
    for name, size in index["files"].items():
        print(f"  {'file':11}  {name}, {in_bytes(size)}")
    print("  digests      every file is as it was written")
    if index["plan"] is not None:
        _print_plan(index["plan"])
    return 0


def read_index(path: str, *, verify: bool) -> dict[str, Any]:
    """Return what an index is, as JSON.

    Raises:
        FileNotFoundError: If no index is there.
        DamagedIndexError: If it is not as it was written.
        ManifestError: If a later version of keras-mrl wrote it.
    """
    saved = read(path, verify=verify)
    facts = IndexFacts.from_json(saved.card)
    sizes = {place.name: place.stat().st_size for place in saved.files.values()}
    first = saved.files["first" if "first" in saved.files else "columns_0"]
    return {
        "index": path,
        "engine": saved.card["engine"],
        "rows": len(saved.array("ids")),
        **facts.to_json(),
        "first_stage": saved.card.get("first_stage"),
        "first_stage_bytes": sizes[first.name],
        "disk_bytes": sum(sizes.values()),
        "files": sizes,
        "made_with": saved.card["made_with"],
        "plan": saved.card.get("plan"),
    }


def print_index(index: dict[str, Any]) -> None:
    """Print what an index is."""
    size = in_bytes(index["first_stage_bytes"])
    stage = index["first_stage"]
    first = f"every row, in NumPy, {size} read by each search"
    if stage is not None:
        first = f"{stage['factory']} {stage['settings']}".rstrip() + f", {size} of memory"
    encoder = index["encoder_fingerprint"]
    print(
        f"{printable(index['index'])}: {index['rows']} rows, {index['engine']}, {index['metric']}"
    )
    print(f"  funnel       {_funnel(FunnelSchedule.from_json(index['schedule']))}")
    print(f"  first stage  {first}")
    print(f"  encoder      {'unknown, nobody checks' if encoder is None else printable(encoder)}")
    print(f"  on disk      {in_bytes(index['disk_bytes'])}")


def _funnel(schedule: FunnelSchedule) -> str:
    dims = " -> ".join(map(str, schedule.dims))
    shortlists = ", ".join(map(str, schedule.shortlists))
    stages = f"{dims}, shortlist {shortlists}" if shortlists else f"{dims} alone"
    return f"{stages}, k {schedule.k}"


def _print_plan(plan: dict[str, Any]) -> None:
    print(
        f"  planned for  {plan.get('measure', 'quality')} {plan['target']}: {plan['quality']:.4f} "
        f"with a standard error of {plan['error']:.4f}"
    )
    print(Plan.from_json(plan).table())
