"""What `benchmarks/contrastive.py --train` trains: encoders on two views of every image."""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.float32]

BATCH = 256
TEST = 2_000


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train both encoders and return the recall of every way at every dim."""
    import keras

    from keras_mrl import log_spaced_dims

    images = _images(arguments)
    images = images[np.random.default_rng(arguments.seed).permutation(len(images))]
    test = min(TEST, len(images) // 4)
    held, taught = images[:test], images[test:]
    width = 64 if images.shape[1] == 8 else 128
    dims = log_spaced_dims(width, smallest=4)
    random = np.random.default_rng(arguments.seed + 1)
    views = [_view(held, random) for _ in range(2)]
    found: dict[str, Any] = {
        "backend": keras.backend.backend(),
        "seed": arguments.seed,
        "epochs": arguments.epochs,
        "trained_on": len(taught),
        "tested_on": test,
        "image": list(images.shape[1:]),
    }
    encoders = {}
    for name, trained in (("mrl", dims), ("ff", (width,))):
        began = time.perf_counter()
        encoders[name] = _encoder(taught, trained, width, arguments)
        found[f"{name}_minutes"] = round((time.perf_counter() - began) / 60, 1)
    embedded = {name: [e.predict(v, verbose=0) for v in views] for name, e in encoders.items()}
    known = encoders["ff"].predict(_view(taught, random), verbose=0)
    centre = known.mean(axis=0)
    turn = np.linalg.svd(known - centre, full_matrices=False)[2].T
    embedded["pca"] = [(rows - centre) @ turn for rows in embedded["ff"]]
    for name, (anchors, others) in embedded.items():
        found[name] = {dim: round(_recall(anchors[:, :dim], others[:, :dim]), 4) for dim in dims}
    print(f"{'dim':>5}" + "".join(f"{name:>8}" for name in embedded))
    for dim in dims:
        print(f"{dim:>5}" + "".join(f"{found[name][dim]:>8.3f}" for name in embedded))
    return found


def _images(arguments: argparse.Namespace) -> Images:
    if arguments.data is None:
        from sklearn.datasets import load_digits

        return np.asarray(load_digits().images[..., None] / 16, dtype=np.float32)
    from cifar_embeddings import _read

    pixels, _ = _read(sorted(arguments.data.glob("train*.zip")), arguments.rows)
    return np.asarray(pixels / 255, dtype=np.float32)


def _encoder(images: Images, dims: tuple[int, ...], width: int, arguments: Any) -> Any:
    import keras

    from keras_mrl import ContrastiveLoss, MatryoshkaEncoder

    keras.utils.set_random_seed(arguments.seed)
    encoder = MatryoshkaEncoder(_tower(images.shape[1:], width), initial_temperature=0.1)
    steps = arguments.epochs * (len(images) // BATCH)
    rate = keras.optimizers.schedules.CosineDecay(2e-3, steps)
    encoder.compile(keras.optimizers.Adam(rate), ContrastiveLoss(dims, symmetric=True))
    random = np.random.default_rng(arguments.seed)

    class Views(keras.utils.PyDataset):
        def __len__(self) -> int:
            return len(images) // BATCH

        def __getitem__(self, index: int) -> Any:
            del index
            rows = images[random.choice(len(images), BATCH, replace=False)]
            return ({"anchor": _view(rows, random), "positive": _view(rows, random)},)

    encoder.fit(Views(), epochs=arguments.epochs, verbose=2)
    return encoder


def _tower(shape: tuple[int, ...], width: int) -> Any:
    import keras
    from keras import layers

    image = x = keras.Input(shape)
    if shape[0] == 8:  # two layers are enough for 64 pixels
        x = layers.Flatten()(x)
        for _ in range(2):
            x = layers.Dense(256, use_bias=False)(x)
            x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    else:
        for filters in (32, 64, 128):
            x = layers.Conv2D(filters, 3, strides=2, padding="same", use_bias=False)(x)
            x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    return keras.Model(image, layers.Dense(width)(layers.Flatten()(x)))


def _view(images: Images, random: np.random.Generator) -> Images:
    """Every image shifted by up to an eighth of its side, of another contrast and brightness.

    Images of several colours are mirrored by chance as well, and every colour changes on its own.
    """
    rows, side, _, colours = images.shape
    reach = side // 8
    padded = np.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    down, right = random.integers(0, 2 * reach + 1, (2, rows))
    across = np.arange(side)
    moved = padded[
        np.arange(rows)[:, None, None],
        (down[:, None] + across)[:, :, None],
        (right[:, None] + across)[:, None, :],
    ]
    if colours > 1:
        mirrored = random.random(rows) < 0.5
        moved[mirrored] = moved[mirrored, :, ::-1]
    contrast = random.uniform(0.6, 1.4, (rows, 1, 1, colours))
    brightness = random.uniform(-0.2, 0.2, (rows, 1, 1, colours))
    noise = random.normal(0, 0.05, moved.shape)
    return (moved * contrast + brightness + noise).astype("float32")


def _recall(anchors: Images, others: Images) -> float:
    from keras_mrl_serving import truncate

    dim = anchors.shape[1]
    nearest = np.argmax(truncate(anchors, dim) @ truncate(others, dim).T, axis=1)
    return float((nearest == np.arange(len(anchors))).mean())
