"""A language model whose every prefix predicts: train it on a text, let it write adaptively.

    pip install 'keras-mrl[jax,text]'
    KERAS_BACKEND=jax python examples/language_model.py
    KERAS_BACKEND=jax python examples/language_model.py --data tinyshakespeare.txt --prompt ROMEO:

What happens, and what to look at:

1. The text is that of `--data`, or the reference of the language that Python ships for its `help`.
   A subword vocabulary is learned from its first 90% (byte-level BPE).
2. A small causal Transformer is trained to predict the next token from the first 8, 16, 32, 64
   and 128 coordinates of the same features. Its output embedding is its input embedding.
3. The perplexity of the last 10% is printed per dim: fewer is surer. Small dims cost little.
4. Thresholds are learned on half of these 10%: a token is decided at the first dim that is sure
   enough, as long as the perplexity stays within 2% of that of all 128 dims.
5. The model writes. The last line says what was gained: the share of the dims, and at which price.

`model.keras` and `tokenizer.json` are written to `--out`; keras.saving.load_model reads the first
(import keras_mrl before). Files of one to ten megabytes of plain text fit; 1 MB takes a few minutes
on two cores.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

DIMS = (8, 16, 32, 64, 128)
LENGTH = 64  # tokens the model reads at once
BATCH = 16


def main() -> None:
    """Train, measure, write, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="a file of plain text (Python's reference)")
    parser.add_argument("--out", type=Path, default=Path("language-model"), help="%(default)s")
    parser.add_argument("--vocabulary", type=int, default=4096, help="tokens (%(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="%(default)s")
    parser.add_argument("--prompt", default="The ", help="what the model goes on from")
    parser.add_argument("--tokens", type=int, default=120, help="to write (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    text = pythons_reference() if arguments.data is None else read_text(parser, arguments.data)
    cut = len(text) * 9 // 10
    print(f"Learning {arguments.vocabulary} tokens from {cut:,} characters ...")
    tokenizer = learn_tokens(text[:cut], arguments.vocabulary)
    train, rest = (windows(tokenizer.encode(part).ids) for part in (text[:cut], text[cut:]))
    if min(len(train[0]), len(rest[0]) // 2) < 1:
        parser.error(
            f"The last tenth of --data must hold two rows of {LENGTH} tokens and one token more. "
            f"Received: {len(text):,} characters. Give at least {LENGTH * 100:,}, "
            "better a million."
        )

    import keras

    from keras_mrl import AdaptiveDecoder, generate, sampler
    from keras_mrl.evaluation import learn_decoding_policy, score_tokens

    keras.utils.set_random_seed(arguments.seed)
    print(f"Training on {train[0].size:,} tokens with keras on {keras.backend.backend()} ...")
    model = language_model(tokenizer.get_vocab_size())
    steps = arguments.epochs * -(-len(train[0]) // BATCH)
    model.compile(optimizer=optimizer(steps), loss=next_token_loss())
    model.fit(*train, batch_size=BATCH, epochs=arguments.epochs)

    half = len(rest[0]) // 2
    holdout = score_tokens(model, rest[0][:half], rest[1][:half])
    test = score_tokens(model, rest[0][half:], rest[1][half:])
    policy = learn_decoding_policy(holdout, budget=0.02)
    print("\nPerplexity of text it never saw, per dim:")
    for dim, perplexity in test.perplexity().items():
        print(f"  {dim:4d}  {perplexity:8.1f}")
    expected = test.evaluate(policy).expected_dim
    adaptive = test.adaptive_perplexity(policy)
    print(f"  each token at the first dim sure enough: {adaptive:.1f}")

    decide = AdaptiveDecoder(model, policy, LENGTH, sampler(0.8, seed=arguments.seed))
    prompt = tokenizer.encode(arguments.prompt).ids
    ids, dims = generate(decide, [prompt], arguments.tokens, LENGTH)
    print(f"\n{arguments.prompt}{tokenizer.decode(ids[0].tolist())}")
    print(f"\n({dims.mean():.1f} dims a token)")

    arguments.out.mkdir(parents=True, exist_ok=True)
    model.save(arguments.out / "model.keras")
    tokenizer.save(str(arguments.out / "tokenizer.json"))
    print(f"Saved {arguments.out}/model.keras and tokenizer.json.")
    print(
        f"gained: {expected:.1f} of {DIMS[-1]} dims a token, at a perplexity of {adaptive:.1f} "
        f"instead of {test.perplexity()[DIMS[-1]]:.1f}."
    )


def read_text(parser: argparse.ArgumentParser, file: Path) -> str:
    """Return the text of a file, or end with what is wrong with it."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(
            "--data must be a file of plain text in UTF-8. "
            f"Received: {error}. Give for example a book of Project Gutenberg."
        )


def pythons_reference() -> str:
    """Return what `help` of Python reads: some 450,000 characters of plain English."""
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def learn_tokens(text: str, size: int) -> Any:
    """Return a byte-level BPE tokenizer of at most `size` tokens: it can encode any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def windows(ids: list[int]) -> tuple[Any, Any]:
    """Return rows of LENGTH tokens, and the token after each."""
    rows = max(0, len(ids) - 1) // LENGTH
    cut = np.array(ids[: rows * LENGTH + 1], np.int32)
    return cut[:-1].reshape(rows, LENGTH), cut[1:].reshape(rows, LENGTH)


def language_model(vocabulary: int) -> Any:
    """Return a model with one table of tokens, at its input and at its nested output."""
    from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, causal_transformer

    backbone = causal_transformer(vocabulary, width=DIMS[-1], length=LENGTH)
    table = backbone.get_layer("tokens_embedding")
    head = MatryoshkaHead(vocabulary, DIMS, tied=True, embedding=table)
    return MatryoshkaClassifier(backbone, head, name="language")


def optimizer(steps: int) -> Any:
    """Return AdamW with a warm-up and a cosine."""
    import keras

    rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps, warmup_target=3e-3, warmup_steps=steps // 10
    )
    return keras.optimizers.AdamW(rate, weight_decay=0.05, clipnorm=1.0)


def next_token_loss() -> Any:
    """Return the cross-entropy of the next token, summed over the dims."""
    import keras

    from keras_mrl import MatryoshkaLoss

    return MatryoshkaLoss(keras.losses.SparseCategoricalCrossentropy(from_logits=True))


if __name__ == "__main__":
    main()
