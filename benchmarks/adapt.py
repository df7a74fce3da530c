"""What a projection makes of embeddings that were never trained Matryoshka.

    python benchmarks/adapt.py --embeddings E.npy --data package_summaries.tsv --names N.npy
    python benchmarks/adapt.py --encoder all-MiniLM-L6-v2/ --data package_summaries.tsv
    python benchmarks/adapt.py --synthetic E.npy --width 1536

`--data` holds a line `name<TAB>summary` for each row: a corpus of short sentences, of which 100,000
summaries of software packages were used here. A known-item query is a name, its separators as
blanks; the right answer is that package's summary. `--embeddings` are those of the summaries, in
the order of the lines, and `--names` those of the names (of all lines, or of the rows that judge);
or `--encoder` is a folder of a BERT sentence encoder, from which both are made on PyTorch:

    keras_hub.models.BertBackbone.from_preset("hf://sentence-transformers/all-MiniLM-L6-v2")
    .save_to_preset("all-MiniLM-L6-v2")            # and its vocab.txt or tokenizer.json beside it

Rows are split by seed: 10,000 train the projection, 2,000 are left to plan a funnel, 2,000 judge;
the rest, up to 80,000, are the gallery. `--splits FILE` writes the part of each row. Measures
are of `--gallery` of them (25,000): recall@10 of full-width neighbours, the shortlist that holds
95% and 98% of them, nDCG@10 of known items with the judging rows added, once more without names
that stand in their summary, and BM25 on the same queries (rank-bm25). `--seeds` trains anew with
other batches; the three backends are compared by `--backends`.

`--synthetic` draws rows of another width with the spectrum of the given embeddings, stretched along
the logarithm of its rank, and measures the time, the memory and the query of `max_dim=256`.

The last line is one JSON object; `--out` writes it to a file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

Array = npt.NDArray[Any]

DIMS = (16, 32, 64, 96, 128)
JUDGED = (16, 32, 64, 96, 128, 192, 256)
NUM_TRAIN, NUM_PLAN, NUM_JUDGE, NUM_GALLERY = 10_000, 2_000, 2_000, 80_000
PARTS = ("train", "plan", "judge", "gallery", "searched")  # the last of the gallery
K = 10


def main() -> None:
    """Measure, print the tables, and end with one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--embeddings", type=Path, help=".npy of the summaries")
    parser.add_argument("--names", type=Path, help=".npy of the names")
    parser.add_argument("--encoder", type=Path, help="folder of a sentence encoder")
    parser.add_argument("--data", type=Path, help="lines of name<TAB>summary")
    parser.add_argument("--gallery", type=int, default=25_000, help="rows that are searched")
    parser.add_argument("--methods", default="listwise,pairwise")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--backends", default="torch", help="the first trains with all seeds")
    parser.add_argument("--split-seed", type=int, default=0)
    parser.add_argument("--splits", type=Path, help=".npz that the numbers of rows go to")
    parser.add_argument("--out", type=Path, help="file for the JSON")
    parser.add_argument("--synthetic", type=Path, help=".npy whose spectrum is taken")
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--fit", help=argparse.SUPPRESS)  # method,seed: in a process of its own
    arguments = parser.parse_args()
    if arguments.fit:
        result = _fit(arguments)
    elif arguments.synthetic:
        result = _synthetic(arguments)
    else:
        result = _compare(arguments)
    text = json.dumps(result)
    if arguments.out and not arguments.fit:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(text)


# The rows.


def _splits(arguments: argparse.Namespace, rows: int) -> dict[str, Array]:
    """Return the numbers of the rows of each part; no row is in two."""
    order = np.random.default_rng(arguments.split_seed).permutation(rows)
    ends = np.cumsum([NUM_TRAIN, NUM_PLAN, NUM_JUDGE])
    train, plan, judge, rest = np.split(order, ends)
    parts: dict[str, Any] = {
        "train": train,
        "plan": plan,
        "judge": judge,
        "gallery": rest[:NUM_GALLERY],
    }
    if arguments.splits:
        part = np.zeros(rows, np.uint8)  # 0 is in none
        for number, name in enumerate(PARTS, start=1):
            part[parts.get(name, parts["gallery"][: arguments.gallery])] = number
        np.savez_compressed(arguments.splits, part=part, names=PARTS)
    return parts


