"""Search in plain text: an encoder fine-tuned or adapted, exported with its tokenizer, and asked.

    pip install 'keras-mrl[tensorflow,export,server,text]' tensorflow-text
    python examples/text_search.py
    python examples/text_search.py --encoder FOLDER --data pairs.tsv --as-it-is

What happens, and what to look at:

1. `--encoder` is a preset that keras-hub loads: a folder, or a handle such as
   `hf://sentence-transformers/all-MiniLM-L6-v2`. Without it a small BERT is made, which knows
   nothing before it is trained.
2. It is fine-tuned at several dims at once on pairs of strings, a question and the text that
   answers it. `--as-it-is` leaves its weights as they are: a rotation of its embeddings, made from
   the texts alone by `MatryoshkaAdaptor`, lets the leading dims hold most. `--data` has a line
   `question<TAB>text` for each pair; without it pairs are made up. One pair in ten trains nothing
   and judges.
3. nDCG and recall of the judging questions are printed per dim, before and after. A rotation
   leaves those of the full width as they are.
4. The model is exported with its tokenizer: the server takes strings. It embeds all texts, an
   index of two stages is built, and a few questions are asked in plain text, by a client that has
   no tokenizer.

The model and the index are written to `--out`.
"""

from __future__ import annotations

import argparse
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

Pairs = list[tuple[str, str]]


