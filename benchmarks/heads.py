"""Heads on frozen features: Matryoshka against its alternatives, by dim, epochs and seed.

    python benchmarks/heads.py --data data_full.json --encoder FOLDER --out FOLDER
    python benchmarks/heads.py --out FOLDER --page docs/benchmarks

The first command embeds CLINC150 once, with the frozen encoder that
`keras_hub.models.BertBackbone.from_preset("hf://sentence-transformers/all-MiniLM-L6-v2")` makes and
`save_to_preset(FOLDER)` writes, `tokenizer.json` beside it. Then it trains the small net of
`keras-mrl compare` on these features: nested (MRL, MRL-E) and a net per dim (FF), for each number
of epochs and each seed; and cuts the widest FF net. The peak of the rate is chosen on `val` for
each net before. What is there already is not done again. `features.npz` is what
`keras-mrl compare --data` takes.

The second command writes the JSON and the figure beside the page.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

import keras
import numpy as np
import numpy.typing as npt

from keras_mrl import MatryoshkaAdaptor
from keras_mrl.baselines import first_coordinates, low_rank_head, principal_components, random_probe
from keras_mrl.comparison.nets import Net, start_scaled
from keras_mrl.comparison.training import BATCH, compile_net

Array = npt.NDArray[Any]
Sides = tuple[Array, Array]
Right = dict[str, dict[int, Array]]  # method to dim to which rows are right

DIMS = (2, 4, 8, 16, 32, 64, 128, 256)
EPOCHS = (30, 10, 3, 1)
SEEDS = range(5)
RATES = (1e-3, 2e-3, 4e-3)
_RATE_EPOCHS, _RATE_SEED = 10, 99  # of the nets that choose the rate


def main() -> None:
    """Embed, choose the rates, train, measure; or write the page's files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="CLINC150's data_full.json")
    parser.add_argument("--encoder", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--out", type=Path, required=True, help="folder of features and results")
    parser.add_argument("--page", type=Path, help="folder of the page: write its JSON and figure")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.page is not None:
        from heads_page import write

        write(arguments.out, arguments.page)
        return
    file = arguments.out / "features.npz"
    if not file.exists():
        np.savez(file, allow_pickle=False, **features(arguments.data, arguments.encoder))
    with np.load(file) as arrays:
        run = Run(dict(arrays), arguments.out)
    run.choose_rates()
    for step in (run.train_all, run.cut_by_learning):
        for seed in SEEDS:
            for epochs in EPOCHS:
                step(epochs, seed)


def features(data: Path, folder: Path) -> dict[str, Array]:
    """Return embeddings of unit length and labels of `train`, `val` and `test`."""
    from exits_texts import Texts, Tokens, embedder, means_of_layers

    texts, tokens, encoder = Texts.read(data), Tokens(folder), embedder(folder)
    arrays: dict[str, Array] = {}
    for part in ("train", "val", "test"):
        means = means_of_layers(encoder, tokens.ids(texts.texts[part]), ())["last"]
        arrays[f"x_{part}"] = means / np.linalg.norm(means, axis=1, keepdims=True)
        arrays[f"y_{part}"] = np.array(texts.classes)[texts.labels[part]]
    return arrays


def nets(seed: int) -> list[Net]:
    """Return the nets of one seed."""
    nested = [Net("mrl", DIMS, seed), Net("mrl_e", DIMS, seed)]
    return [*nested, *(Net("ff", (dim,), seed) for dim in reversed(DIMS))]


class Run:
    """What is trained and measured, in a folder.

    Args:
        arrays: `x_` and `y_` of `train`, `val` and `test`.
        folder: Of the results.
    """

    def __init__(self, arrays: dict[str, Array], folder: Path) -> None:
        self.inputs = {name[2:]: array for name, array in arrays.items() if name[0] == "x"}
        classes = np.unique(arrays["y_train"])
        self.labels = {
            part: np.searchsorted(classes, arrays[f"y_{part}"]).astype(np.int64)
            for part in self.inputs
        }
        self.classes, self.folder = len(classes), folder
        self.rates: dict[str, float] = {}

    def train(self, net: Net, epochs: int, rate: float) -> keras.Model:
        """Return a net, trained."""
        inputs = self.inputs["train"]
        model = net.make(inputs.shape[1:], self.classes, 0)
        start_scaled(model, inputs)
        compile_net(model, net, epochs, len(inputs), rate)
        model.fit(inputs, self.labels["train"], batch_size=BATCH, epochs=epochs, verbose=0)
        return model

    def choose_rates(self) -> None:
        """Choose the rate of each net on `val`, with a seed that no result has."""
        file = self.folder / "rates.json"
        accuracies = json.loads(file.read_text()) if file.exists() else {}
        for net in nets(_RATE_SEED):
            name = _key(net)
            tried = accuracies.setdefault(name, {})
            for rate in RATES:
                if str(rate) not in tried:
                    logits = _predict(self.train(net, _RATE_EPOCHS, rate), self.inputs["val"])
                    right = logits.argmax(-1) == self.labels["val"][:, None]
                    tried[str(rate)] = right.mean(axis=0).tolist()
                    file.write_text(json.dumps(accuracies, indent=1))
            self.rates[name] = float(max(tried, key=lambda rate: np.mean(tried[rate])))
            print(name, self.rates[name], flush=True)

    def train_all(self, epochs: int, seed: int) -> None:
        """Train and measure the nets of one number of epochs and one seed, and cheap cuts."""
        file = self.folder / f"nets_{epochs}_{seed}.npz"
        if file.exists():
            return
        heads: dict[str, Right] = {"val": {}, "test": {}}
        sides: dict[str, dict[str, Sides]] = {"val": {}, "test": {}}
        for net in nets(seed):
            model = self.train(net, epochs, self.rates[_key(net)])
            gallery = _predict(model.backbone, self.inputs["train"])
            for part in heads:
                queries = _predict(model.backbone, self.inputs[part])
                sides[part][_key(net)] = gallery, queries
                logits = _predict(model, self.inputs[part])
                for column, dim in enumerate(net.dims):
                    right = logits[:, column].argmax(-1) == self.labels[part]
                    heads[part].setdefault(net.method, {})[dim] = right
            if _key(net) == f"ff_{DIMS[-1]}":
                full = model
        kernel, bias = full.head.weights_at(DIMS[-1])
        gallery = sides["test"][f"ff_{DIMS[-1]}"][0]
        components = principal_components(gallery, DIMS[-1])
        svd = low_rank_head(kernel, bias, DIMS[-1])
        arrays: dict[str, Array] = {}
        for part, by_method in heads.items():
            labels, embedded = self.labels[part], sides[part]
            full_sides = embedded[f"ff_{DIMS[-1]}"]
            by_method["svd"] = {
                dim: low_rank_head(kernel, bias, dim).logits(full_sides[1]).argmax(-1) == labels
                for dim in DIMS
            }
            searched = {
                "mrl": self._search(embedded["mrl"], labels),
                "mrl_e": self._search(embedded["mrl_e"], labels),
                "pca": self._search(_both(components.embed, full_sides), labels),
                "svd": self._search(_both(svd.embed, full_sides), labels),
                "rand_fs": self._search(full_sides, labels),
                "ff": {dim: self._nearest(*embedded[f"ff_{dim}"], labels) for dim in DIMS},
            }
            arrays |= _packed(part, "top1", by_method) | _packed(part, "nn1", searched)
        rows = {part: pairs[f"ff_{DIMS[-1]}"][1] for part, pairs in sides.items()}
        _save(self.folder / f"full_{epochs}_{seed}.npz", {"train": gallery, **rows})
        _save(file, arrays)
        print(epochs, seed, flush=True)

    def cut_by_learning(self, epochs: int, seed: int) -> None:
        """Cut the widest net of one cell by what is learnt itself: Rand. LP and the adaptor."""
        file = self.folder / f"learnt_{epochs}_{seed}.npz"
        if file.exists():
            return
        with np.load(self.folder / f"full_{epochs}_{seed}.npz") as full:
            parts = dict(full)
        gallery, labels = parts["train"], self.labels["train"]
        probes = {dim: random_probe(gallery, labels, dim, seed) for dim in DIMS[:-1]}
        adaptor = MatryoshkaAdaptor(DIMS, "listwise", verbose=0, seed=seed).fit(gallery)
        arrays: dict[str, Array] = {}
        for part in ("val", "test"):
            expected, queries = self.labels[part], parts[part]
            right = {dim: probe.predict(queries) == expected for dim, probe in probes.items()}
            sides = _both(adaptor.transform, (gallery, queries))
            arrays |= _packed(part, "top1", {"rand_lp": right})
            arrays |= _packed(part, "nn1", {"adaptor": self._search(sides, expected)})
        _save(file, arrays)
        print("learnt", epochs, seed, flush=True)

    def _search(self, sides: Sides, labels: Array) -> dict[int, Array]:
        """Whether the nearest by the first coordinates is of the class of each row, by dim."""
        gallery, queries = sides
        return {
            dim: self._nearest(
                first_coordinates(gallery, dim), first_coordinates(queries, dim), labels
            )
            for dim in DIMS
        }

    def _nearest(self, gallery: Array, queries: Array, labels: Array) -> Array:
        """Whether the nearest training row, by cosine, is of the class of each row."""
        gallery, queries = (
            side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-12)
            for side in (gallery, queries)
        )
        nearest = [(block @ gallery.T).argmax(axis=1) for block in np.array_split(queries, 8)]
        right: Array = self.labels["train"][np.concatenate(nearest)] == labels
        return right


def _key(net: Net) -> str:
    return f"ff_{net.dims[-1]}" if net.method == "ff" else net.method


def _predict(model: keras.Model, inputs: Array) -> Array:
    return np.asarray(model.predict(inputs, batch_size=1000, verbose=0), np.float32)


def _both(embed: Any, sides: Sides) -> Sides:
    return embed(sides[0]), embed(sides[1])


def _packed(part: str, measure: str, rights: Right) -> dict[str, Array]:
    return {
        f"{part}/{measure}/{method}/{dim}": np.packbits(right)
        for method, by_dim in rights.items()
        for dim, right in by_dim.items()
    }


def _save(file: Path, arrays: dict[str, Array]) -> None:
    partial = file.with_name(f"partial-{file.name}")
    np.savez(partial, allow_pickle=False, **arrays)
    partial.replace(file)


if __name__ == "__main__":
    main()
