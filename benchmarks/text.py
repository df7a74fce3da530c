"""A sentence encoder fine-tuned with Matryoshka dims on pairs of strings, judged on known items.

    python benchmarks/text.py --encoder all-MiniLM-L6-v2/ --data package_summaries.tsv
    KERAS_BACKEND=jax python benchmarks/text.py --encoder ... --data ... --rows 2560 --queries 500

`--encoder` is a preset that keras-hub loads, a folder or a handle such as
`hf://sentence-transformers/all-MiniLM-L6-v2`. `--data` holds a line `name<TAB>summary` for each
row: 100,000 summaries of software packages were used here. A known-item query is a name, its
separators as blanks, and the right answer is that package's summary. Names that stand literally in
their summary, separators aside, are left out.

The first `--rows` pairs of the rest train, and the last `--corpus` summaries are searched by the
first `--queries` of their names: no row stands on both sides. Measures are nDCG@10 and recall@10 at
every dim, of the encoder as it comes and after fine-tuning, and of BM25 on the same queries
(`pip install rank-bm25`). `--full` trains the full width alone, to tell what nesting adds.

To spare the processor, batches are of pairs of like length, padded to the longest and not to
`--tokens`: the answers are the same. On TensorFlow and JAX all batches have one length, or a step
would be compiled for each. The last line is one JSON object; `--out` writes it to a file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

DIMS = (8, 16, 32, 64, 128, 256)
K = 10
Pairs = list[tuple[str, str]]


def main() -> None:
    """Embed, fine-tune, embed again, and end with one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", required=True, help="folder or handle of a preset")
    parser.add_argument("--data", type=Path, required=True, help="lines name<TAB>summary")
    parser.add_argument("--rows", type=int, default=20_480, help="pairs that train (%(default)s)")
    parser.add_argument("--corpus", type=int, default=10_000, help="summaries (%(default)s)")
    parser.add_argument("--queries", type=int, default=2_000, help="names (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=128, help="%(default)s")
    parser.add_argument("--epochs", type=int, default=1, help="%(default)s")
    parser.add_argument("--rate", type=float, default=5e-5, help="peak of the rate (%(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="of a text at most (%(default)s)")
    parser.add_argument("--full", action="store_true", help="train the full width alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="write the fine-tuned model, a .keras file")
    parser.add_argument("--out", type=Path, help="write the JSON to a file as well")
    arguments = parser.parse_args()

    import keras

    keras.utils.set_random_seed(arguments.seed)
    pairs = read(arguments.data)
    corpus = [summary for _, summary in pairs[-arguments.corpus :]]
    queries = [name for name, _ in pairs[-arguments.corpus :][: arguments.queries]]
    trained = pairs[: min(arguments.rows, len(pairs) - arguments.corpus)]
    result = run(arguments, trained, queries, corpus)
    show(result)
    line = json.dumps(result)
    if arguments.out is not None:
        arguments.out.write_text(line + "\n", encoding="utf-8")
    print(line)


def run(
    arguments: argparse.Namespace, pairs: Pairs, queries: list[str], corpus: list[str]
) -> dict[str, Any]:
    """Judge the encoder, fine-tune it, and judge it again."""
    import keras

    from keras_mrl import ContrastiveLoss, MatryoshkaEncoder, TextEncoder

    tower = TextEncoder.from_preset(arguments.encoder, sequence_length=arguments.tokens)
    width = tower.output_shape[-1]
    dims = (*(dim for dim in DIMS if dim < width), width)
    model = MatryoshkaEncoder(tower, name="texts")
    steps = arguments.epochs * (len(pairs) // arguments.batch_size)
    warmup = max(1, steps // 10)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - warmup), warmup_target=arguments.rate, warmup_steps=warmup
    )
    loss = ContrastiveLoss(
        dims=(width,) if arguments.full else dims, temperature=0.05, symmetric=True
    )
    model.compile(keras.optimizers.AdamW(rate, weight_decay=0.01), loss)
    before = judge(model, queries, corpus, dims)
    print(json.dumps({"before": before}), flush=True)
    batches = batches_of(model, pairs, arguments.batch_size)
    clock, cpu = time.perf_counter(), time.process_time()
    history = model.fit(batches, epochs=arguments.epochs, verbose=2).history
    seconds, cpu_s = time.perf_counter() - clock, time.process_time() - cpu
    after = judge(model, queries, corpus, dims)
    if arguments.save is not None:
        model.save(arguments.save)
    return {
        "encoder": Path(arguments.encoder).name,
        "backend": keras.config.backend(),
        "rows": len(pairs),
        "epochs": arguments.epochs,
        "batch_size": arguments.batch_size,
        "rate": arguments.rate,
        "tokens": arguments.tokens,
        "trained_dims": list(loss.dims),
        "corpus": len(corpus),
        "queries": len(queries),
        "fit_s": round(seconds, 1),
        "fit_cpu_s": round(cpu_s, 1),
        "loss": round(float(history["loss"][-1]), 4),
        "before": before,
        "after": after,
        "bm25": bm25(queries, corpus),
    }


def read(file: Path) -> Pairs:
    """Return names, their separators as blanks, with summaries that do not name them."""
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t", 1) for line in lines if "\t" in line]
    return [
        (" ".join(re.split(r"[-_.\s]+", name)), summary)
        for name, summary in rows
        if _letters(name) not in _letters(summary)
    ]


def _letters(text: str) -> str:
    return re.sub(r"[-_.\s]+", "", text.lower())


def batches_of(model: Any, pairs: Pairs, size: int) -> Any:
    """Return a data set of batches `(names, summaries)`, tokens of pairs of like length."""
    import keras

    class Batches(keras.utils.PyDataset):
        def __len__(self) -> int:
            return len(pairs) // size

        def __getitem__(self, index: int) -> Any:
            rows = order[index * size : (index + 1) * size]
            sides = [{name: array[rows] for name, array in side.items()} for side in tokens]
            return tuple(map(shortened, sides)) if is_torch else tuple(sides)

    is_torch = keras.config.backend() == "torch"
    tokens = [shortened(tokenized(model, list(side))) for side in zip(*pairs, strict=True)]
    order = np.argsort(tokens[1]["padding_mask"].sum(axis=1), kind="stable")
    return Batches()


def tokenized(model: Any, texts: list[str]) -> dict[str, Any]:
    """Return tokens, as `fit` makes them of strings."""
    from keras_mrl.text import tokenize

    return tokenize(model.preprocessor, texts)


def shortened(tokens: dict[str, Any]) -> dict[str, Any]:
    """Return tokens padded to the longest text and no further."""
    longest = int(tokens["padding_mask"].sum(axis=1).max())
    return {name: array[:, :longest] for name, array in tokens.items()}


def judge(
    model: Any, queries: list[str], corpus: list[str], dims: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Return nDCG and recall by dim."""
    from keras_mrl.evaluation import score_retrieval

    asked, searched = embed(model, queries), embed(model, corpus)
    right: dict[Any, Any] = {row: {row} for row in range(len(queries))}
    quality = score_retrieval(asked, searched, right, dims, k=K)
    return {
        str(dim): {name: round(own[f"{name}@{K}"], 4) for name in ("ndcg", "recall")}
        for dim, own in quality.items()
    }


def embed(model: Any, texts: list[str]) -> Any:
    """Return embeddings; texts of like length go together."""
    tokens = tokenized(model, texts)
    order = np.argsort(tokens["padding_mask"].sum(axis=1), kind="stable")
    parts = []
    for start in range(0, len(order), 2048):
        rows = {name: array[order[start : start + 2048]] for name, array in tokens.items()}
        parts.append(model.predict(shortened(rows), batch_size=256, verbose=0))
    embeddings = np.empty((len(texts), parts[0].shape[1]), np.float32)
    embeddings[order] = np.concatenate(parts)
    return embeddings


def bm25(queries: list[str], corpus: list[str]) -> dict[str, float] | None:
    """Return the same measures of BM25; None where rank-bm25 is not installed."""
    try:
        from rank_bm25 import BM25Okapi
    except ImportError:
        return None
    index = BM25Okapi([re.findall(r"\w+", text.lower()) for text in corpus])
    ranks = np.empty(len(queries))
    for row, query in enumerate(queries):
        scores = index.get_scores(re.findall(r"\w+", query.lower()))
        # Of equal scores, as of all that share no word, half stand before.
        nearer, equal = (scores > scores[row]).sum(), (scores == scores[row]).sum()
        ranks[row] = 1 + nearer + equal // 2
    gains = np.where(ranks <= K, 1 / np.log2(1.0 + ranks), 0.0)
    return {"ndcg": round(float(gains.mean()), 4), "recall": round(float((ranks <= K).mean()), 4)}


def show(result: dict[str, Any]) -> None:
    """Print a table by dim."""
    print("| dim | nDCG@10 before | after | gain | recall@10 before | after | gain |")
    print("|---|---|---|---|---|---|---|")
    for dim, before in result["before"].items():
        after = result["after"][dim]
        cells = [
            f"{before[name]:.3f} | {after[name]:.3f} | {after[name] - before[name]:+.3f}"
            for name in ("ndcg", "recall")
        ]
        print(f"| {dim} | {' | '.join(cells)} |")
    if result["bm25"] is not None:
        print(
            f"BM25: nDCG@10 {result['bm25']['ndcg']:.3f}, recall@10 {result['bm25']['recall']:.3f}"
        )


if __name__ == "__main__":
    main()
