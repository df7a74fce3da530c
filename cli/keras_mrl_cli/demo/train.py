"""A small convolutional net with a nested head, trained by `model.fit`."""

from __future__ import annotations

from typing import Any

import keras
from keras import layers

from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, MatryoshkaLoss, MatryoshkaMetric

from .data import Part, with_shifts

DIMS = (2, 4, 8, 16, 32, 64)


def train(part: Part, epochs: int, seed: int) -> keras.Model:
    """Return the trained model; prints a line per epoch.

    Args:
        part: The training images; they are shown moved by a pixel to every side, too.
        epochs: Passes over them.
        seed: Of the initial weights, the shuffling and the dropout.
    """
    keras.utils.set_random_seed(seed)
    shown = with_shifts(part)
    model = MatryoshkaClassifier(_backbone(), MatryoshkaHead(10, dims=DIMS), name="digits")
    accuracy = keras.metrics.SparseCategoricalAccuracy(name="accuracy")
    model.compile(
        optimizer=keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(3e-3, epochs * -(-len(shown.labels) // 32)),
        ),
        loss=MatryoshkaLoss(keras.losses.SparseCategoricalCrossentropy(from_logits=True)),
        metrics=[MatryoshkaMetric(accuracy, DIMS)],
    )
    model.fit(
        shown.images,
        shown.labels,
        batch_size=32,
        epochs=epochs,
        verbose=0,
        callbacks=[_EpochLines(epochs)],
    )
    return model


def _backbone() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            *_convolution(32, 1),
            *_convolution(64, 2),
            *_convolution(64, 1),
            layers.Flatten(),
            layers.Dropout(0.3),
            layers.Dense(DIMS[-1]),
        ],
        name="backbone",
    )


def _convolution(filters: int, strides: int) -> list[keras.layers.Layer]:
    return [
        layers.Conv2D(filters, 3, strides=strides, padding="same", use_bias=False),
        layers.BatchNormalization(),
        layers.ReLU(),
    ]


class _EpochLines(keras.callbacks.Callback):
    """One line per epoch: the loss, and the training accuracy at every dim."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        by_dim = "  ".join(f"{dim}: {100 * logs[f'accuracy_{dim}']:5.1f}" for dim in DIMS)
        shown = f"epoch {epoch + 1:3d}/{self.epochs}  loss {logs['loss']:7.3f}"
        print(f"  {shown}  accuracy at dim {by_dim}", flush=True)
