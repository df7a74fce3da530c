"""Whether a certified cascade keeps its promise on the scores of a real net.

    python benchmarks/promise.py --compared FOLDER [--holdouts 1000] [--rows 1200] ...

`--compared` is a folder that `keras-mrl compare` or `benchmarks/paper.py` wrote. Its test images
are the population: the true risk of a policy is counted on all of them. Holdouts are drawn from
them with replacement, and a cascade is certified on each. Printed are the share of policies that
risk more than promised, beside delta, and what the policies save. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

from keras_mrl_serving import certify_cascade


def main() -> None:
    """Draw, certify, count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compared", type=Path, required=True, help="folder of a comparison")
    parser.add_argument("--holdouts", type=int, default=1000, help="(%(default)s)")
    parser.add_argument("--rows", type=int, default=1200, help="of a holdout (%(default)s)")
    parser.add_argument("--risk", type=float, default=0.03, help="promised (%(default)s)")
    parser.add_argument("--delta", type=float, default=0.1, help="promised (%(default)s)")
    arguments = parser.parse_args()
    dims = tuple(json.loads((arguments.compared / "plan.json").read_text())["plan"]["dims"])
    with np.load(arguments.compared / "splits.npz") as parts:
        labels = parts["test_labels"]
    logits = np.load(arguments.compared / "nets" / "mrl-0" / "test_logits.npy")
    full = logits[:, -1].argmax(-1) == labels
    promise = {"risk": arguments.risk, "delta": arguments.delta}
    risks, expected, accuracy = [], [], []
    started = time.monotonic()
    for seed in range(arguments.holdouts):
        rows = np.random.default_rng(seed).integers(0, len(labels), arguments.rows)
        policy = certify_cascade(logits[rows], labels[rows], dims, seed=seed, **promise)
        columns = logits[:, [dims.index(dim) for dim in policy.dims]]
        decided, _ = policy.route(columns)
        risks.append(float((full & (decided != labels)).mean()))
        report = policy.evaluate(columns, labels)
        expected.append(report.expected_dim)
        accuracy.append(report.accuracy)
        if (seed + 1) % 50 == 0:
            spent = time.monotonic() - started
            print(f"{seed + 1} holdouts, {spent:.0f} s", file=sys.stderr, flush=True)
    broken = int((np.array(risks) > arguments.risk).sum())
    results = {
        "holdouts": arguments.holdouts,
        "rows": arguments.rows,
        **promise,
        "population": len(labels),
        "broken": broken,
        "allowed": arguments.delta * arguments.holdouts,
        "mean_risk": float(np.mean(risks)),
        "full_dim": dims[-1],
        "expected_dim": float(np.mean(expected)),
        "accuracy": float(np.mean(accuracy)),
        "full_accuracy": float(full.mean()),
    }
    print(
        f"broken in {broken} of {arguments.holdouts}, {results['allowed']:.0f} allowed; mean risk "
        f"{results['mean_risk']:.4f} of {arguments.risk}; {results['expected_dim']:.1f} of "
        f"{dims[-1]} dims at {100 * results['accuracy']:.2f}% "
        f"against {100 * results['full_accuracy']:.2f}%"
    )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
