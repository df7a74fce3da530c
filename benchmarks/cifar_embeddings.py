"""Embeddings of real images to benchmark retrieval on: a Matryoshka net and a fixed-feature one.

    python benchmarks/cifar_embeddings.py --data FOLDER --out FOLDER [--epochs 8] [--seed 0]

Trains the same small residual net twice on CIFAR-100's 50,000 training images, with a head per
dim (8 to 512) and with one head, and saves the features of both: 50,000 training images as the
gallery, 10,000 test images as queries.

`--data` holds `train*.zip` and `test.zip`, images in one folder per class
(`<class>/<anything>.png`, .webp, ...). Where the network allows it, `keras.datasets.cifar100`
gives the same images. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

WIDTH = 512
DIMS = {"mrl": (8, 16, 32, 64, 128, 256, 512), "ff": (512,)}
BATCH = 128


def main() -> None:
    """Read, train twice, save."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the zips")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--epochs", type=int, default=8, help="of each net (default: %(default)s)")
    parser.add_argument("--rows", type=int, help="train and embed no more than so many images")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    gallery = _read(sorted(arguments.data.glob("train*.zip")), arguments.rows)
    queries = _read([arguments.data / "test.zip"], arguments.rows)
    np.save(arguments.out / "gallery_labels.npy", gallery[1])
    np.save(arguments.out / "queries_labels.npy", queries[1])
    summary: dict[str, Any] = {"epochs": arguments.epochs, "seed": arguments.seed}
    for name, dims in DIMS.items():
        started = time.perf_counter()
        model = _train(gallery, dims, arguments.epochs, arguments.seed)
        minutes = (time.perf_counter() - started) / 60
        scored = model.evaluate(*queries, batch_size=500, verbose=0, return_dict=True)
        accuracy = {dim: round(scored[f"accuracy_{dim}"], 4) for dim in dims}
        for part, (images, _) in (("gallery", gallery), ("queries", queries)):
            features = model.backbone.predict(images, batch_size=500, verbose=0)
            np.save(arguments.out / f"{name}_{part}.npy", features.astype(np.float32))
        model.save(arguments.out / f"{name}.keras")
        summary[name] = {"minutes": round(minutes, 1), "accuracy": accuracy}
    (arguments.out / "summary.json").write_text(json.dumps(summary))
    print(json.dumps(summary))


def _read(paths: list[Path], rows: int | None) -> tuple[npt.NDArray[np.uint8], Any]:
    from PIL import Image

    entries = []
    for path in paths:
        with zipfile.ZipFile(path) as images:
            entries += [(n, images.read(n)) for n in images.namelist() if not n.endswith("/")]
    classes = sorted({PurePosixPath(name).parent.name for name, _ in entries})
    labels = [classes.index(PurePosixPath(name).parent.name) for name, _ in entries[:rows]]
    pixels = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for _, data in entries[:rows]]
    return np.stack(pixels), np.asarray(labels, np.int64)


def _train(part: Any, dims: tuple[int, ...], epochs: int, seed: int) -> Any:
    import keras
    import tensorflow as tf

    from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, MatryoshkaLoss, MatryoshkaMetric

    keras.utils.set_random_seed(seed)
    images, labels = part
    model = MatryoshkaClassifier(_backbone(), MatryoshkaHead(100, dims=dims))
    steps = epochs * -(-len(labels) // BATCH)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, steps, warmup_target=2e-3, warmup_steps=steps // 10
    )
    model.compile(
        optimizer=keras.optimizers.AdamW(rate, weight_decay=0.02),
        loss=MatryoshkaLoss(
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        ),
        metrics=[
            MatryoshkaMetric(keras.metrics.SparseCategoricalAccuracy(name="accuracy"), dims),
        ],
    )
    data = tf.data.Dataset.from_tensor_slices((images, labels))
    data = data.shuffle(len(labels), seed=seed).batch(BATCH).map(_moved).prefetch(2)
    model.fit(data, epochs=epochs, verbose=2)
    return model


def _moved(images: Any, labels: Any) -> tuple[Any, Any]:
    """Mirror half of the images, and shift each batch by up to four pixels."""
    import tensorflow as tf

    padded = tf.pad(images, [[0, 0], [4, 4], [4, 4], [0, 0]])
    rows = tf.shape(images)[0]
    images = tf.image.random_crop(padded, (rows, 32, 32, 3))
    return tf.image.random_flip_left_right(images), labels


def _backbone() -> Any:
    import keras
    from keras import layers

    def normal(x: Any, filters: int, strides: int = 1) -> Any:
        x = layers.Conv2D(filters, 3, strides=strides, padding="same", use_bias=False)(x)
        return layers.BatchNormalization(momentum=0.9)(x)

    image = keras.Input((32, 32, 3), name="image")
    x = layers.Rescaling(1 / 64, offset=-2)(image)
    x = layers.ReLU()(normal(x, 64, 2))
    for filters in (128, 256):
        x = layers.ReLU()(normal(x, filters, 2))
        inner = layers.ReLU()(normal(x, filters))
        x = layers.ReLU()(layers.Add()([x, normal(inner, filters)]))
    x = layers.ReLU()(normal(x, WIDTH))
    return keras.Model(image, layers.GlobalAveragePooling2D()(x), name="backbone")


if __name__ == "__main__":
    main()
