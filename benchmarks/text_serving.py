"""Texts served with their tokenizer: are tokens and embeddings those of the original, and how fast?

The encoder is a folder of a sentence encoder of the BERT family as Hugging Face has it:
all-MiniLM-L6-v2, which `git clone https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2`
fetches (config.json, model.safetensors, tokenizer.json, vocab.txt). It is exported with its
tokenizer, and compared with two others that share no code with it: the library `tokenizers`, and
the same weights run by PyTorch, written out here. So are the tokens of the graph that is made where
tensorflow-text is missing. It needs keras-hub, tensorflow-text, tokenizers, safetensors and torch.

  python benchmarks/text_serving.py --encoder all-MiniLM-L6-v2 --texts summaries.tsv odd.json

A file of texts is a .json of strings, in lists or dicts of any depth, or a .tsv whose last column
is the text. `--out` writes what is printed to a file.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_AT_ONCE = 32
_QUOTED = 12  # texts of which differing tokens are shown


def read_texts(file: Path) -> list[str]:
    """Return the texts of a file, without those that stand in it twice."""
    if file.suffix == ".json":
        found = list(_strings(json.loads(file.read_text("utf-8"))))
    else:
        lines = file.read_text("utf-8").splitlines()
        found = [line.rpartition("\t")[2] for line in lines]
    return list(dict.fromkeys(found))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for own in value.values() if isinstance(value, dict) else value:
            yield from _strings(own)


class Original:
    """The weights of a BERT run by PyTorch alone: the mean of its last layer, at unit length."""

    def __init__(self, folder: Path, length: int) -> None:
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        self._weights = load_file(str(folder / "model.safetensors"))
        self._config = json.loads((folder / "config.json").read_text())
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(length)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of texts, unpadded."""
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]

    def embed(self, texts: Sequence[str]) -> Array:
        """Return the embeddings of some texts, `(texts, width)`."""
        import torch
        from torch.nn.functional import gelu, layer_norm, linear, softmax

        weights, width = self._weights, self._config["hidden_size"]
        heads, eps = self._config["num_attention_heads"], self._config["layer_norm_eps"]

        def dense(name: str, x: Any) -> Any:
            return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

        def norm(name: str, x: Any) -> Any:
            return layer_norm(x, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"], eps)

        ids = self.ids(texts)
        length = max(map(len, ids))
        padded = torch.tensor([row + [0] * (length - len(row)) for row in ids])
        mask = torch.tensor([[1.0] * len(row) + [0.0] * (length - len(row)) for row in ids])
        bias = (1 - mask)[:, None, None, :] * torch.finfo(torch.float32).min

        def split(x: Any) -> Any:
            return x.reshape(len(ids), length, heads, width // heads).transpose(1, 2)

        with torch.inference_mode():
            x = weights["embeddings.word_embeddings.weight"][padded]
            x = x + weights["embeddings.position_embeddings.weight"][:length]
            x = x + weights["embeddings.token_type_embeddings.weight"][0]
            x = norm("embeddings.LayerNorm", x)
            for layer in range(self._config["num_hidden_layers"]):
                at = f"encoder.layer.{layer}"
                query, key, value = (
                    split(dense(f"{at}.attention.self.{part}", x))
                    for part in ("query", "key", "value")
                )
                scores = query @ key.transpose(2, 3) / math.sqrt(width // heads) + bias
                mixed = (softmax(scores, -1) @ value).transpose(1, 2).reshape(x.shape)
                x = norm(
                    f"{at}.attention.output.LayerNorm",
                    x + dense(f"{at}.attention.output.dense", mixed),
                )
                inner = gelu(dense(f"{at}.intermediate.dense", x))
                x = norm(f"{at}.output.LayerNorm", x + dense(f"{at}.output.dense", inner))
            mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            embeddings: Array = (mean / mean.norm(dim=1, keepdim=True)).numpy()
            return embeddings


def compare_tokens(
    encoder: Any, core: Any, original: Original, texts: Sequence[str]
) -> dict[str, Any]:
    """Return how many texts have other tokens in the graph, and some of those.

    Args:
        encoder: Whose preprocessor makes the tokens of training.
        core: The graph of TensorFlow's own operations.
        original: With the library `tokenizers`.
        texts: To be compared.
    """
    from keras_mrl.text import tokenize

    expected, differing, other = original.ids(texts), [], 0
    for start in range(0, len(texts), 1024):
        some = list(texts[start : start + 1024])
        own = tokenize(encoder.preprocessor, some)
        of_core = core.eager([text.encode() for text in some])
        other += int((of_core["token_ids"] != own["token_ids"]).any(axis=1).sum())
        for row, (ids, mask) in enumerate(zip(own["token_ids"], own["padding_mask"], strict=True)):
            if ids[mask.astype(bool)].tolist() != expected[start + row]:
                differing.append(start + row)
    show = original.tokenizer.id_to_token
    shown = {}
    for row in differing[:_QUOTED]:
        [own] = tokenize(encoder.preprocessor, [texts[row]])["token_ids"]
        ids = own[: len(expected[row]) + 3].tolist()
        pairs = enumerate(zip(ids, expected[row], strict=False))
        first = next((place for place, pair in pairs if pair[0] != pair[1]), 0)
        shown[texts[row][:40]] = [
            [show(i) for i in some[first : first + 5]] for some in (ids, expected[row])
        ]
    return {
        "texts": len(texts),
        "differing": len(differing),
        "differing without tensorflow-text": other,
        "graph and tokenizers": shown,
    }


def compare_embeddings(
    embed: Callable[[list[bytes]], Array], original: Original, texts: Sequence[str]
) -> dict[str, Any]:
    """Return the cosines of served embeddings with those of the original."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    cosines = []
    for start in range(0, len(order), _AT_ONCE):
        some = [texts[row] for row in order[start : start + _AT_ONCE]]
        served = embed([text.encode() for text in some])
        cosines.append((served * original.embed(some)).sum(axis=1))
    all_of_them = np.concatenate(cosines)
    return {
        "texts": len(texts),
        "smallest cosine": float(all_of_them.min()),
        "share of 0.9999 or more": float((all_of_them >= 0.9999).mean()),
    }


def milliseconds(work: Callable[[], Any], repeats: int = 20) -> float:
    """Return the median time of some work."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return round(1000 * float(np.median(times)), 3)


def measure_times(
    session: Any, encoder: Any, core: Any, tokens: Any, original: Original, texts: Sequence[str]
) -> dict[str, Any]:
    """Return milliseconds a batch: the tokenizer of the client, the graph's, and whole answers."""
    from keras_mrl.text import tokenize

    times: dict[str, Any] = {}
    name = f"embed_{encoder.output_shape[-1]}"
    for size in (1, _AT_ONCE):
        some = list(texts[:size])
        column = np.array([text.encode() for text in some], dtype=object)
        own = tokenize(encoder.preprocessor, some)
        padded = {key: rows.astype(np.int32) for key, rows in own.items()}
        longest = max(map(len, original.ids(some)))
        cut = {key: rows[:, :longest] for key, rows in padded.items()}
        work: dict[str, Callable[[], Any]] = {
            "tokenizers, in a client": partial(original.ids, some),
            "tokenizer of the graph": partial(tokenize, encoder.preprocessor, some),
            "the same without tensorflow-text": partial(core.eager, column.tolist()),
            "texts to embeddings": partial(session.run, name, {"text": column}),
            "tokens to embeddings, padded": partial(tokens.run, name, padded),
            "tokens to embeddings, cut by the client": partial(tokens.run, name, cut),
        }
        times[str(size)] = {what: milliseconds(own) for what, own in work.items()}
    return times


def main() -> None:
    """Run the benchmark and print its results as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--texts", type=Path, required=True, nargs="+", metavar="FILE")
    parser.add_argument("--length", type=int, default=128, metavar="TOKENS")
    parser.add_argument("--tokenized", type=int, default=20_000, metavar="N", help="of each file")
    parser.add_argument(
        "--embedded", type=int, default=5_000, metavar="N", help="of the first file"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON to a file as well")
    arguments = parser.parse_args()

    from keras_mrl import TextEncoder
    from keras_mrl.text import tokenize
    from keras_mrl_export import export_saved_model
    from keras_mrl_export.text import TextGraph
    from keras_mrl_export.wordpiece import CoreWordPiece
    from keras_mrl_serving._session import SavedModelSession

    length = arguments.length
    encoder = TextEncoder.from_preset(arguments.encoder, pooling="mean", sequence_length=length)
    original = Original(arguments.encoder, length)
    files = {file.name: read_texts(file)[: arguments.tokenized] for file in arguments.texts}
    core = TextGraph(CoreWordPiece(encoder.preprocessor))
    compared = {
        name: compare_tokens(encoder, core, original, texts) for name, texts in files.items()
    }
    result: dict[str, Any] = {"encoder": arguments.encoder.name, "length": length}
    result["tokens"] = compared
    print(json.dumps(compared, indent=1), flush=True)
    texts = next(iter(files.values()))
    with tempfile.TemporaryDirectory() as folder:
        width = encoder.output_shape[-1]
        options: dict[str, Any] = {"dims": (width,), "identity": False}
        options["signatures"] = [f"embed_{width}"]
        version = export_saved_model(encoder, Path(folder) / "texts", texts[:8], **options)
        sample = tokenize(encoder.preprocessor, texts[:8])
        without = export_saved_model(encoder, Path(folder) / "tokens", sample, **options)
        with SavedModelSession(version) as session, SavedModelSession(without) as tokens:

            def embed(some: list[bytes]) -> Array:
                column = np.array(some, dtype=object)
                answer: Array = session.run(f"embed_{width}", {"text": column})["embedding"]
                return answer

            result["cosines"] = compare_embeddings(embed, original, texts[: arguments.embedded])
            print(json.dumps(result["cosines"]), flush=True)
            result["milliseconds"] = measure_times(session, encoder, core, tokens, original, texts)
            print(json.dumps(result["milliseconds"], indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
