"""What a cascade over exits costs a server beside the work it does: ResNet50 with forced exits.

    python benchmarks/exits_overhead.py [--out FILE]

ResNet50 (1.3 billion multiply-adds at 128 pixels) has random weights, two exits and thresholds
that let a given share of the rows leave at each. The CPU of the server in `classify_adaptive` is
compared with that in `classify_256` of the same version, over gRPC: where no row leaves, it is what
the cuts cost; where rows leave, it should be the share of the work that is done.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from serving_load import served, shares

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, suggest_exits
from keras_mrl_export import export_saved_model, publish_policy
from keras_mrl_serving import CascadePolicy, Client, Options, Stage, stage_logits
from keras_mrl_serving.cascade.confidence import confidence_of

SIZE, CLASSES, DIMS, ROWS = 128, 100, (64, 256), 64
LEAVING = {  # of all rows, at the first exit and at the second
    "none": (0.0, 0.0),
    "half": (0.5, 0.25),
    "most": (0.75, 0.25),
    "all at the first": (1.0, 0.0),
}


def main() -> None:
    """Export, force exits, and ask a server."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--laps", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--calls", type=int, default=2, help="in a lap (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument("--only", nargs="*", choices=LEAVING, default=list(LEAVING))
    parser.add_argument("--out", type=Path, help="where to write the numbers, too")
    arguments = parser.parse_args()
    net = Net.make()
    facts: dict[str, Any] = {
        "multiply_adds_before_the_exits": net.places,
        "batch": arguments.batch,
        "laps": arguments.laps,
        "calls": arguments.calls,
    }
    with tempfile.TemporaryDirectory() as folder:
        version = export_saved_model(
            net.model,
            Path(folder) / "exported",
            net.rows[:16],
            policy=net.forced(*LEAVING["half"]),
            signatures=["classify_adaptive", f"classify_{DIMS[-1]}"],
            activation="softmax",
        )
        for name in arguments.only:
            policy = net.forced(*LEAVING[name])
            published = publish_policy(version, policy, sample=net.rows[:16])
            base_path = Path(folder) / name
            base_path.mkdir()
            published.rename(base_path / "1")
            facts[name] = asked(
                base_path, net.rows, arguments.batch, arguments.laps, arguments.calls
            )
            print(f"{name}: {facts[name]}", flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))


@dataclass(frozen=True)
class Net:
    """ResNet50 with two exits, and rows for which it gives different logits.

    Args:
        model: With random weights.
        places: Share of the backbone's multiply-adds before each exit.
        rows: Images.
        logits: Of all stages, for these.
    """

    model: MatryoshkaClassifier
    places: dict[str, float]
    rows: Any
    logits: dict[Any, Any]

    @classmethod
    def make(cls) -> Net:
        """Make it with fixed weights and rows."""
        keras.utils.set_random_seed(0)
        backbone = keras.applications.ResNet50(
            weights=None, include_top=False, input_shape=(SIZE, SIZE, 3)
        )
        places = suggest_exits(backbone, 2)
        head = MatryoshkaHead(CLASSES, dims=DIMS)
        # Without normalization, the features of random weights are too large for a softmax.
        exits = {name: pooled(name) for name in places}
        model = MatryoshkaClassifier(backbone, head, pooling=pooled("last"), exits=exits)
        coarse = np.random.default_rng(0).normal(size=(ROWS, 8, 8, 3))
        rows = np.repeat(np.repeat(coarse, SIZE // 8, 1), SIZE // 8, 2).astype("float32")
        logits = model.all_exits().predict(rows, batch_size=16, verbose=0)
        return cls(model, places, rows, stage_logits(logits, DIMS))

    def forced(self, *shares: float) -> CascadePolicy:
        """Return a policy by which these shares of the rows leave at the first exits."""
        stages, unsure = [], np.arange(ROWS)
        for name, share in zip(self.places, shares, strict=True):
            margins = confidence_of("margin", self.logits[name, DIMS[-1]][unsure], 1.0)
            leaving = round(share * ROWS)
            # At the ends: above every margin, or below.
            ordered = np.concatenate([[-1.0], np.sort(margins), [1.0]])
            at = len(unsure) - leaving
            threshold = 1.0 if not leaving else float(ordered[at : at + 2].mean())
            stages.append(Stage(DIMS[-1], threshold, exit=name))
            unsure = unsure[margins <= threshold]
        return CascadePolicy((*stages, Stage(DIMS[-1], None)), "margin")


def pooled(name: str) -> keras.Sequential:
    """Return an average over space, normalized, as wide as the widest dim."""
    layers = keras.layers
    parts = [
        layers.GlobalAveragePooling2D(),
        layers.LayerNormalization(),
        layers.Dense(DIMS[-1]),
    ]
    return keras.Sequential(parts, name=f"{name}_pooled")


def asked(base_path: Path, rows: Any, batch: int, laps: int, calls: int) -> dict[str, Any]:
    """Return the shares of time that `classify_adaptive` takes, and where rows left."""
    options = Options(timeout_s=300, max_in_flight=1)
    parts = [rows[first : first + batch] for first in range(0, len(rows), batch)][:calls]
    with (
        served(base_path) as server,
        Client(server.target, "m", options=options) as client,
    ):
        taken = shares(
            server,
            lambda call: client.classify_adaptive(parts[call % len(parts)]),
            lambda call: client.classify(parts[call % len(parts)], dim=DIMS[-1]),
            laps,
            calls,
        )
        answers = [client.classify_adaptive(part) for part in parts]
        names = client.describe().exit_names
    exits = [row.exit for answer in answers for row in answer]
    work = float(np.concatenate([answer.relative_cost for answer in answers]).mean())
    return {
        "left": {name: round(exits.count(name) / len(exits), 4) for name in names},
        "work": round(work, 4),
        "cpu": taken["cpu"],
        "cpu_minus_work": round(taken["cpu"] - work, 4),
        "wall": taken["wall"],
    }


if __name__ == "__main__":
    main()
