"""What exits save on a real text encoder, and whether cheap ways save as much.

    python benchmarks/exits.py --encoder FOLDER --data CLINC150 --out FOLDER [--choose]

`--encoder` is a folder with all-MiniLM-L6-v2 as Hugging Face keeps it: `config.json`,
`model.safetensors`, `tokenizer.json`, `tokenizer_config.json` and `vocab.txt` of
sentence-transformers/all-MiniLM-L6-v2 (with a network,
`huggingface_hub.snapshot_download("sentence-transformers/all-MiniLM-L6-v2")` returns it). Besides
keras-hub, scikit-learn and matplotlib this needs `safetensors` and `tokenizers`. `--data` is
`data_full.json` of CLINC150 (github.com/clinc/oos-eval) with its parts named train, val, test and
oos_test.

The encoder stays as it is. A model before it and an exit after each layer are trained on `train`,
and policies are chosen on `val`. `--choose` ends there, and writes `configuration.json`: the exits
and how much policies may lose on `val`. Without it that file is read (`--configuration`), and
`test` is judged. `--splits` and `--only` print other parts of the page. Means of layers and trained
nets are kept in `--out`; a run that was stopped goes on from there. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, reduce
from itertools import combinations
from operator import getitem
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
from exits_front import NAME as FRONT
from exits_front import Ngrams
from exits_index import index_table, one_index
from exits_judge import (
    EMBEDDINGS,
    Aim,
    Configuration,
    Judge,
    Part,
    Work,
    aims,
    alone,
    judged,
    kept_promises,
    padded_lengths,
    policies,
    summary,
)
from exits_rivals import TfIdf
from exits_texts import DIMS, Features, Intents, Texts, Tokens, embedder, means_of_layers
from matplotlib.figure import Figure

from keras_mrl_serving import stage_logits

CONFIGURATION = Path(__file__).parents[1] / "docs/benchmarks/exits_configuration.json"


class Run:
    """The data, and what is kept of a run in its folder."""

    def __init__(self, encoder: Path, data: Path, out: Path) -> None:
        self.folder, self.out = encoder, out
        out.mkdir(parents=True, exist_ok=True)
        self.texts = Texts.read(data)
        self.tokens = Tokens(encoder)
        self.rows = {name: self.tokens.ids(own) for name, own in self.texts.texts.items()}
        self.encoder = embedder(encoder)
        first = range(min(3, self.encoder.backbone.num_layers - 1))
        self.layers = (EMBEDDINGS, *(f"transformer_layer_{i}" for i in first))

    @cached_property
    def ngrams(self) -> Ngrams:
        """The classifier before the encoder."""
        vocabulary = self.tokens.vocabulary
        return Ngrams.learn(self.rows["train"], self.texts.labels["train"], vocabulary)

    def features(self, part: str) -> Features:
        """Return the means of all layers over the tokens of each row."""
        file = self.out / f"means_{part}.npz"
        if not file.exists():
            means = means_of_layers(self.encoder, self.rows[part], self.layers)
            _whole(file, lambda path: np.savez(path, allow_pickle=False, **means))
        with np.load(file) as arrays:
            return {name: arrays[name] for name in (*self.layers, "last")}

    def net(self, exits: Sequence[str], epochs: int, seed: int) -> Intents:
        """Return the net of a seed, trained, and served with these exits."""
        keras.utils.set_random_seed(seed)
        classes = len(self.texts.classes)
        served = [name for name in exits if name != FRONT]
        net = Intents(self.encoder, self.ngrams, self.layers, served, classes)
        file = self.out / f"net_{epochs}_{seed}.weights.h5"
        if not file.exists():
            labels = self.texts.labels["train"]
            net.fit(self.features("train"), labels, epochs, seed)
            _whole(file, net.trained.save_weights)
        net.load(file)
        return net

    def part(self, net: Intents, name: str) -> Part:
        """Return a part as a net answers it."""
        rows = self.rows[name]
        logits = net.logits(self.features(name), rows)
        labels = self.texts.labels.get(name, np.full(len(rows), -1))
        return Part(stage_logits(logits, DIMS), labels, padded_lengths(rows))


def _whole(file: Path, write: Any) -> None:
    """Write a file that is there whole or not at all."""
    unfinished = file.with_name(f"unfinished_{file.name}")
    write(unfinished)
    unfinished.rename(file)


LOSS = 0.005  # half a point
# What is lost on other rows is more than on those that chose, so a policy may have to aim lower.
LOSSES = [thousandths / 1000 for thousandths in range(-10, 6)]
MOST_EXITS = 3  # before the whole encoder: more than four stages overfit


def choose(run: Run, epochs: int, seeds: int, delta: float = 0.05) -> Configuration:
    """Return the exits, and how low to aim, that cost least on rows that did not choose.

    Policies are chosen on one half of `val` and judged on the other. Of those whose loss there is
    at most half a point, with confidence 1 - delta, the cheapest is taken.
    """
    nets = [run.net(run.layers, epochs, seed) for seed in range(seeds)]
    work = Work(nets[0].served)
    vals = [run.part(net, "val") for net in nets]
    early = (FRONT, *run.layers)
    for name in (*early, None):
        shares = [judged(alone(name), val, work).is_right.mean() for val in vals]
        print(f"val: {name or 'last'} {np.mean(shares):.2%}")
    bare = tuple(name for name in run.layers if name != EMBEDDINGS)

    def cost(aim: Aim) -> tuple[float, float]:
        return max(aim.most_lost(delta), LOSS), aim.work

    found = {}
    for exits in dict.fromkeys([*combinations(early, min(MOST_EXITS, len(early))), bare]):
        found[exits] = min(aims(vals, exits, work, LOSSES), key=cost)
        print(f"val: {exits}: {found[exits]}", flush=True)
    best = min(found, key=lambda exits: cost(found[exits]))
    return Configuration(best, found[best].loss_on_val, bare, found[bare].loss_on_val, epochs)


def main() -> None:
    """Train what is missing, choose or judge, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", type=Path, required=True, help="folder of the encoder")
    parser.add_argument("--data", type=Path, required=True, help="JSON file of CLINC150")
    parser.add_argument("--out", type=Path, required=True, help="folder of nets and results")
    parser.add_argument("--configuration", type=Path, default=CONFIGURATION, help="(%(default)s)")
    parser.add_argument("--choose", action="store_true", help="choose on val, and stop")
    parser.add_argument("--epochs", type=int, default=20, help="of --choose (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    parser.add_argument(
        "--splits",
        type=int,
        help="only certify on so many splits of val and test, and count promises kept",
    )
    parser.add_argument(
        "--only",
        choices=("one_index", "overhead"),
        help="one gallery for all exits; or a server's CPU where no row leaves",
    )
    parser.add_argument("--laps", type=int, default=7, help="of serving; 0: none (%(default)s)")
    parser.add_argument("--rows-per-lap", type=int, default=256, help="(%(default)s)")
    arguments = parser.parse_args()
    try:
        run = Run(arguments.encoder, arguments.data, arguments.out)
    except ValueError as error:
        parser.error(str(error))
    if arguments.choose:
        configuration = choose(run, arguments.epochs, arguments.seeds)
        text = json.dumps(asdict(configuration), indent=2)
        (arguments.out / "configuration.json").write_text(f"{text}\n")
        print(json.dumps(asdict(configuration)))
        return
    if arguments.only == "one_index":
        parts = ("train", "val", "test")
        features = {name: run.features(name) for name in parts}
        facts = one_index(run.encoder, run.layers, features, run.rows, run.texts.labels)
        (arguments.out / "one_index.json").write_text(f"{json.dumps(facts, indent=1)}\n")
        print("\n".join(index_table(facts)))
        print(json.dumps(facts))
        return
    chosen = json.loads(arguments.configuration.read_text())
    lists = {name: tuple(own) for name, own in chosen.items() if isinstance(own, list)}
    configuration = Configuration(**chosen | lists)
    if arguments.splits:
        kept = promises(run, configuration, arguments.seeds, arguments.splits)
        print("\n".join(promises_table(kept["splits"])))
        print(json.dumps(kept))
        return
    if arguments.only == "overhead":
        print(json.dumps(serve(run, configuration, arguments.laps, arguments.rows_per_lap, True)))
        return
    results = judge(run, configuration, arguments.seeds)
    (arguments.out / "exits.json").write_text(f"{json.dumps(results, indent=1)}\n")
    draw(results, arguments.out / "exits.svg")
    if arguments.laps:
        results["serving"] = serve(run, configuration, arguments.laps, arguments.rows_per_lap)
        (arguments.out / "exits.json").write_text(f"{json.dumps(results, indent=1)}\n")
    print("\n".join(table(results)))
    print(json.dumps(results["summary"] | results.get("serving", {})))