def main() -> None:
    """Train, judge, export, ask."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", help="folder or handle of a preset (a small one is made)")
    parser.add_argument("--data", type=Path, help="lines question<TAB>text (made up)")
    parser.add_argument("--as-it-is", action="store_true", help="adapt, do not fine-tune")
    parser.add_argument("--out", type=Path, default=Path("text_search"), help="%(default)s")
    parser.add_argument("--tokens", type=int, default=32, help="of a text (%(default)s)")
    parser.add_argument("--epochs", type=int, default=1, help="%(default)s")
    parser.add_argument("--rate", type=float, help="of the optimizer (5e-5; 1e-3 of a new encoder)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    import keras

    from keras_mrl import ContrastiveLoss, MatryoshkaAdaptor, MatryoshkaEncoder, TextEncoder

    keras.utils.set_random_seed(arguments.seed)
    pairs = made_up(arguments.seed) if arguments.data is None else read(parser, arguments.data)
    if arguments.encoder is None:
        tower = small_encoder(pairs, arguments.tokens)
    else:
        tower = TextEncoder.from_preset(arguments.encoder, sequence_length=arguments.tokens)
    width = tower.output_shape[-1]
    dims = (*(dim for dim in (8, 32, 128) if dim < width), width)
    model = MatryoshkaEncoder(tower, name="texts")
    rate = arguments.rate or (1e-3 if arguments.encoder is None else 5e-5)
    loss = ContrastiveLoss(dims=dims, temperature=0.05, symmetric=True)
    model.compile(keras.optimizers.AdamW(rate), loss)

    texts = sorted({text for _, text in pairs})
    number = {text: i for i, text in enumerate(texts)}
    judging, training = pairs[: len(pairs) // 10], pairs[len(pairs) // 10 :]
    before = judge(model, judging, texts, number, dims)
    if arguments.as_it_is:
        adaptor = MatryoshkaAdaptor(dims=dims).fit(model.predict(texts, verbose=0))
        model = MatryoshkaEncoder(adaptor.fold(model), preprocessor=tower.preprocessor)
    else:
        questions, answers = map(list, zip(*training, strict=True))
        # The ids tell the loss which answers are one text, and so no negatives of each other.
        ids = np.array([number[text] for text in answers])
        model.fit((questions, answers), ids, batch_size=64, epochs=arguments.epochs, verbose=2)
    after = judge(model, judging, texts, number, dims)
    print("\ndims  nDCG@10 before  after   recall@10 before  after")
    for dim in dims:
        ndcg, recall = ([own[dim][f"{name}@10"] for own in (before, after)] for name in _MEASURES)
        print(f"{dim:4d}  {ndcg[0]:14.3f}  {ndcg[1]:.3f}  {recall[0]:16.3f}  {recall[1]:.3f}")
    serve(model, dims, texts, [question for question, _ in judging[:3]], arguments.out)
    old, new = (own[dims[0]]["ndcg@10"] for own in (before, after))
    gained = f"at {dims[0]} of {width} dims nDCG@10 went from {old:.3f} to {new:.3f}"
    print(f"gained: {gained}; the application that asks needs no tokenizer.")


_MEASURES = ("ndcg", "recall")


def judge(
    model: Any, pairs: Pairs, texts: list[str], number: dict[str, int], dims: tuple[int, ...]
) -> Any:
    """Return what a search for the right text finds, by dim."""
    from keras_mrl.evaluation import evaluate_retrieval

    questions = [question for question, _ in pairs]
    qrels: Any = {row: {number[text]} for row, (_, text) in enumerate(pairs)}
    return evaluate_retrieval(model, questions, texts, qrels, dims=dims, k=10, verbose=0)


def serve(
    model: Any, dims: tuple[int, ...], texts: list[str], questions: list[str], out: Path
) -> None:
    """Export the model with its tokenizer, let the server embed all texts, and ask."""
    from keras_mrl_export import export_saved_model
    from keras_mrl_serving import Client, ExactIndex, FunnelSchedule
    from keras_mrl_serving.server import DevServer

    version = export_saved_model(
        model, out / "texts", texts[:8], dims=(dims[0], dims[-1]), signatures=["embed"]
    )
    with DevServer(out / "texts", model_name="texts") as target, Client(target, "texts") as client:
        gallery = client.embed(texts, dim=dims[-1])
        schedule = FunnelSchedule(dims=(dims[0], dims[-1]), shortlists=(min(50, len(texts)),), k=3)
        fingerprint = client.describe().fingerprint
        index = ExactIndex.build(gallery, schedule, encoder_fingerprint=fingerprint)
        index.save(out / "index")
        answers = client.retrieve(questions, index)
    print(f"\nServed from {version}:")
    for question, ids in zip(questions, answers.ids.tolist(), strict=True):
        print(f"  {question!r}")
        for i in ids:
            print(f"    {texts[i]!r}")


def small_encoder(pairs: Pairs, tokens: int) -> Any:
    """Return an encoder of the words of the pairs that knows nothing yet."""
    from keras_hub import models

    from keras_mrl import TextEncoder

    words = sorted({word for pair in pairs for text in pair for word in text.lower().split()})
    tokenizer = models.BertTokenizer(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words], lowercase=True
    )
    bert = models.BertBackbone(
        vocabulary_size=len(words) + 5,
        num_layers=2,
        num_heads=2,
        hidden_dim=64,
        intermediate_dim=128,
        max_sequence_length=tokens,
    )
    preprocessor = models.BertTextEmbedderPreprocessor(tokenizer, sequence_length=tokens)
    return TextEncoder(bert, preprocessor)


def read(parser: argparse.ArgumentParser, file: Path) -> Pairs:
    """Return questions and texts."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        parser.error(f"--data must be a file of text in UTF-8. Received: {error}.")
    pairs = [(a, b) for a, tab, b in (line.partition("\t") for line in lines) if tab]
    if len(pairs) < 100:
        parser.error(
            "--data must have 100 lines question<TAB>text or more. "
            f"Received: {len(pairs)} of {len(lines)} lines."
        )
    return pairs


def made_up(seed: int) -> Pairs:
    """Return questions for a thing of some kind and colour in a town, and what is offered there."""
    things = "bicycle table lamp guitar camera tent coat piano kettle mirror".split()
    colours = "red blue green black white yellow".split()
    towns = "paris london rome madrid".split()
    asks = ("where is a {c} {t} in {p}", "i look for a {t} in {c} near {p}", "{p} {t} {c}")
    pairs = [
        (
            ask.format(c=colour, t=thing, p=town),
            f"we sell this {thing} here in {town} it is {colour}",
        )
        for thing, colour, town in itertools.product(things, colours, towns)
        for ask in asks
    ]
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[i] for i in order]


if __name__ == "__main__":
    main()
