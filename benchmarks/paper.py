"""The paper's comparison on images: Matryoshka nets, separate nets, and what is cut from a net.

    python benchmarks/paper.py --data FOLDER --out FOLDER [--epochs 8] [--seeds 3] ...

Trains, one after the other and with one recipe, a Matryoshka net (untied, tied, and untied with
its first dim counted twice), a separate net per dim (FF), a slimmable net, and the first two once
more without a fifth of the classes. What SVD, PCA and the first coordinates give is computed from
the FF net of full width. A net that is trained already is not trained again, and one that was
interrupted goes on after its last whole epoch.

`--data` holds `train*.zip` and `test.zip`, images in one folder per class. Where the network
allows it, `keras.datasets.cifar100` gives the same images as CIFAR-100's. Writes `results.json`
and `results.md` to `--out`; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
from paper_tables import markdown

from keras_mrl.baselines import low_rank_head, principal_components
from keras_mrl.evaluation import score_embeddings
from keras_mrl_cli.comparing.images import Images, read, split_classes
from keras_mrl_cli.comparing.nets import Net, nets_for
from keras_mrl_cli.comparing.training import Recipe, is_trained, train
from keras_mrl_serving import CascadePolicy, certify_cascade, fit_temperatures, oracle_report
from keras_mrl_serving import search_cascades as search

DIMS = (8, 16, 32, 64, 128, 256)
SEEDED = (8, 32, 256)  # of the separate nets that are trained with every seed
SPLITS = 10  # of the test images: a fifth learns the thresholds, the rest judges

Parts = tuple[Images, Images]


def main() -> None:
    """Train what is missing, evaluate, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the zips")
    parser.add_argument("--out", type=Path, required=True, help="folder of nets and results")
    parser.add_argument("--epochs", type=int, default=8, help="of every net (%(default)s)")
    parser.add_argument("--filters", type=int, default=32, help="of the first layer (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    arguments = parser.parse_args()
    whole = (
        read([str(path) for path in sorted(arguments.data.glob("train*.zip"))], None),
        read([str(arguments.data / "test.zip")], None),
    )
    classes = np.random.default_rng(0).permutation(len(whole[0].names))
    unseen = sorted(classes[: len(classes) // 5].tolist())
    seen = (split_classes(whole[0], unseen)[0], split_classes(whole[1], unseen)[0])
    recipe = Recipe(arguments.epochs, arguments.filters, flip=True)
    nets = nets_for(DIMS, arguments.seeds, SEEDED, unseen=True)
    for net in nets:
        folder = arguments.out / "nets" / net.name
        if not is_trained(folder):
            train(net, folder, whole if net.all_classes else seen, recipe, _say)
    results: dict[str, Any] = {
        "epochs": arguments.epochs,
        "seeds": arguments.seeds,
        "images": [len(part.labels) for part in whole],
        "dims": list(DIMS),
        "minutes": {net.name: _minutes(arguments.out / "nets" / net.name) for net in nets},
        "top1": _linear(nets, arguments.out, whole[1].labels),
        "neighbors": _neighbors(arguments.out, whole),
        "unseen": _unseen(arguments.out, whole, unseen),
        "cascades": _cascades(arguments.out, whole[1].labels),
    }
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "results.md").write_text(markdown(results))
    print(json.dumps(results))


def _say(line: str) -> None:
    print(line, flush=True)


def _minutes(folder: Path) -> float:
    history = json.loads((folder / "net.json").read_text())["history"]
    return round(sum(epoch["seconds"] for epoch in history) / 60, 1)


def _linear(nets: tuple[Net, ...], out: Path, labels: Any) -> dict[str, dict[str, list[float]]]:
    """Accuracy by method and dim, one number per seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for net in nets:
        if net.all_classes:
            logits = np.load(out / "nets" / net.name / "test_logits.npy")
            for at, dim in enumerate(net.dims):
                right = float((logits[:, at].argmax(-1) == labels).mean())
                found.setdefault(net.method, {}).setdefault(str(dim), []).append(right)
    import keras

    folder = out / "nets" / f"ff_{DIMS[-1]}-0"
    kernel, bias = keras.saving.load_model(folder / "model.keras").head.weights_at(DIMS[-1])
    features = np.load(folder / f"test_{DIMS[-1]}.npy")
    for dim in DIMS:
        logits = low_rank_head(kernel, bias, dim).logits(features)
        found.setdefault("svd", {})[str(dim)] = [float((logits.argmax(-1) == labels).mean())]
    return found


def _features(out: Path, name: str, dim: int = DIMS[-1]) -> tuple[Any, Any]:
    """Features of the training and the test images the net may see."""
    folder = out / "nets" / name
    return np.load(folder / f"train_{dim}.npy"), np.load(folder / f"test_{dim}.npy")


def _neighbors(out: Path, parts: Parts) -> dict[str, Any]:
    """Measures of the neighbours of the test images among the training images, by method."""
    labels, wanted = parts[0].labels, parts[1].labels
    found: dict[str, Any] = {}
    wide = {name: _features(out, f"{name}-0") for name in ("mrl", "mrl_e", f"ff_{DIMS[-1]}")}
    names = {"mrl": "mrl", "mrl_e": "mrl_e", f"ff_{DIMS[-1]}": "first_coordinates"}
    for name, (gallery, queries) in wide.items():
        found[names[name]] = score_embeddings(queries, wanted, gallery, labels, DIMS)
    gallery, queries = wide[f"ff_{DIMS[-1]}"]
    pca = principal_components(gallery, DIMS[-1])
    found["pca"] = score_embeddings(pca.embed(queries), wanted, pca.embed(gallery), labels, DIMS)
    found["ff"] = {}
    for dim in DIMS:
        gallery, queries = _features(out, f"ff_{dim}-0", dim)
        found["ff"][dim] = score_embeddings(queries, wanted, gallery, labels, (dim,))[dim]
        del found["ff"][dim]["recall10"]  # of itself
    return found


def _unseen(out: Path, parts: Parts, unseen: list[int]) -> dict[str, Any]:
    """The neighbours among images of classes that no net was trained on."""
    import keras

    shown, asked = (split_classes(part, unseen)[1] for part in parts)
    found: dict[str, Any] = {}
    for name in ("mrl_seen-0", f"ff_{DIMS[-1]}_seen-0"):
        body = keras.saving.load_model(out / "nets" / name / "model.keras").backbone
        gallery, queries = (
            body.predict(p.pixels, batch_size=500, verbose=0) for p in (shown, asked)
        )
        key = "mrl" if name.startswith("mrl") else "first_coordinates"
        found[key] = score_embeddings(queries, asked.labels, gallery, shown.labels, DIMS)
        if key != "mrl":
            pca = principal_components(_features(out, name)[0], DIMS[-1])
            both = pca.embed(queries), pca.embed(gallery)
            found["pca"] = score_embeddings(both[0], asked.labels, both[1], shown.labels, DIMS)
    return found


def _cascades(out: Path, labels: Any) -> dict[str, Any]:
    """Policies of the first Matryoshka net, learned on a fifth of the test images, by split."""
    logits = np.load(out / "nets" / "mrl-0" / "test_logits.npy")
    rows: dict[str, list[Any]] = {}
    for split in range(SPLITS):
        order = np.random.default_rng(split).permutation(len(labels))
        holdout, rest = order[: len(order) // 5], order[len(order) // 5 :]
        given = logits[holdout], labels[holdout], DIMS
        front = search(*given, temperatures=fit_temperatures(*given[:2]))
        policies = {
            "greedy": CascadePolicy.learn(*given),
            "within half a point": front.cheapest_within(0.005),
            "certified": certify_cascade(*given, risk=0.03, delta=0.1, seed=split),
        }
        for name, policy in policies.items():
            at = [DIMS.index(dim) for dim in policy.dims]
            report = policy.evaluate(logits[rest][:, at], labels[rest])
            rows.setdefault(name, []).append(
                {
                    "accuracy": report.accuracy,
                    "full_accuracy": report.full_accuracy,
                    "expected_dim": report.expected_dim,
                    "cumulative_dim": report.cumulative_dim,
                }
            )
    oracle = oracle_report(logits, labels, DIMS)
    ceiling = {"accuracy": oracle.accuracy, "expected_dim": oracle.expected_dim}
    return {"splits": rows, "oracle": ceiling}


if __name__ == "__main__":
    main()
