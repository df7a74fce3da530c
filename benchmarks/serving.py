"""What dims, cascades, batches and signatures cost and save over gRPC, measured in one run.

    python benchmarks/serving.py [--quick]

Every server is the development server in a process of its own, on loopback; what is compared is
asked in turns, so that what else the machine does falls on both. Times are medians in milliseconds.

- `embed_<m>` by dim, and mixed dims under load: each caller its own `embed_<m>`, or all of them
  `embed_<d>` and cut by the client, with and without batching.
- `classify_adaptive` against `classify_<d>` and against a cascade that the client drives over
  `features` and `head_<m>`: heads of 1,000 and 100,000 classes on class prototypes
  (`benchmarks/prototypes.py`), alone and behind a ResNet-50. The net is not trained and sees noise;
  the rows come beside it and are added to what it says, times nothing much.
- 32 callers of one row each, with batching and without, on weights that no cache holds.
- Memory, loading and warming up of all signatures against `serving_default` alone.

The last line is one JSON object. Targets: `adaptive_over_full_100k` 0.7 at an expected dim of at
most 64, `server_overhead_ms` 1, `batching_speedup` 2, `all_signatures_over_one_memory` 2.5.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ["KERAS_BACKEND"] = "tensorflow"

from prototypes import DIMS, Prototypes
from serving_load import MAX_ROWS, Times, echo, in_turns, per_second, served
from serving_models import behind_resnet, export, heavy_layers, prototype_head, resnet_encoder

from keras_mrl_serving import Client, truncate

BATCHES = (1, 64)
MODEL = "m"


def main() -> None:
    """Measure everything, one part after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few classes and calls: does it run?")
    quick = parser.parse_args().quick
    facts: dict[str, Any] = {"cpus": os.cpu_count(), "quick": quick}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        classes = (50, 100) if quick else (1_000, 100_000)
        rows = 200 if quick else 4_000
        for count in classes:
            facts |= cascades(folder / f"head_{count}", count, rows, quick)
        facts |= embeddings(folder, quick)
        facts |= batching(folder, quick)
        facts |= behind(folder, classes, rows, quick)
        facts |= signatures(folder)
    largest = classes[-1]
    facts["adaptive_over_full_100k"] = facts[f"adaptive_{largest}_64_over_full"]
    facts["adaptive_ms"], facts["full_ms"] = (
        facts[f"adaptive_{largest}_64_ms"],
        facts[f"full_{largest}_64_ms"],
    )
    print(json.dumps(facts))


def cascades(folder: Path, classes: int, rows: int, quick: bool) -> dict[str, Any]:
    """A head alone: the model's input is its features."""
    data = Prototypes.of(classes)
    policy = data.policy(rows, seed=1)
    report = data.report(policy, rows, seed=2)
    at = dict(zip(policy.dims, report.exit_fractions, strict=True))
    exits = ", ".join(f"{dim}: {share:.1%}" for dim, share in at.items())
    print(
        f"\n{classes} classes: accuracy {report.accuracy:.2%} adaptive, "
        f"{report.full_accuracy:.2%} at {DIMS[-1]} ({rows} rows); exits {exits}"
    )
    asked = 1 - np.cumsum([0, *report.exit_fractions[:-1]])  # share of rows, at each stage
    facts: dict[str, Any] = {
        f"accuracy_{classes}": round(report.accuracy, 4),
        f"full_accuracy_{classes}": round(report.full_accuracy, 4),
        f"expected_dim_{classes}": round(report.expected_dim, 1),
        f"exits_{classes}": {dim: round(share, 3) for dim, share in at.items()},
        "head_madds_adaptive": round(float(asked @ np.array(policy.dims)) * classes),
        "head_madds_full": DIMS[-1] * classes,
    }
    export(prototype_head(data), folder, data.rows(16, 3)[0], policy=policy)
    with served(folder) as server, Client(server.target, MODEL) as client:
        x = data.rows(64 * 8, seed=4)[0]
        calls = 4 if quick else (15 if classes > 10_000 else 60)
        for batch in BATCHES:
            parts = [x[i : i + batch] for i in range(0, len(x), batch)]
            adaptive, full, driven = three_ways(client, parts, policy, calls)
            ratio = adaptive.ratio_to(full)
            print(
                f"  batch {batch}: classify_adaptive {adaptive.ms:.2f} ms, classify_{DIMS[-1]} "
                f"{full.ms:.2f} ms ({ratio:.2f}), driven by the client {driven.ms:.2f} ms"
            )
            facts |= {
                f"adaptive_{classes}_{batch}_ms": round(adaptive.ms, 3),
                f"full_{classes}_{batch}_ms": round(full.ms, 3),
                f"driven_{classes}_{batch}_ms": round(driven.ms, 3),
                f"adaptive_{classes}_{batch}_over_full": round(ratio, 3),
            }
    return facts