def _read(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    lines = arguments.data.read_text(encoding="utf-8").splitlines()
    names, summaries = zip(*(line.split("\t", 1) for line in lines), strict=True)
    return [re.sub(r"[-_.]+", " ", name) for name in names], list(summaries)


def _names(arguments: argparse.Namespace, judge: Array, rows: int) -> Array:
    """Return the embeddings of the names of the rows that judge."""
    names = np.load(arguments.names, mmap_mode="r")
    return np.asarray(names if len(names) == len(judge) != rows else names[judge])


def _embed(encoder: Path, texts: list[str]) -> Array:
    """Return sentence embeddings: the mean of the tokens, of unit length."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras_hub
    import torch
    from tokenizers import Tokenizer

    backbone = keras_hub.models.BertBackbone.from_preset(str(encoder))
    tokenizer = Tokenizer.from_file(str(encoder / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.no_padding()
    ids = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    embeddings = np.empty((len(texts), backbone.hidden_dim), np.float32)
    order = np.argsort([len(row) for row in ids], kind="stable")
    for start in range(0, len(order), 64):
        batch = order[start : start + 64]
        length = max(len(ids[row]) for row in batch)
        tokens = np.zeros((len(batch), length), np.int32)
        mask = np.zeros((len(batch), length), np.int32)
        for place, row in enumerate(batch):
            tokens[place, : len(ids[row])] = ids[row]
            mask[place, : len(ids[row])] = 1
        inputs = {"token_ids": tokens, "padding_mask": mask, "segment_ids": tokens * 0}
        with torch.no_grad():
            output = backbone(inputs)["sequence_output"].cpu().numpy()
        means = (output * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
        embeddings[batch] = means / np.linalg.norm(means, axis=1, keepdims=True)
    return embeddings


# One projection, in a process of its own, whose CPU time is counted.


def _fit(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fit a projection to the rows that train, save it, and say what it cost."""
    method, seed, folder = arguments.fit.split(",")
    rows = np.load(arguments.embeddings, mmap_mode="r")
    train = rows[np.sort(_splits(arguments, len(rows))["train"])]
    from keras_mrl import MatryoshkaAdaptor

    start, wall = time.process_time(), time.perf_counter()
    adaptor = MatryoshkaAdaptor(DIMS, method, steps=arguments.steps, seed=int(seed), verbose=0).fit(
        train
    )
    costs = {"cpu_s": time.process_time() - start, "wall_s": time.perf_counter() - wall}
    adaptor.save(folder)
    losses = adaptor.history_.get("val_loss", [])
    return {**costs, "val_loss": losses, "epochs": len(losses)}


def _in_process(arguments: argparse.Namespace, backend: str, fit: str) -> dict[str, Any]:
    flags = ["--embeddings", arguments.embeddings, "--steps", arguments.steps]
    flags += ["--split-seed", arguments.split_seed, "--fit", fit]
    command = [sys.executable, __file__, *map(str, flags)]
    environment = {**os.environ, "KERAS_BACKEND": backend}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# All of them.


def _compare(arguments: argparse.Namespace) -> dict[str, Any]:
    import tempfile

    names, summaries = _read(arguments)
    folder = Path(tempfile.mkdtemp())
    if arguments.encoder:
        arguments.embeddings, arguments.names = folder / "rows.npy", folder / "names.npy"
        np.save(arguments.embeddings, _embed(arguments.encoder, summaries))
    rows = np.load(arguments.embeddings, mmap_mode="r")
    parts = _splits(arguments, len(rows))
    if arguments.encoder:
        np.save(arguments.names, _embed(arguments.encoder, [names[row] for row in parts["judge"]]))
    task = _Task(arguments, rows, names, summaries, parts)
    from keras_mrl_serving import Projection
    from keras_mrl_serving.projection import principal_directions

    train = rows[np.sort(parts["train"])]
    start = time.process_time()
    pca = Projection(principal_directions(train), DIMS)
    cpu_s = time.process_time() - start
    result: dict[str, Any] = {
        "gallery": len(task.gallery),
        "queries": len(task.queries),
        "rows": len(rows),
        "width": rows.shape[1],
        "steps": arguments.steps,
        "full": task.full(),
        "bm25": task.bm25(),
        "truncation": task.judge(Projection(np.eye(rows.shape[1]), JUDGED)),
        "pca": {"cpu_s": cpu_s, **task.judge(pca)},
    }
    backends = arguments.backends.split(",")
    for method in arguments.methods.split(","):
        result[method] = {}
        for backend in backends:
            seeds = arguments.seeds if backend == backends[0] else 1
            for seed in range(seeds):
                place = folder / f"{method}-{backend}-{seed}"
                costs = _in_process(arguments, backend, f"{method},{seed},{place}")
                measured = {**costs, **task.judge(Projection.load(place))}
                result[method].setdefault(backend, []).append(measured)
                print(f"{method} {backend} {seed}: {costs['cpu_s']:.0f} CPU-s", file=sys.stderr)
    _print(result, backends)
    return result


class _Task:
    """The queries and the gallery, and all measures of a projection on them."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        rows: Array,
        names: list[str],
        summaries: list[str],
        parts: dict[str, Array],
    ) -> None:
        self.gallery = np.asarray(rows[parts["gallery"][: arguments.gallery]])
        self.queries = np.asarray(rows[parts["judge"]])
        judge = parts["judge"]
        # Known items: their summaries must be in the gallery, beside the others.
        self.items = np.concatenate([self.queries, self.gallery])
        self.asked = _names(arguments, judge, len(rows))
        places = [*judge, *parts["gallery"][: arguments.gallery]]
        self.texts = [summaries[row] for row in places]
        self.questions = [names[row] for row in judge]
        self.is_hidden = np.array(
            [
                names[row].lower() not in re.sub(r"[-_.]+", " ", summaries[row]).lower()
                for row in judge
            ]
        )
        from keras_mrl.evaluation.neighbors import nearest_ids

        self.neighbors = nearest_ids(self.gallery, self.queries, rows.shape[1], K)

    def judge(self, projection: Any) -> dict[str, Any]:
        """Return the measures of a projection by dim, and how far it changes full-width cosines."""
        from keras_mrl.evaluation.projection import ranks_by_dim
        from keras_mrl_serving.projection import unit_rows

        ranks = ranks_by_dim(projection, self.gallery, self.queries, self.neighbors, JUDGED)
        own = np.arange(len(self.asked))[:, None]
        items = ranks_by_dim(projection, self.items, self.asked, own, JUDGED)
        measures: dict[str, Any] = {}
        for dim in JUDGED:
            ordered = np.sort(ranks[dim], axis=None)
            measures[str(dim)] = {
                "recall": float((ranks[dim] <= K).mean()),
                "shortlist95": int(ordered[int(np.ceil(0.95 * ordered.size)) - 1]),
                "shortlist98": int(ordered[int(np.ceil(0.98 * ordered.size)) - 1]),
                **self._gains(items[dim]),
            }
        before, after = unit_rows(self.queries), unit_rows(projection.transform(self.queries))
        changed = np.abs(before @ before.T - after @ after.T).max()
        return {"dims": measures, "cosines_changed": float(changed)}

    def full(self) -> dict[str, float]:
        """Return the nDCG of known items at the full width."""
        from keras_mrl.evaluation.projection import ranks_by_dim
        from keras_mrl_serving import Projection

        width = self.gallery.shape[1]
        own = np.arange(len(self.asked))[:, None]
        same = Projection(np.eye(width), (width,))
        return self._gains(ranks_by_dim(same, self.items, self.asked, own, (width,))[width])

    def bm25(self) -> dict[str, float] | None:
        """Return the nDCG of BM25 on the same queries; None where rank-bm25 is not installed."""
        try:
            from rank_bm25 import BM25Okapi
        except ImportError:
            return None
        index = BM25Okapi([re.findall(r"\w+", text.lower()) for text in self.texts])
        ranks = np.empty((len(self.questions), 1), np.int64)
        for row, question in enumerate(self.questions):
            scores = index.get_scores(re.findall(r"\w+", question.lower()))
            # Of equal scores, as of all that share no word, half stand before.
            nearer, equal = (scores > scores[row]).sum(), (scores == scores[row]).sum()
            ranks[row] = 1 + nearer + equal // 2
        return self._gains(ranks)

    def _gains(self, ranks: Array) -> dict[str, float]:
        gains = np.where(ranks[:, 0] <= K, 1 / np.log2(1.0 + ranks[:, 0]), 0.0)
        return {"ndcg": float(gains.mean()), "ndcg_hidden": float(gains[self.is_hidden].mean())}


def _print(result: dict[str, Any], backends: list[str]) -> None:
    columns = ("recall", "shortlist95", "shortlist98", "ndcg", "ndcg_hidden")
    runs = {"truncation": [result["truncation"]], "pca": [result["pca"]]}
    for method in ("listwise", "pairwise"):
        for backend in backends:
            runs[f"{method} {backend}"] = result.get(method, {}).get(backend, [])
    print("| | dim | " + " | ".join(columns) + " |")
    print("|---|---|" + "---|" * len(columns))
    for name, found in runs.items():
        for dim in map(str, JUDGED) if found else ():
            cells = []
            for column in columns:
                values = np.array([run["dims"][dim][column] for run in found], np.float64)
                spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
                cells.append(
                    f"{values.mean():.0f}"
                    if "shortlist" in column
                    else f"{values.mean():.3f}{spread}"
                )
            print(f"| {name} | {dim} | {' | '.join(cells)} |")


# Wide embeddings.


def _synthetic(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the costs of leading directions of wide rows."""
    from keras_mrl import MatryoshkaAdaptor
    from keras_mrl_serving.projection import unit_rows

    real = unit_rows(np.load(arguments.synthetic, mmap_mode="r")[:NUM_TRAIN])
    spectrum = np.linalg.eigvalsh(real.T.astype(np.float64) @ real)[::-1]
    ranks = np.geomspace(1, len(spectrum), arguments.width)
    stretched = np.exp(
        np.interp(np.log(ranks), np.log(np.arange(1, len(spectrum) + 1)), np.log(spectrum))
    )
    stretched = np.sort(stretched)[::-1]
    rng = np.random.default_rng(arguments.split_seed)
    # Coordinates of real rows are the first; what is beyond them is drawn.
    number = NUM_TRAIN + 5_000
    rows = rng.standard_normal((number, arguments.width), np.float32)
    rows *= np.sqrt(stretched / stretched.sum()).astype(np.float32)
    turn = np.linalg.qr(rng.standard_normal((arguments.width, arguments.width)))[0]
    rows = rows @ turn.astype(np.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    dims = (32, 64, 128, 256)
    start = time.process_time()
    adaptor = MatryoshkaAdaptor(dims, "listwise", 256, steps=arguments.steps, verbose=0)
    adaptor.fit(rows[:NUM_TRAIN])
    cpu = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    query = np.ascontiguousarray(rows[-1])
    laps = []
    for _ in range(200):
        start = time.thread_time()
        adaptor.transform(query)
        laps.append(time.thread_time() - start)
    report = adaptor.report(rows[NUM_TRAIN:-500], rows[-500:])
    print(report.table())
    return {
        "width": arguments.width,
        "max_dim": 256,
        "cpu_s": cpu,
        "peak_mib": peak / 1024,
        "peak_mib_before": before / 1024,
        "query_ms": 1000 * float(np.median(laps)),
        "report": report.to_json(),
    }


if __name__ == "__main__":
    main()