def judge(run: Run, configuration: Configuration, seeds: int) -> dict[str, Any]:
    """Return what the nets of all seeds do on `test`."""
    tfidf = TfIdf.learn(run.texts.texts["train"], run.texts.labels["train"])
    work = Work(run.net(run.layers, configuration.epochs, 0).served)
    lengths = [len(row) for row in run.rows["test"]]
    judge = Judge(run.texts, lengths, configuration, work, tfidf)
    by_seed = []
    for seed in range(seeds):
        net = run.net(configuration.exits, configuration.epochs, seed)
        by_seed.append(judge.facts(*(run.part(net, name) for name in ("val", "test", "oos_test"))))
    return {
        "configuration": asdict(configuration),
        "summary": summary(by_seed),
        "by_seed": by_seed,
    }


def promises(run: Run, configuration: Configuration, seeds: int, splits: int) -> dict[str, Any]:
    """Return how often certified cascades of the nets of all seeds keep their promises."""
    work = Work(run.net(run.layers, configuration.epochs, 0).served)
    by_seed = []
    for seed in range(seeds):
        net = run.net(configuration.exits, configuration.epochs, seed)
        parts = [run.part(net, name) for name in ("val", "test")]
        by_seed.append(kept_promises(parts, configuration, work, splits))
        print(json.dumps(by_seed[-1]), flush=True)
    facts = {"splits": by_seed}
    (run.out / "promises.json").write_text(f"{json.dumps(facts, indent=1)}\n")
    return facts


