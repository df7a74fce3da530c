"""From text to neighbours: one call, two calls, and a call and a search in this process.

A sentence encoder is exported three ways: with the gallery in its graph (`retrieve`, one call), by
itself, and the gallery as an index of its own (embed, then search: two calls). The same texts are
asked all ways; their ids must be equal. The development server answers in this process, so the
times are those of its answers and of gRPC, without a network between.

  python benchmarks/text_retrieval.py --encoder all-MiniLM-L6-v2 --texts summaries.tsv

The encoder is a folder of the BERT family as Hugging Face has it, see `text_serving.py`. A .tsv has
its text in the last column. --gallery takes embeddings that are there already, such as
`keras-mrl embed --out` writes; without it the first --rows texts are embedded.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from text_serving import read_texts

from keras_mrl_serving import Client, ExactIndex, FunnelSchedule, Options
from keras_mrl_serving.server import DevServer

_K = 10
_SHORTLIST = 200
_REPEATS = 41
_SIZES = (1, 32)  # texts a call

Ask = Callable[[Sequence[str]], Any]


def compare(ways: dict[str, Ask], texts: Sequence[str]) -> Any:
    """Return the share of texts whose ids are those of the first way."""
    answers = {name: ask(texts).ids for name, ask in ways.items()}
    first = next(iter(answers.values()))
    return {name: float((ids == first).all(axis=1).mean()) for name, ids in answers.items()}


def measure_times(ways: dict[str, Ask], texts: Sequence[str]) -> dict[str, dict[int, float]]:
    """Return median milliseconds a batch; the ways take turns, so that all see the same load."""
    times: dict[str, dict[int, float]] = {name: {} for name in ways}
    for size in _SIZES:
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(_REPEATS):
            for name, ask in ways.items():
                start = time.perf_counter()
                ask(texts[:size])
                taken[name].append(time.perf_counter() - start)
        for name, own in taken.items():
            times[name][size] = round(1000 * float(np.median(own)), 1)
    return times


def main() -> None:
    """Run the benchmark and print its results as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--texts", type=Path, required=True, metavar="FILE")
    parser.add_argument("--gallery", type=Path, metavar="E.npy")
    parser.add_argument("--rows", type=int, default=20_000, metavar="N")
    parser.add_argument("--queries", type=int, default=200, metavar="N")
    parser.add_argument("--length", type=int, default=128, metavar="TOKENS")
    arguments = parser.parse_args()

    from keras_mrl import TextEncoder
    from keras_mrl_export import export_index, export_saved_model

    texts = read_texts(arguments.texts)
    encoder = TextEncoder.from_preset(
        arguments.encoder, pooling="mean", sequence_length=arguments.length
    )
    width = encoder.output_shape[-1]
    options: dict[str, Any] = {"dims": (width,), "signatures": [f"embed_{width}"]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_saved_model(encoder, folder / "encoder", texts[:8], **options)
        with DevServer(folder / "encoder") as target, Client(target) as client:
            fingerprint = client.describe().fingerprint
            if arguments.gallery is not None:
                gallery = np.load(arguments.gallery, mmap_mode="r")[: arguments.rows]
            else:
                rows = np.array(texts[: arguments.rows], object)
                small = client.with_batch_size(64)
                gallery = small.embed_dataset(rows, width, folder / "gallery.npy")
        schedule = FunnelSchedule((64, width), (_SHORTLIST,), _K)
        index = ExactIndex.build(gallery, schedule, encoder_fingerprint=fingerprint)
        export_index(index, folder / "index")
        options["signatures"] = [f"embed_{width}", "retrieve"]
        export_saved_model(encoder, folder / "both", texts[:8], index=index, **options)
        patient = Options(timeout_s=300, max_batch_size=64)
        with (
            DevServer(folder / "encoder") as of_encoder,
            DevServer(folder / "index") as of_index,
            DevServer(folder / "both") as of_both,
            Client(of_encoder, options=patient) as alone,
            Client(of_index, options=patient) as rows_alone,
            Client(of_both, options=patient) as both,
        ):
            ways: dict[str, Ask] = {
                "retrieve, one call": both.retrieve,
                "embed and search, two calls": lambda asked: alone.retrieve(asked, rows_alone),
                "embed, and search here": lambda asked: alone.retrieve(asked, index),
            }
            queries = texts[: arguments.queries]
            report = {
                "rows": len(index),
                "queries": len(queries),
                "length": arguments.length,
                "share of equal ids": compare(ways, queries),
                "milliseconds a batch": measure_times(
                    {**ways, "embed alone": lambda asked: alone.embed(asked, width)}, queries
                ),
            }
            print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
