"""A text encoder that sure rows leave early: exits trained, a promise made, served, and asked.

    pip install 'keras-mrl[tensorflow,export,server]' keras-hub tokenizers safetensors
    python examples/exits_text.py --encoder FOLDER [--data data_full.json]

What happens, and what to look at:

1. `--encoder` is a BERT as Hugging Face keeps it, with `config.json`, `model.safetensors`,
   `tokenizer.json` and `vocab.txt`: with a network,
   `huggingface_hub.snapshot_download("sentence-transformers/all-MiniLM-L6-v2")` returns such a
   folder. It stays as it is.
2. Exits are trained after two of its layers, and a cheap net of word vectors before it.
3. On texts that trained nothing a cascade is found that is certified: in at most 2% of the rows the
   whole encoder is right and the cascade wrong. What it saves is printed in multiply-adds.
4. The model is exported with the cascade and served, and a few texts are asked: each answer says
   which exit gave it.

`--data` is CLINC150 (github.com/clinc/oos-eval), or any JSON `{"train": [[text, class], ...],
"val": [...]}`. Without it a few thousand requests are made up.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

DIMS = (32, 128)
Pairs = list[tuple[str, str]]


def main() -> None:
    """Train, decide, export, ask."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", type=Path, required=True, help="folder of a BERT")
    parser.add_argument("--data", type=Path, help="JSON of texts and classes (made up)")
    parser.add_argument("--out", type=Path, default=Path("exits_text"), help="%(default)s")
    parser.add_argument("--epochs", type=int, default=3, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    import keras
    import keras_hub
    from tokenizers import Tokenizer

    from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, measure_costs
    from keras_mrl_serving import certify_cascade, stage_logits

    keras.utils.set_random_seed(arguments.seed)
    train, holdout = made_up(arguments.seed) if arguments.data is None else read(arguments.data)
    classes = sorted({name for _, name in train})
    tokenizer = Tokenizer.from_file(str(arguments.encoder / "tokenizer.json"))
    tokenizer.enable_truncation(64)
    x, y = inputs(tokenizer, train), np.array([classes.index(name) for _, name in train])
    held, truth = inputs(tokenizer, holdout), np.array([classes.index(n) for _, n in holdout])

    bert = keras_hub.models.BertBackbone.from_preset(str(arguments.encoder))
    bert.trainable = False
    layers = [f"transformer_layer_{i}" for i in (0, bert.num_layers // 2)]
    model = MatryoshkaClassifier(
        keras_hub.models.BertTextEmbedder(bert, normalize=False),
        MatryoshkaHead(len(classes), dims=DIMS),
        pooling=keras.layers.Dense(DIMS[-1]),
        exits=(word_vectors(bert.vocabulary_size), *dict.fromkeys(layers)),
        name="intents",
    )
    model.compile(
        keras.optimizers.Adam(2e-3), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    log = model.fit(x, y, epochs=arguments.epochs, verbose=2).history
    print({name: round(values[-1], 3) for name, values in log.items() if "accuracy" in name})

    stages = stage_logits(model.all_exits().predict(held, verbose=0), DIMS)
    stages = {stage: logits for stage, logits in stages.items() if stage[1] == DIMS[-1]}
    costs = measure_costs(model, batch_sizes=(), sample=inputs(tokenizer, holdout[:1]))
    policy = certify_cascade(stages, truth, risk="harm", alpha=0.02, costs=costs.of)
    if policy.holdout is None or policy.guarantee is None:
        raise AssertionError("a certified policy has both")
    shares = policy.holdout.exit_fractions
    work = float(np.dot(shares, costs.of(policy.keys))) / costs.of([(None, DIMS[-1])])[0]
    print(
        f"\nOn {len(holdout):,} texts that trained nothing: "
        f"accuracy {policy.holdout.accuracy:.1%}, of the whole encoder "
        f"{policy.holdout.full_accuracy:.1%}, at {work:.0%} of its work."
    )
    for (name, _), share in zip(policy.keys, shares, strict=True):
        print(f"  {name or 'last':24} answers {share:.1%}")
    serve(model, policy, classes, holdout[:4], inputs(tokenizer, holdout[:4]), arguments.out)


def serve(
    model: Any, policy: Any, classes: list[str], asked: Pairs, x: dict[str, Any], out: Path
) -> None:
    """Export the model with its cascade, and ask the server."""
    from keras_mrl_export import export_saved_model
    from keras_mrl_serving import Client
    from keras_mrl_serving.server import DevServer

    version = export_saved_model(model, out, sample=x, policy=policy, labels=classes)
    print(f"\nServed from {version}:")
    with DevServer(out, model_name="intents") as target, Client(target, "intents") as client:
        answer = client.classify_adaptive(x)
    names, exits = np.array(answer.labels)[:, 0], np.array(answer.exit)
    for (text, _), name, exit_name in zip(asked, names, exits, strict=True):
        print(f"  {text!r}: {name}, by {exit_name}")


def word_vectors(vocabulary_size: int) -> Any:
    """Return the model before the encoder: the mean of trained vectors of the tokens."""
    import keras

    names = ("token_ids", "padding_mask", "segment_ids")
    given = {name: keras.Input((None,), dtype="int32", name=name) for name in names}
    vectors = keras.layers.Embedding(vocabulary_size, 32, name="words")(given["token_ids"])
    mean = keras.layers.GlobalAveragePooling1D()(vectors, mask=given["padding_mask"])
    features = keras.layers.Dense(DIMS[-1], name="word_features")(mean)
    return keras.Model(given, features, name="word_vectors")


def inputs(tokenizer: Any, pairs: Pairs) -> dict[str, Any]:
    """Return the inputs of the encoder, padded to the longest text."""
    tokenizer.enable_padding()
    rows = tokenizer.encode_batch([text for text, _ in pairs])
    ids = np.array([row.ids for row in rows], np.int32)
    mask = np.array([row.attention_mask for row in rows], np.int32)
    return {"token_ids": ids, "padding_mask": mask, "segment_ids": np.zeros_like(ids)}


def read(file: Path) -> tuple[Pairs, Pairs]:
    """Return the texts that train and those that decide."""
    parts = json.loads(file.read_text(encoding="utf-8"))
    return parts["train"], parts["val"]


def made_up(seed: int) -> tuple[Pairs, Pairs]:
    """Return requests of six kinds, some of which share most of their words."""
    who = ("my mother", "the bank", "my boss", "the dentist", "john", "the shop", "my sister")
    when = ("today", "tomorrow", "on friday", "tonight", "next week", "at noon", "in an hour")
    ask = ("please", "can you", "i want to", "i need to", "could you", "help me", "let us")
    kinds = {
        "call": "call {who} {when}",
        "cancel": "call off the meeting with {who} {when}",
        "meet": "set up a meeting with {who} {when}",
        "pay": "send money to {who} {when}",
        "bill": "ask {who} for the money {when}",
        "write": "send a message to {who} {when}",
    }
    pairs = [
        (f"{start} {text.format(who=name, when=time)}", kind)
        for start, name, time in itertools.product(ask, who, when)
        for kind, text in kinds.items()
    ]
    order = np.random.default_rng(seed).permutation(len(pairs))
    shuffled = [pairs[i] for i in order]
    return shuffled[: len(pairs) // 2], shuffled[len(pairs) // 2 :]


if __name__ == "__main__":
    main()
