"""A text encoder with exits over its layers, trained on intents with the encoder left as it is.

The encoder is frozen, so what its layers say of a text never changes: the mean of each layer over
the tokens is computed once, and the exits, heads and the model before the encoder are trained on
these means by the same `fit`. The model that is served has the same layers behind the encoder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from exits_front import NAME as FRONT
from exits_front import Ngrams

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead

Ids = list[npt.NDArray[np.int32]]
Inputs = dict[str, npt.NDArray[Any]]
Features = dict[str, npt.NDArray[np.float32]]

DIMS = (16, 64, 256)
MOST_TOKENS = 64


@dataclass(frozen=True)
class Texts:
    """Texts and their intents, in parts.

    Args:
        texts: By the name of the part.
        labels: Class ids by the name of the part, for those whose texts have an intent.
        classes: Names of the intents.
    """

    texts: Mapping[str, list[str]]
    labels: Mapping[str, npt.NDArray[np.int64]]
    classes: list[str]

    @classmethod
    def read(cls, file: Path) -> Texts:
        """Read `{"train": [[text, intent], ...], "val": ..., "test": ..., "oos_test": ...}`.

        Raises:
            ValueError: If the file is no such JSON.
        """
        try:
            parts = json.loads(file.read_text(encoding="utf-8"))
            texts = {name: [text for text, _ in parts[name]] for name in _PARTS}
            classes = sorted({intent for _, intent in parts["train"]})
            number = {intent: i for i, intent in enumerate(classes)}
            labels = {
                name: np.array([number[intent] for _, intent in parts[name]])
                for name in _PARTS
                if not name.startswith("oos")
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"The data must be CLINC150's data_full.json, with the parts {', '.join(_PARTS)}. "
                f"Received: {file}: {type(error).__name__}: {error}. Download it from the "
                "repository clinc/oos-eval."
            ) from error
        return cls(texts, labels, classes)


_PARTS = ("train", "val", "test", "oos_test")


class Tokens:
    """The WordPiece tokens of texts, as the encoder was trained on them."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(MOST_TOKENS)

    @property
    def vocabulary(self) -> list[str]:
        """The tokens by id."""
        by_token = self._tokenizer.get_vocab()
        return sorted(by_token, key=by_token.__getitem__)

    def ids(self, texts: Sequence[str]) -> Ids:
        """Return the token ids of each text."""
        rows = self._tokenizer.encode_batch(list(texts))
        return [np.array(row.ids, np.int32) for row in rows]


def padded(rows: Ids, length: int | None = None) -> Inputs:
    """Return the inputs of the encoder, padded to the longest row or to `length` tokens."""
    lengths = np.array([len(row) for row in rows])
    length = int(lengths.max()) if length is None else length
    mask = np.arange(length) < lengths[:, None]
    tokens = np.zeros(mask.shape, np.int32)
    tokens[mask] = np.concatenate([row[:length] for row in rows])
    return {
        "token_ids": tokens,
        "padding_mask": mask.astype(np.int32),
        "segment_ids": np.zeros_like(tokens),
    }