def three_ways(client: Client, parts: list[Any], policy: Any, calls: int) -> list[Times]:
    """The cascade in the graph, the full dim, and the cascade driven from here."""

    def part(turn: int) -> Any:
        return parts[turn % len(parts)]

    return in_turns(
        calls,
        lambda turn: client.classify_adaptive(part(turn)),
        lambda turn: client.classify(part(turn), dim=DIMS[-1]),
        lambda turn: client.classify_adaptive(part(turn), policy=policy),
    )


def embeddings(folder: Path, quick: bool) -> dict[str, Any]:
    """`embed_<m>` of a small net by dim, and callers who want different dims."""
    model, x = heavy_layers(width=512, layers=2)
    export(model, folder / "embed", x[:8], dims=DIMS)
    calls = 10 if quick else 300
    facts: dict[str, Any] = {}
    print("\nembed_<m>, ms at batch 1 and 64, and rows a second of 8 callers with 64 each")
    with served(folder / "embed") as server, Client(server.target, MODEL) as client:
        for batch in BATCHES:
            times = in_turns(calls, *(partial(embed, client, x[:batch], (dim,)) for dim in DIMS))
            for dim, time in zip(DIMS, times, strict=True):
                facts[f"embed_{dim}_{batch}_ms"] = round(time.ms, 3)
        for dim in DIMS:
            rate = 64 * per_second(8, calls, partial(embed, client, x, (dim,)))
            facts[f"embed_{dim}_rows_per_s"] = round(rate)
            print(
                f"  {dim:4d}: {facts[f'embed_{dim}_1_ms']:.2f}, {facts[f'embed_{dim}_64_ms']:.2f}, "
                f"{rate:.0f}"
            )
    facts["embed_small_ms"], facts["embed_full_ms"] = (
        facts[f"embed_{dim}_1_ms"] for dim in (DIMS[0], DIMS[-1])
    )
    facts |= overhead(folder / "embed", x[:1], calls)
    for enable in (False, True):
        with (
            served(folder / "embed", enable_batching=enable) as server,
            Client(server.target, MODEL) as client,
        ):
            own = per_second(16, calls, partial(embed, client, x[:4], DIMS))
            cut = per_second(16, calls, partial(embed_and_cut, client, x[:4]))
        name = "batched" if enable else "unbatched"
        facts |= {f"mixed_own_{name}_per_s": round(own), f"mixed_cut_{name}_per_s": round(cut)}
        print(f"  mixed dims, {name}: each its own {own:.0f} calls/s, cut by the client {cut:.0f}")
    return facts


def embed(client: Client, x: Any, dims: tuple[int, ...], turn: int) -> Any:
    """Ask for the dim whose turn it is."""
    return client.embed(x, dim=dims[turn % len(dims)])


def embed_and_cut(client: Client, x: Any, turn: int) -> Any:
    """Ask for all dims and cut."""
    return truncate(client.embed(x, dim=DIMS[-1]), DIMS[turn % len(DIMS)])


def overhead(folder: Path, x: Any, calls: int) -> dict[str, float]:
    """An RPC of one row, less `Session::Run` of it: in turns, the latter in this process."""
    from keras_mrl_serving._session import SavedModelSession

    with (
        served(folder) as server,
        Client(server.target, MODEL) as client,
        SavedModelSession(server.version) as session,
        echo() as bare,
    ):
        client.embed(x, dim=DIMS[-1])
        name = f"embed_{DIMS[-1]}"
        rpc, run, floor = in_turns(
            calls,
            lambda _: client.embed(x, dim=DIMS[-1]),
            lambda _: session.run(name, {"inputs": x}),
            lambda _: bare(x.tobytes()),
        )
    print(
        f"  one row: {rpc.ms:.2f} ms over gRPC, {run.ms:.2f} ms in Session::Run; a call that does "
        f"nothing, between two Python processes, takes {floor.ms:.2f} ms"
    )
    return {
        "server_overhead_ms": round(rpc.ms - run.ms, 3),
        "session_run_ms": round(run.ms, 3),
        "empty_rpc_ms": round(floor.ms, 3),
    }


