"""Texts sorted into classes by an encoder that sure texts leave early: trained, served, and asked.

    pip install 'keras-mrl[tensorflow,export,server,text]' tensorflow-text
    python examples/exits_text.py
    python examples/exits_text.py --encoder FOLDER --data data_full.json

What happens, and what to look at:

1. `--encoder` is a preset that keras-hub loads: a folder, or a handle such as
   `hf://sentence-transformers/all-MiniLM-L6-v2`. It stays as it is. Without it a small BERT is made
   and trained.
2. Exits are trained after two of its layers, and a cheap net of word vectors before it.
3. On texts that trained nothing a cascade is found that is certified: in at most 2% of the rows the
   whole encoder is right and the cascade wrong. What it saves is printed in multiply-adds.
4. The model is exported with the cascade and its tokenizer, and served. A few texts are asked: each
   answer says which exit gave it.

`--data` is CLINC150 (github.com/clinc/oos-eval), or any JSON `{"train": [[text, class], ...],
"val": [...]}`. Without it a few hundred requests are made up. The model is written to `--out`.
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
    parser.add_argument("--encoder", help="folder or handle of a preset (a small one is made)")
    parser.add_argument("--data", type=Path, help="JSON of texts and classes (made up)")
    parser.add_argument("--out", type=Path, default=Path("exits_text"), help="%(default)s")
    parser.add_argument("--tokens", type=int, default=32, help="of a text (%(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    import keras

    from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, TextEncoder, measure_costs
    from keras_mrl.text import tokenize
    from keras_mrl_serving import certify_cascade, stage_logits

    keras.utils.set_random_seed(arguments.seed)
    train, holdout = made_up(arguments.seed) if arguments.data is None else read(arguments.data)
    classes = sorted({name for _, name in train})
    texts, labels = separated(train, classes)
    held, truth = separated(holdout, classes)

    if arguments.encoder is None:
        encoder = small_encoder(texts, arguments.tokens)
    else:
        encoder = TextEncoder.from_preset(arguments.encoder, sequence_length=arguments.tokens)
        encoder.trainable = False
    bert = encoder.backbone
    model = MatryoshkaClassifier(
        encoder,
        MatryoshkaHead(len(classes), dims=DIMS),
        pooling=keras.layers.Dense(DIMS[-1]),
        exits=(
            word_vectors(bert.vocabulary_size),
            *dict.fromkeys(f"transformer_layer_{i}" for i in (0, bert.num_layers // 2)),
        ),
        name="intents",
    )
    model.compile(
        keras.optimizers.Adam(2e-3), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    log = model.fit(texts, labels, epochs=arguments.epochs, verbose=2).history
    print({name: round(values[-1], 3) for name, values in log.items() if "accuracy" in name})

    tokens = tokenize(model.preprocessor, held)
    stages = stage_logits(model.all_exits().predict(tokens, verbose=0), DIMS)
    stages = {stage: logits for stage, logits in stages.items() if stage[1] == DIMS[-1]}
    one = {name: rows[:1] for name, rows in tokens.items()}
    costs = measure_costs(model, batch_sizes=(), sample=one)
    policy = certify_cascade(stages, truth, risk="harm", alpha=0.02, costs=costs.of)
    if policy.holdout is None or policy.guarantee is None:
        raise AssertionError("a certified policy has both")
    shares = policy.holdout.exit_fractions
    work = float(np.dot(shares, costs.of(policy.keys))) / costs.of([(None, DIMS[-1])])[0]
    print(f"\nOf {len(holdout):,} texts that trained nothing,")
    for (name, _), share in zip(policy.keys, shares, strict=True):
        print(f"  {name or 'last':24} answers {share:.1%}")
    serve(model, policy, classes, held[:16], arguments.out)
    print(
        f"\ngained: accuracy {policy.holdout.accuracy:.1%} at {work:.0%} of the work of the whole "
        f"encoder, which has {policy.holdout.full_accuracy:.1%}."
    )


def serve(model: Any, policy: Any, classes: list[str], asked: list[str], out: Path) -> None:
    """Export the model with its cascade and its tokenizer, and ask the server."""
    from keras_mrl_export import export_saved_model
    from keras_mrl_serving import Client
    from keras_mrl_serving.server import DevServer

    version = export_saved_model(model, out, sample=asked, policy=policy, labels=classes)
    print(f"\nServed from {version}:")
    with DevServer(out, model_name="intents") as target, Client(target, "intents") as client:
        answer = client.classify_adaptive(asked)
    names, exits = np.array(answer.labels)[:, 0], np.array(answer.exit)
    for text, name, exit_name in list(zip(asked, names, exits, strict=True))[:6]:
        print(f"  {text!r}: {name}, by {exit_name}")


def small_encoder(texts: list[str], tokens: int) -> Any:
    """Return a small BERT over the words of the texts, which knows nothing yet."""
    from keras_hub import models

    from keras_mrl import TextEncoder

    words = sorted({word for text in texts for word in text.lower().split()})
    tokenizer = models.BertTokenizer(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words], lowercase=True
    )
    bert = models.BertBackbone(
        vocabulary_size=len(words) + 5,
        num_layers=4,
        num_heads=4,
        hidden_dim=64,
        intermediate_dim=128,
        max_sequence_length=tokens,
    )
    preprocessor = models.BertTextEmbedderPreprocessor(tokenizer, sequence_length=tokens)
    return TextEncoder(bert, preprocessor)


def word_vectors(vocabulary_size: int) -> Any:
    """Return the model before the encoder: the mean of trained vectors of the tokens."""
    import keras

    names = ("token_ids", "padding_mask", "segment_ids")
    given = {name: keras.Input((None,), dtype="int32", name=name) for name in names}
    vectors = keras.layers.Embedding(vocabulary_size, 32, name="words")(given["token_ids"])
    mean = keras.layers.GlobalAveragePooling1D()(vectors, mask=given["padding_mask"])
    features = keras.layers.Dense(DIMS[-1], name="word_features")(mean)
    return keras.Model(given, features, name="word_vectors")


def separated(pairs: Pairs, classes: list[str]) -> tuple[list[str], Any]:
    """Return the texts, and the numbers of their classes."""
    return [text for text, _ in pairs], np.array([classes.index(name) for _, name in pairs])


def read(file: Path) -> tuple[Pairs, Pairs]:
    """Return the texts that train and those that decide."""
    parts = json.loads(file.read_text(encoding="utf-8"))
    return parts["train"], parts["val"]


def made_up(seed: int) -> tuple[Pairs, Pairs]:
    """Return requests; in every third the words alone, without their order, do not tell its class.

    A word that is counted says nothing of "do not call but write", so these need the encoder.
    """
    who = ("my mother", "the bank", "my boss", "the dentist", "john", "the shop", "my sister")
    when = ("today", "tomorrow", "on friday", "tonight", "next week", "at noon", "in an hour")
    ask = ("please", "can you", "i want to", "i need to", "could you", "help me", "let us")
    kinds = (
        ("call", "call {who} {when}"),
        ("write", "write to {who} {when}"),
        ("pay", "send money to {who} {when}"),
        ("meet", "set up a meeting with {who} {when}"),
        ("call", "not write but call {who} {when}"),
        ("write", "not call but write {who} {when}"),
    )
    pairs = [
        (f"{start} {text.format(who=name, when=time)}", kind)
        for start, name, time in itertools.product(ask, who, when)
        for kind, text in kinds
    ]
    order = np.random.default_rng(seed).permutation(len(pairs))
    shuffled = [pairs[i] for i in order]
    return shuffled[: len(pairs) // 2], shuffled[len(pairs) // 2 :]


if __name__ == "__main__":
    main()
