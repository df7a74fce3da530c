"""The paper's claim with a pretrained encoder: MiniLM fine-tuned, nested against a net per dim.

    python benchmarks/fine_tuned.py --data data_full.json --encoder FOLDER --out FOLDER
    python benchmarks/fine_tuned.py --out FOLDER --page docs/benchmarks

The last two layers of all-MiniLM-L6-v2 are trained on CLINC150. The layers before them stay as
they are, so their output is computed once. Every net begins with its projection and its head
alone, on the frozen encoder; then its two layers are trained, too. The peak of the rate is chosen
on `val` with the first seed; after every epoch `val` and `test` are judged, and `val` chooses the
epoch of each dim. What is there already is not done again.

`--encoder` is the folder that `keras_hub.models.BertBackbone.from_preset(
"hf://sentence-transformers/all-MiniLM-L6-v2")` and `save_to_preset(FOLDER)` write, with
`tokenizer.json` beside it. The second command writes the page with its JSON and figure.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import numpy.typing as npt
from exits_texts import Texts, Tokens, by_length, padded

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, MatryoshkaLoss

Array = npt.NDArray[Any]

DIMS = (8, 16, 32, 64, 128, 256, 384)
SEPARATE = (384, 32, 8)
FROZEN = "transformer_layer_3"  # the last of the frozen ones
TRAINED = ("transformer_layer_4", "transformer_layer_5")
RATES = (3e-4, 1e-4)
EPOCHS, SEEDS, BATCH = 2, range(3), 64
_HEAD_EPOCHS, _HEAD_RATE, _HEAD_BATCH = 10, 2e-3, 128
_PARTS = ("train", "val", "test")


def main() -> None:
    """Compute what is frozen, train, judge; or write the page's files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="CLINC150's data_full.json")
    parser.add_argument("--encoder", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--out", type=Path, required=True, help="folder of states and results")
    parser.add_argument("--page", type=Path, help="folder of the page: write its files")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.page is not None:
        from fine_tuned_page import write

        write(arguments.out, arguments.page)
        return
    run = Run(arguments.data, arguments.encoder, arguments.out)
    nets = (DIMS, *((dim,) for dim in SEPARATE))
    for rate in RATES:
        for dims in nets:
            run.train(dims, SEEDS[0], rate)
    for seed in SEEDS[1:]:
        for dims in nets:
            run.train(dims, seed, run.best_rate(dims))


class States:
    """The output of the frozen layers, of rows of unequal length.

    Args:
        tokens: Side by side, `(all tokens, width)`.
        lengths: Of the rows.
    """

    def __init__(self, tokens: Array, lengths: Array) -> None:
        self.tokens, self.lengths = tokens, lengths
        self.starts = np.cumsum(lengths) - lengths

    def batch(self, rows: Array) -> dict[str, Array]:
        """Return some rows, padded to a multiple of eight."""
        length = -(-int(self.lengths[rows].max()) // 8) * 8
        mask = np.arange(length) < self.lengths[rows, None]
        states = np.zeros((*mask.shape, self.tokens.shape[1]), np.float32)
        places = [np.arange(self.starts[row], self.starts[row] + self.lengths[row]) for row in rows]
        states[mask] = self.tokens[np.concatenate(places)]
        return {"states": states, "padding_mask": mask}


class Batches(keras.utils.PyDataset):
    """Batches of rows of like length, in another order each epoch."""

    def __init__(self, states: States, labels: Array, seed: int) -> None:
        super().__init__()
        self.states, self.labels, self.generator = states, labels, np.random.default_rng(seed)
        self.on_epoch_end()

    def on_epoch_end(self) -> None:
        """Draw the batches of an epoch: a little noise, then by length."""
        count = len(self.labels)
        nearly = self.states.lengths + self.generator.uniform(0, 3, count)
        batches = np.array_split(np.argsort(nearly), -(-count // BATCH))
        self.batches = [batches[place] for place in self.generator.permutation(len(batches))]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Return one batch."""
        rows = self.batches[index]
        return self.states.batch(rows), self.labels[rows]


class Run:
    """What is trained and judged, in a folder.

    Args:
        data: CLINC150's data_full.json.
        encoder: Folder of all-MiniLM-L6-v2.
        folder: Of the results.
    """

    def __init__(self, data: Path, encoder: Path, folder: Path) -> None:
        import keras_hub

        texts, tokens = Texts.read(data), Tokens(encoder)
        self.folder, self.labels = folder, texts.labels
        self.classes = len(texts.classes)
        backbone = keras_hub.models.BertBackbone.from_preset(str(encoder))
        self.layers = [backbone.get_layer(name) for name in TRAINED]
        file = folder / "states.npz"
        if not file.exists():
            trunk = keras.Model(backbone.input, backbone.get_layer(FROZEN).output)
            arrays = {}
            for part in _PARTS:
                ids = tokens.ids(texts.texts[part])
                rows: list[Any] = [None] * len(ids)
                for chosen in by_length(ids, BATCH):
                    made = trunk.predict_on_batch(padded([ids[row] for row in chosen]))
                    for row, own in zip(chosen, made, strict=True):
                        rows[row] = own[: len(ids[row])].astype(np.float16)
                arrays[f"tokens_{part}"] = np.concatenate(rows)
                arrays[f"lengths_{part}"] = np.array([len(own) for own in ids])
            np.savez(file, allow_pickle=False, **arrays)
        with np.load(file) as stored:
            self.states = {
                part: States(stored[f"tokens_{part}"], stored[f"lengths_{part}"]) for part in _PARTS
            }
        body = self.body()
        self.means = {part: embed(body, self.states[part]) for part in _PARTS}

    def body(self) -> keras.Model:
        """Return the pretrained layers that are trained, and the mean over the tokens."""
        width = self.layers[0].output.shape[-1]
        states = keras.Input((None, width), name="states")
        mask = keras.Input((None,), dtype="bool", name="padding_mask")
        x = states
        for layer in self.layers:
            own = type(layer).from_config(layer.get_config())
            x = own(x, padding_mask=mask)
            own.set_weights(layer.get_weights())
        mean = keras.layers.GlobalAveragePooling1D()(x, mask=mask)
        return keras.Model({"states": states, "padding_mask": mask}, mean)

    def train(self, dims: tuple[int, ...], seed: int, rate: float) -> None:
        """Train the head on the frozen encoder, then all; judge after every epoch."""
        file = self.file(dims, seed, rate)
        if file.exists():
            return
        keras.utils.set_random_seed(seed)
        body = self.body()
        projection = keras.Sequential(
            [keras.layers.Dense(dims[-1]), keras.layers.BatchNormalization(momentum=0.9)]
        )
        head = MatryoshkaHead(self.classes, dims=dims)
        mean = keras.Input(body.output.shape[1:])
        small = MatryoshkaClassifier(keras.Model(mean, projection(mean)), head)
        steps = -(-len(self.labels["train"]) // _HEAD_BATCH)
        compile_for(small, _HEAD_RATE, _HEAD_EPOCHS * steps)
        small.fit(
            self.means["train"],
            self.labels["train"],
            batch_size=_HEAD_BATCH,
            epochs=_HEAD_EPOCHS,
            verbose=0,
        )
        whole = MatryoshkaClassifier(keras.Model(body.input, projection(body.output)), head)
        batches = Batches(self.states["train"], self.labels["train"], seed)
        compile_for(whole, rate, EPOCHS * len(batches))
        arrays = self.judged(small, body, 0, dims)
        for epoch in range(1, EPOCHS + 1):
            whole.fit(batches, initial_epoch=epoch - 1, epochs=epoch, verbose=0)
            arrays |= self.judged(small, body, epoch, dims)
        partial = file.with_name(f"partial-{file.name}")
        np.savez(partial, allow_pickle=False, **arrays)
        partial.replace(file)
        on_val = np.unpackbits(arrays[f"val/{EPOCHS}/{dims[-1]}"])[: len(self.labels["val"])]
        print(file.stem, f"{on_val.mean():.2%} of val at {dims[-1]} dims", flush=True)

    def judged(
        self, small: keras.Model, body: keras.Model, epoch: int, dims: tuple[int, ...]
    ) -> dict[str, Array]:
        """Return which rows of `val` and `test` are right, by epoch and dim."""
        arrays = {}
        for part in ("val", "test"):
            means = self.means[part] if epoch == 0 else embed(body, self.states[part])
            logits = small.predict(means, batch_size=1000, verbose=0)
            for column, dim in enumerate(dims):
                right = np.asarray(logits)[:, column].argmax(-1) == self.labels[part]
                arrays[f"{part}/{epoch}/{dim}"] = np.packbits(right)
        return arrays

    def file(self, dims: tuple[int, ...], seed: int, rate: float) -> Path:
        """Return the file of the results of a net."""
        name = "mrl" if len(dims) > 1 else f"ff_{dims[0]}"
        return self.folder / f"{name}_{seed}_{rate:g}.npz"

    def best_rate(self, dims: tuple[int, ...]) -> float:
        """Return the rate that is best on `val` with the first seed, over its dims."""

        def accuracy(rate: float) -> float:
            with np.load(self.file(dims, SEEDS[0], rate)) as arrays:
                rights = [np.unpackbits(arrays[f"val/{EPOCHS}/{dim}"]) for dim in dims]
            return float(np.mean(rights))

        return max(RATES, key=accuracy)


def compile_for(model: keras.Model, rate: float, steps: int) -> None:
    """Give a model its loss, and an optimizer whose rate rises to `rate` and ends at 0."""
    warmup = max(1, steps // 10)
    cycle = keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - warmup), warmup_target=rate, warmup_steps=warmup
    )
    inner = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(cycle, weight_decay=0.02), MatryoshkaLoss(inner))


def embed(body: keras.Model, states: States) -> Array:
    """Return the means of all rows."""
    means = np.empty((len(states.lengths), body.output.shape[-1]), np.float32)
    for rows in np.array_split(np.argsort(states.lengths, kind="stable"), len(means) // 100 + 1):
        means[rows] = body.predict_on_batch(states.batch(rows))
    return means


if __name__ == "__main__":
    main()