def promises_table(by_seed: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of the page of promises kept on other splits."""

    def line(title: str, cells: Any) -> str:
        return f"| {' | '.join([title, *cells])} |".replace("|  |", "| |")

    lines = [
        line("", (f"seed {seed}" for seed in range(len(by_seed)))),
        f"|{'---|' * (1 + len(by_seed))}",
    ]
    for risk, title in (("harm", "harm"), ("accuracy_drop", "accuracy lost")):
        own = [facts[risk] for facts in by_seed]
        splits = f"{title}: splits within the promise, of {own[0]['splits']}"
        risks = [(100 * facts["mean_risk"], 100 * facts["largest_risk"]) for facts in own]
        lines += [
            line(splits, (str(facts["within"]) for facts in own)),
            line(f"{title} on average, largest, %", (f"{a:.2f}, {b:.2f}" for a, b in risks)),
            line("work", (f"{facts['relative_flops']:.3f}" for facts in own)),
        ]
    return lines


def serve(
    run: Run,
    configuration: Configuration,
    laps: int,
    rows_per_lap: int,
    only_overhead: bool = False,
) -> dict[str, Any]:
    """Return what a server's CPU says of the policy of the first seed."""
    from exits_serving import measure, overhead

    net = run.net(configuration.exits, configuration.epochs, 0)
    work = Work(net.served)
    policy, _ = policies(run.part(net, "val"), configuration, work)
    rows, texts = run.rows["test"], run.texts.texts["test"]
    if only_overhead:
        return overhead(net.served, policy, rows, laps, rows_per_lap)
    return measure(net.served, policy, rows, texts, run.tokens, laps, rows_per_lap)


def table(results: dict[str, Any]) -> list[str]:
    """Return the table of the page: means over seeds, lowest and highest where they differ."""
    by_seed = results["by_seed"]
    ways: dict[str, tuple[str, ...]] = {
        "the whole encoder": ("full",),
        "**cascade**": ("adaptive",),
        "the same, all rows padded to 32 tokens": ("adaptive_at_32_tokens",),
        "**certified cascade**": ("certified",),
        "cascade over layers alone": ("without_front",),
        "certified, over layers alone": ("without_front_certified",),
        "the last exit's dims alone": ("dims_only",),
        "oracle: the first stage that is right": ("oracle",),
    }
    for name in by_seed[0]["fixed_exits"]:
        title = f"one exit for all rows: `{name}`"
        ways[title] = ("fixed_exits", name)
    lines = ["| | accuracy, % | work |", "|---|---|---|"]
    for title, path in ways.items():
        points = [reduce(getitem, path, own) for own in by_seed]
        accuracy = _spread([100 * point["accuracy"] for point in points], 2)
        work = _spread([point["relative_flops"] for point in points], 3)
        lines.append(f"| {title} | {accuracy} | {work} |")
    return lines


def _spread(values: list[float], digits: int) -> str:
    """Return the mean, and the lowest and the highest where they differ."""
    mean, low, high = (
        f"{value:.{digits}f}" for value in (np.mean(values), min(values), max(values))
    )
    return mean if low == high else f"{mean} ({low} to {high})"


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw accuracy over work, of the first seed."""
    own = results["by_seed"][0]

    def at(name: str) -> tuple[float, float]:
        return own[name]["relative_flops"], own[name]["accuracy"]

    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot()
    costs, accuracy = np.transpose(own["two_model_cascade"])
    axes.plot(costs, 100 * accuracy, color="#8b949e", label="TF-IDF, then the encoder")
    costs, accuracy = np.transpose(own["front"])
    axes.plot(costs, 100 * accuracy, ".", color="#54aeff", label="all policies found on val")
    exits = np.array(
        [[one["relative_flops"], one["accuracy"]] for one in own["fixed_exits"].values()]
    )
    exits = exits[np.argsort(exits[:, 0])] * [1, 100]
    axes.plot(*exits.T, "o--", color="#9a6700", label="one exit for all rows, shallow to deep")
    stars = {
        "cascade": ("adaptive", "#1f6feb"),
        "cascade, certified": ("certified", "#1a7f37"),
        "over layers alone": ("without_front", "#8250df"),
        "the whole encoder": ("full", "#24292f"),
        "oracle": ("oracle", "#cf222e"),
    }
    for label, (name, colour) in stars.items():
        cost, share = at(name)
        axes.plot([cost], [100 * share], "*", markersize=14, color=colour, label=label)
    axes.set_xscale("log")
    axes.set_xlabel("multiply-adds, as a share of the whole encoder (log scale)")
    axes.set_ylabel("accuracy on test, %")
    axes.grid(color="#d0d7de", linewidth=0.6)
    axes.set_ylim(bottom=90)
    axes.set_xlim(left=0.0003)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)


if __name__ == "__main__":
    main()