def by_length(rows: Ids, size: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yield which rows to run together: rows of like length."""
    order = np.argsort([len(row) for row in rows], kind="stable")
    for start in range(0, len(order), size):
        yield order[start : start + size]


def embedder(folder: Path) -> keras.Model:
    """Return the encoder of a folder, with the mean over the tokens behind it, frozen."""
    import keras_hub

    backbone = keras_hub.models.BertBackbone.from_preset(str(folder))
    return frozen(backbone)


def frozen(backbone: Any) -> keras.Model:
    """Return a BERT of keras-hub with the mean over the tokens behind it, frozen."""
    import keras_hub

    backbone.trainable = False
    return keras_hub.models.BertTextEmbedder(backbone, normalize=False)


def means_of_layers(encoder: keras.Model, rows: Ids, layers: Sequence[str]) -> Features:
    """Return the mean of each layer over the tokens of each row, and that of the last layer."""
    backbone = encoder.backbone
    mask = backbone.input["padding_mask"]
    outputs = {
        name: keras.layers.GlobalAveragePooling1D()(backbone.get_layer(name).output, mask=mask)
        for name in layers
    }
    model = keras.Model(backbone.input, outputs | {"last": encoder.output})
    width = encoder.output_shape[-1]
    features = {name: np.empty((len(rows), width), np.float32) for name in (*layers, "last")}
    for chosen in by_length(rows, 64):
        made = model.predict_on_batch(padded([rows[i] for i in chosen]))
        for name, array in made.items():
            features[name][chosen] = array
    return features


class Intents:
    """Two models of the same layers: the one that is served, and the one that is trained.

    Args:
        encoder: What `frozen` returns.
        ngrams: The classifier before the encoder.
        layers: Names of the layers that an exit is trained on.
        served_layers: Those of them that are exits of the model that is served.
        classes: Number of intents.

    Attributes:
        served: From tokens to logits; its exits are the n-grams, `served_layers` and the whole
            encoder.
        trained: The exits of `layers` and the last, from the means of the layers.
    """

    def __init__(
        self,
        encoder: keras.Model,
        ngrams: Ngrams,
        layers: Sequence[str],
        served_layers: Sequence[str],
        classes: int,
    ) -> None:
        head = MatryoshkaHead(classes, dims=DIMS)
        pooling = keras.Sequential(_small_net(), name="pooling")
        branches = {
            name: keras.Sequential(
                [keras.layers.GlobalAveragePooling1D(), *_small_net()], name=f"{name}_branch"
            )
            for name in layers
        }
        front = ngrams.model(DIMS[-1])
        self.served = MatryoshkaClassifier(
            encoder,
            head,
            pooling=pooling,
            exits=(front, *((name, branches[name]) for name in served_layers)),
            name="intents",
        )
        front_head = self.served.exit_heads[FRONT]
        kernels = [ngrams.kernel(dim) for dim in DIMS]
        front_head.set_weights([*kernels, *[np.zeros(classes)] * len(DIMS)])
        self._front = keras.Model(front.inputs, front_head(front.output))

        width = encoder.output_shape[-1]
        means = {name: keras.Input((width,), name=mean_of(name)) for name in (*layers, "last")}
        inputs = {own.name: own for own in means.values()}
        exits = []
        for name, layer in branches.items():
            x = means[name]
            for part in layer.layers[1:]:
                x = part(x)
            exits.append(keras.Model(inputs, x, name=name))
        whole = keras.Model(inputs, pooling(means["last"]), name="means")
        self.trained = MatryoshkaClassifier(whole, head, exits=exits, name="intents_on_means")

    def fit(
        self,
        features: Features,
        labels: npt.NDArray[np.int64],
        epochs: int,
        seed: int,
        batch_size: int = 128,
    ) -> None:
        """Train all exits on the means, with AdamW and one cycle of the rate."""
        steps = epochs * -(-len(labels) // batch_size)
        rate = keras.optimizers.schedules.CosineDecay(
            0.0, steps - steps // 10, warmup_target=1e-3, warmup_steps=max(1, steps // 10)
        )
        loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
        self.trained.compile(keras.optimizers.AdamW(rate, weight_decay=0.05), loss)
        keras.utils.set_random_seed(seed)
        targets = np.eye(self.trained.head.num_classes, dtype=np.float32)[labels]
        inputs = named(features)
        self.trained.fit(inputs, targets, batch_size=batch_size, epochs=epochs, verbose=2)
        self._carry()

    def load(self, file: Path) -> None:
        """Read the weights of `trained`."""
        self.trained.load_weights(file)
        self._carry()

    def _carry(self) -> None:
        """Give `served` the heads of the exits, the only weights that it does not share."""
        for name, head in self.served.exit_heads.items():
            if name != FRONT:
                head.set_weights(self.trained.exit_heads[name].get_weights())

    def logits(self, features: Features, rows: Ids) -> dict[str, npt.NDArray[np.float32]]:
        """Return the logits of all exits, `(rows, num_dims, num_classes)` each."""
        front = self._front.predict(padded(rows), batch_size=256, verbose=0)
        made = self.trained.all_exits().predict(named(features), batch_size=256, verbose=0)
        return {FRONT: front, **{name: made[name] for name in (*self.trained.exits, "last")}}


def _small_net() -> list[keras.layers.Layer]:
    return [
        keras.layers.BatchNormalization(center=False, scale=False),
        keras.layers.Dense(512, activation="gelu"),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(DIMS[-1]),
    ]


def named(features: Features) -> Features:
    """Return the means of layers by the names of inputs that take them."""
    return {mean_of(name): array for name, array in features.items()}


def mean_of(layer: str) -> str:
    """Return the name of the input that takes the mean of a layer."""
    return f"{layer}_mean"