def batching(folder: Path, quick: bool) -> dict[str, Any]:
    """32 callers of one row: weights are read once a call, or once a batch."""
    model, x = heavy_layers(width=256 if quick else 4096, layers=3)
    export(model, folder / "heavy", x[:8], signatures=["serving_default"])
    rates = {}
    for enable in (False, True):
        with (
            served(folder / "heavy", enable_batching=enable) as server,
            Client(server.target, MODEL) as client,
        ):
            rates[enable] = per_second(32, 64 if quick else 600, partial(predict, client, x[:1]))
    print(f"\n32 callers: {rates[False]:.0f} calls/s, batched {rates[True]:.0f}")
    return {
        "unbatched_per_s": round(rates[False], 1),
        "batched_per_s": round(rates[True], 1),
        "batching_speedup": round(rates[True] / rates[False], 2),
    }


def predict(client: Client, x: Any, turn: int) -> Any:
    """Ask the only signature there is."""
    del turn
    return client.predict(x)


def behind(folder: Path, classes: tuple[int, ...], rows: int, quick: bool) -> dict[str, Any]:
    """The same heads behind a ResNet-50."""
    facts: dict[str, Any] = {}
    for count in classes:
        data = Prototypes.of(count)
        model, image = behind_resnet(data, small=quick)
        policy = data.policy(rows, seed=1)
        x = data.rows(64, seed=4)[0]

        path = folder / f"resnet_{count}"
        export(
            *(model, path, images_and_rows(image, x[:2])),
            policy=policy,
            signatures=["classify_adaptive", f"classify_{DIMS[-1]}", "features"],
        )
        with served(path) as server, Client(server.target, MODEL, options=MAX_ROWS) as client:
            for batch in BATCHES:
                given = images_and_rows(image, x[:batch])
                calls = 3 if batch > 1 or quick else 15
                adaptive, full, backbone = with_backbone(client, given, calls)
                ratio = adaptive.ratio_to(full)
                print(
                    f"behind ResNet-50, {count} classes, batch {batch}: adaptive {adaptive.ms:.0f} "
                    f"ms, full {full.ms:.0f} ms ({ratio:.3f}), backbone {backbone.ms:.0f} ms"
                )
                facts[f"resnet_{count}_{batch}_adaptive_over_full"] = round(ratio, 3)
                facts["adaptive_over_full_e2e"] = round(ratio, 3)
                facts["backbone_ms"] = round(backbone.ms, 1)
    return facts


def images_and_rows(image: Any, rows: Any) -> dict[str, Any]:
    """The same image for every row."""
    return {"code": rows, "image": np.repeat(image, len(rows), axis=0)}


def with_backbone(client: Client, given: dict[str, Any], calls: int) -> list[Times]:
    """The cascade, the full dim, and the features alone."""
    return in_turns(
        calls,
        lambda _: client.classify_adaptive(given),
        lambda _: client.classify(given, dim=DIMS[-1]),
        lambda _: client.predict(given, signature="features"),
    )


def signatures(folder: Path) -> dict[str, Any]:
    """All signatures of a ResNet-50 encoder, against `serving_default` alone."""
    model, x = resnet_encoder()
    seen = {}
    for name, chosen in (("all", None), ("one", [])):
        export(model, folder / f"signatures_{name}", x, dims=DIMS, signatures=chosen)
        with served(folder / f"signatures_{name}") as server:
            seen[name] = server
    facts = {"all_signatures_over_one_memory": round(seen["all"].mib / seen["one"].mib, 2)}
    for name, server in seen.items():
        print(f"{name} signatures: {server.mib:.0f} MiB, loaded and warm in {server.load_s:.1f} s")
        facts |= {f"{name}_mib": round(server.mib), f"{name}_load_s": round(server.load_s, 1)}
    return facts


if __name__ == "__main__":
    main()
