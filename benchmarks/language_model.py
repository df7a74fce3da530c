"""What nesting costs a language model, and what it buys.

    KERAS_BACKEND=jax python benchmarks/language_model.py --data FILE [--epochs 3] [--seed 0]

Trains the same causal Transformer four times on the first 90% of a text, in subwords learned from
these 90%: with a head per dim (untied), with its token embedding as one nested head (tied), and
as two fixed-feature models of 16 and 128 dims. Then, on the last 10%:

- the perplexity per dim;
- adaptive decoding: each token at the first dim that is sure enough. Thresholds are learned on the
  first half of the 10%, for a perplexity within 2% of the full dim's, and judged on the second.
  The adaptive perplexity is that of the distribution of the dim each token was decided at;
- the funnel: how many of the ten likeliest tokens of the full dim are found if a few are
  shortlisted by small dims and reranked by all.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

WIDTH, LENGTH, LAYERS = 128, 64, 2
DIMS = (8, 16, 32, 64, 128)
FIXED = (16, 128)
BATCH = 16
BUDGET = 0.02
FUNNELS = (
    ((8, 128), (200,)),
    ((8, 128), (50,)),
    ((16, 128), (50,)),
    ((8, 32, 128), (200, 30)),
)
K = 10
QUERIES = 4096  # positions of the text the funnel is asked about


def main() -> None:
    """Read, train, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="a file of plain text")
    parser.add_argument("--vocabulary", type=int, default=4096, help="%(default)s")
    parser.add_argument("--epochs", type=int, default=3, help="of each model (%(default)s)")
    parser.add_argument("--characters", type=int, help="read no more than so many")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    text = _read_text(parser, arguments.data)[: arguments.characters]
    cut = len(text) * 9 // 10
    tokenizer = _learn_tokens(text[:cut], arguments.vocabulary)
    train, rest = (_windows(tokenizer.encode(part).ids) for part in (text[:cut], text[cut:]))
    if min(len(train[0]), len(rest[0]) // 2) < 1:
        parser.error(
            f"The last tenth of --data must hold two rows of {LENGTH} tokens and one token more. "
            f"Received: {len(text):,} characters. Give at least {LENGTH * 100:,}, "
            "better a million."
        )

    import keras

    size = tokenizer.get_vocab_size()
    summary: dict[str, Any] = {
        "backend": keras.backend.backend(),
        "seed": arguments.seed,
        "epochs": arguments.epochs,
        "vocabulary": size,
        "train_tokens": train[0].size,
        "validation_tokens": rest[0].size,
        "models": {},
    }
    print({name: value for name, value in summary.items() if name != "models"}, flush=True)
    for name in ("untied", "tied", *(f"fixed-{dim}" for dim in FIXED)):
        keras.utils.set_random_seed(arguments.seed)
        model = _model(name, size)
        print(f"\n{name}", flush=True)
        seconds = _train(model, train, arguments.epochs)
        summary["models"][name] = {
            "seconds": round(seconds),
            "parameters": model.count_params(),
            **_measure(model, rest, nested=not name.startswith("fixed")),
        }
        print(summary["models"][name], flush=True)
    _print_tables(summary["models"])
    print(json.dumps(summary))


def _read_text(parser: argparse.ArgumentParser, file: Path) -> str:
    """Return the text of a file, or end with what is wrong with it."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(
            "--data must be a file of plain text in UTF-8. "
            f"Received: {error}. Give for example a book of Project Gutenberg."
        )


def _learn_tokens(text: str, size: int) -> Any:
    """A byte-level BPE tokenizer: every text is tokens of it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def _windows(ids: list[int]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Rows of LENGTH tokens, and the token after each."""
    rows = max(0, len(ids) - 1) // LENGTH
    cut = np.array(ids[: rows * LENGTH + 1], np.int32)
    return cut[:-1].reshape(rows, LENGTH), cut[1:].reshape(rows, LENGTH)


def _model(name: str, size: int) -> Any:
    import keras

    from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, causal_transformer

    backbone = causal_transformer(size, WIDTH, LENGTH, layers=LAYERS)
    if name == "untied":
        return MatryoshkaClassifier(backbone, MatryoshkaHead(size, DIMS))
    if name == "tied":
        table = backbone.get_layer("tokens_embedding")
        return MatryoshkaClassifier(
            backbone, MatryoshkaHead(size, DIMS, tied=True, embedding=table)
        )
    dim = int(name.partition("-")[2])
    if dim < WIDTH:
        backbone = keras.Model(backbone.input, keras.layers.Dense(dim)(backbone.output))
    return MatryoshkaClassifier(backbone, MatryoshkaHead(size, (dim,)))


def _train(model: Any, train: Any, epochs: int) -> float:
    import keras

    from keras_mrl import MatryoshkaLoss

    steps = epochs * -(-len(train[0]) // BATCH)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps, warmup_target=3e-3, warmup_steps=steps // 10
    )
    model.compile(
        optimizer=keras.optimizers.AdamW(rate, weight_decay=0.05, clipnorm=1.0),
        loss=MatryoshkaLoss(keras.losses.SparseCategoricalCrossentropy(from_logits=True)),
    )
    started = time.perf_counter()
    model.fit(*train, batch_size=BATCH, epochs=epochs, verbose=2)
    return time.perf_counter() - started


def _measure(model: Any, rest: Any, nested: bool) -> dict[str, Any]:
    from keras_mrl.evaluation import learn_decoding_policy, score_tokens

    half = len(rest[0]) // 2
    measured: dict[str, Any] = {
        "perplexity": _rounded(score_tokens(model, *rest).perplexity()),
    }
    if nested:
        policy = learn_decoding_policy(
            score_tokens(model, rest[0][:half], rest[1][:half]), budget=BUDGET
        )
        test = score_tokens(model, rest[0][half:], rest[1][half:])
        full, adaptive = test.perplexity()[WIDTH], test.adaptive_perplexity(policy)
        report = test.evaluate(policy)
        measured["adaptive"] = {
            "thresholds": [stage.threshold for stage in policy.stages],
            "full_perplexity": round(full, 2),
            "perplexity": round(adaptive, 2),
            "excess": round(adaptive / full - 1, 4),
            "expected_dim": round(report.expected_dim, 1),
            "cumulative_dim": round(report.cumulative_dim, 1),
            "exit_fractions": [round(share, 3) for share in report.exit_fractions],
            "accuracy": round(report.accuracy, 4),
            "full_accuracy": round(report.full_accuracy, 4),
        }
        measured["funnel"] = _funnel(model, rest[0])
    return measured


def _funnel(model: Any, tokens: Any) -> list[dict[str, Any]]:
    """Recall of the ten likeliest tokens, and multiply-adds over those of all tokens at 128."""
    import keras

    from keras_mrl import funnel_top_k
    from keras_mrl_serving import FunnelSchedule

    features = model.backbone.predict(tokens, verbose=0).reshape(-1, WIDTH)
    chosen = np.random.default_rng(0).permutation(len(features))[:QUERIES]
    chunks = np.array_split(features[chosen], max(1, len(chosen) // 256))
    logits = [keras.ops.convert_to_numpy(model.head.logits_at(c, WIDTH)) for c in chunks]
    truth = [np.argpartition(-part, K, axis=1)[:, :K] for part in logits]
    measured = []
    for dims, shortlists in FUNNELS:
        schedule = FunnelSchedule(dims, shortlists, K)
        found = [
            keras.ops.convert_to_numpy(funnel_top_k(model.head, chunk, schedule)[0])
            for chunk in chunks
        ]
        pairs = zip(np.concatenate(found), np.concatenate(truth), strict=True)
        shared = [len(np.intersect1d(one, other)) for one, other in pairs]
        classes = model.head.num_classes
        measured.append(
            {
                "dims": dims,
                "shortlists": shortlists,
                "recall": round(float(np.mean(shared)) / K, 4),
                "madds": round(schedule.madds(classes) / (classes * WIDTH), 3),
            }
        )
    return measured


def _rounded(perplexity: dict[int, float]) -> dict[int, float]:
    return {dim: round(value, 2) for dim, value in perplexity.items()}


def _print_tables(models: dict[str, Any]) -> None:
    print("\n| validation perplexity |" + "".join(f" {dim} |" for dim in DIMS))
    print("|---" * (len(DIMS) + 1) + "|")
    for name, measured in models.items():
        cells = [measured["perplexity"].get(dim, "") for dim in DIMS]
        print(f"| {name} |" + "".join(f" {cell} |" for cell in cells))
    print("\n| decoding | perplexity at 128 | adaptive | excess | expected dim |")
    print("|---|---|---|---|---|")
    for name, measured in models.items():
        if "adaptive" in measured:
            a = measured["adaptive"]
            print(
                f"| {name} | {a['full_perplexity']} | {a['perplexity']} | {a['excess']:.2%} "
                f"| {a['expected_dim']} |"
            )
    print("\n| funnel | dims | shortlists | recall of 10 | multiply-adds |")
    print("|---|---|---|---|---|")
    for name, measured in models.items():
        for f in measured.get("funnel", ()):
            print(f"| {name} | {f['dims']} | {f['shortlists']} | {f['recall']} | {f['madds']} |")
    print()


if __name__ == "__main__":
    main()
