"""Embeddings that were never trained Matryoshka, adapted: what prefixes find before and after.

    pip install 'keras-mrl[torch,faiss,evaluate]'
    python examples/adapt_embeddings.py --embeddings E.npy --out adapted
    python examples/adapt_embeddings.py --encoder all-MiniLM-L6-v2/ --texts lines.txt --out adapted

`--embeddings` are the rows of an `.npy` file, of an API for example. `--encoder` is a folder with a
BERT sentence encoder that keras-hub reads (pip install keras-hub tokenizers), which embeds the
lines of `--texts`. Without either, rows are drawn that only look like embeddings.

What happens, and what to look at:

1. Rows are split: most are the gallery, some train the projection, a few are queries.
2. PCA and a learnt rotation are fitted, and judged on the gallery: the table says how many rows a
   prefix must hand on (`shortlist@0.95`) so that 95% of the ten nearest are among them.
3. The better one is saved, an index of two stages is built with it, and queries are answered as
   they are: the projection is bound to its index.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

FIRST = 64  # dims of the first stage


def main() -> None:
    """Embed, adapt, judge, search."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--embeddings", type=Path)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--texts", type=Path, help="a text a line")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument(
        "--rows", type=int, default=20_000, help="rows to draw where none are given"
    )
    arguments = parser.parse_args()
    rows = embeddings(arguments)
    order = np.random.default_rng(0).permutation(len(rows))
    queries, train, gallery = np.split(order, [len(rows) // 40, len(rows) // 3])
    dims = tuple(dim for dim in (16, 32, 64, 128) if dim < rows.shape[1])

    from keras_mrl import MatryoshkaAdaptor
    from keras_mrl_serving import ExactIndex, FunnelSchedule

    fitted = {}
    shortlists = {}
    for method in ("pca", "listwise"):
        adaptor = MatryoshkaAdaptor(dims, method, steps=arguments.steps, verbose=0)
        fitted[method] = adaptor.fit(rows[np.sort(train)])
        report = adaptor.report(rows[gallery], rows[queries])
        shortlists[method] = report.by_method[method][min(FIRST, dims[-1])]["shortlist@0.95"]
    print(report.table())
    for sentence in report.findings():
        print(sentence)
    best = min(shortlists, key=shortlists.__getitem__)
    first, width = min(FIRST, dims[-1]), rows.shape[1]
    shortlist = int(max(10, min(shortlists[best], len(gallery))))
    print(f"{best}: {first} -> {width} dims, a shortlist of {shortlist}")

    projection = fitted[best].projection_
    projection.save(arguments.out)
    index = ExactIndex.build(
        projection.transform(rows[gallery]),
        FunnelSchedule((first, width), (shortlist,), 10),
        encoder_fingerprint=projection.fingerprint,
    )
    index.save(arguments.out / "index")
    asked = rows[queries][:200]
    neighbors = projection.bind(index).search(asked)
    exact = ExactIndex.build(rows[gallery], FunnelSchedule((width,), (), 10)).search(asked)
    found = [np.isin(a, b).mean() for a, b in zip(exact.ids, neighbors.ids, strict=True)]
    share = (len(gallery) * first + shortlist * width) / (len(gallery) * width)
    print(
        f"gained: {share:.0%} of the multiply-adds of a search at full width find "
        f"{np.mean(found):.1%} of its ten nearest"
    )


def embeddings(arguments: argparse.Namespace) -> Any:
    """Return the rows of the file, of the encoder, or drawn ones."""
    if arguments.embeddings:
        return np.asarray(np.load(arguments.embeddings, mmap_mode="r"), np.float32)
    if arguments.encoder:
        return embed(arguments.encoder, arguments.texts.read_text("utf-8").splitlines())
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(256, 256)))[0]
    rows = rng.normal(size=(arguments.rows, 256)) * np.geomspace(1, 0.05, 256)
    return (rows @ turn).astype("float32")


def embed(encoder: Path, texts: list[str]) -> Any:
    """Return the mean of the tokens' embeddings of each text."""
    import keras_hub
    from tokenizers import Tokenizer

    backbone = keras_hub.models.BertBackbone.from_preset(str(encoder))
    tokenizer = Tokenizer.from_file(str(encoder / "tokenizer.json"))
    tokenizer.enable_truncation(128)
    tokenizer.enable_padding()
    rows = []
    for start in range(0, len(texts), 64):
        batch = tokenizer.encode_batch(texts[start : start + 64])
        tokens = np.array([encoding.ids for encoding in batch], "int32")
        mask = np.array([encoding.attention_mask for encoding in batch], "int32")
        inputs = {"token_ids": tokens, "padding_mask": mask, "segment_ids": tokens * 0}
        outputs = backbone.predict(inputs, verbose=0)["sequence_output"]
        rows.append((outputs * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True))
    return np.concatenate(rows)


if __name__ == "__main__":
    main()
