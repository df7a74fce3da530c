"""A backbone of keras.applications with exits: easy images leave it early.

    pip install 'keras-mrl[tensorflow]' scikit-learn
    python examples/exits_images.py
    python examples/exits_images.py --images FOLDER --size 160 --weights imagenet

What happens, and what to look at:

1. The images are those of a folder with one sub-folder per class, or else the handwritten digits of
   scikit-learn. They are split at random: to train on, to decide on, and to judge on.
2. `suggest_exits` names two layers of a MobileNet that cut its work into about equal parts. The
   whole net is trained with an exit at each.
3. On the holdout, `certify_cascade` finds when a row may leave, with a promise: of new images, at
   most 2% (`--harm`) are lost that the whole net has right, in 19 of 20 such draws.
4. The test images say what was gained, beside the cheap way: to cut the net at an exit for all.

A net this small is an example of the calls. On a CPU, exits save time from some 0.3 billion
multiply-adds on: docs/exits.md.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

DIMS = (16, 64)


def main() -> None:
    """Train, decide, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, help="a folder with one sub-folder per class")
    parser.add_argument("--size", type=int, default=32, help="of the images (%(default)s)")
    parser.add_argument("--weights", help="of the backbone: imagenet, or a file (random ones)")
    parser.add_argument("--epochs", type=int, default=12, help="%(default)s")
    parser.add_argument("--harm", type=float, default=0.02, help="at most so much (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    import keras

    from keras_mrl import MatryoshkaClassifier, MatryoshkaHead, measure_costs, suggest_exits
    from keras_mrl_serving import certify_cascade, oracle_report, stage_logits

    keras.utils.set_random_seed(arguments.seed)
    if arguments.images is None:
        images, labels = digits(arguments.size)
    else:
        images, labels = folder(arguments.images, arguments.size)
    order = np.random.default_rng(arguments.seed).permutation(len(labels))
    train, holdout, test = np.split(order, [len(order) // 2, len(order) * 5 // 6])

    backbone = keras.applications.MobileNet(
        input_shape=images.shape[1:],
        alpha=0.25 if arguments.weights is None else 1.0,
        include_top=False,
        weights=arguments.weights,
    )
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9  # a few hundred steps must be enough
    exits = suggest_exits(backbone, 2)
    print("Exits, and the share of the backbone before each:", exits)
    model = MatryoshkaClassifier(
        backbone,
        MatryoshkaHead(int(labels.max()) + 1, dims=DIMS),
        pooling=keras.Sequential(
            [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(DIMS[-1])]
        ),
        exits=exits,
    )
    model.compile(
        keras.optimizers.AdamW(2e-3 if arguments.weights is None else 2e-4),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    model.fit(images[train], labels[train], epochs=arguments.epochs, verbose=2)

    def by_stage(rows: Any) -> Any:
        return stage_logits(model.all_exits().predict(images[rows], verbose=0), DIMS)

    costs = measure_costs(model, batch_sizes=(1,), laps=1)
    policy = certify_cascade(
        by_stage(holdout), labels[holdout], alpha=arguments.harm, costs=costs.of
    )
    logits = by_stage(test)
    report = policy.evaluate(logits, labels[test])
    full_cost = costs.of([("last", DIMS[-1])])[0]
    work = np.dot(costs.of(policy.keys), report.exit_fractions) / full_cost
    print(f"\n{len(test)} test images           accuracy  share of the work")
    for (exit_, dim), scores in logits.items():
        if dim == DIMS[-1]:
            accuracy = np.mean(scores.argmax(axis=1) == labels[test])
            share = costs.of([(exit_, dim)])[0] / full_cost
            print(f"all leave at {exit_ or 'last':20} {accuracy:6.1%}  {share:6.1%}")
    print(f"{'the cascade':33} {report.accuracy:6.1%}  {work:6.1%}")
    oracle = oracle_report(logits, labels[test])
    ceiling = np.dot(costs.of(list(logits)), oracle.exit_fractions) / full_cost
    print(f"{'a router that knows the answer':33} {oracle.accuracy:6.1%}  {ceiling:6.1%}")
    print(
        f"\ngained: {1 - work:.1%} of the multiply-adds are saved; "
        f"accuracy {report.accuracy:.1%} instead of {report.full_accuracy:.1%}."
    )


def digits(size: int) -> tuple[Any, Any]:
    """Return handwritten digits as images of three colours, from -1 to 1."""
    import keras
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    small = (images / 8 - 1).astype("float32").reshape(-1, 8, 8, 1).repeat(3, axis=-1)
    return keras.ops.convert_to_numpy(keras.ops.image.resize(small, (size, size))), labels


def folder(path: Path, size: int) -> tuple[Any, Any]:
    """Return the images of a folder, from -1 to 1, as MobileNet takes them."""
    from PIL import Image

    classes = sorted(own for own in path.iterdir() if own.is_dir())
    files = [(file, label) for label, own in enumerate(classes) for file in sorted(own.iterdir())]
    images = [Image.open(file).convert("RGB").resize((size, size)) for file, _ in files]
    pixels = np.stack([np.asarray(image, np.float32) for image in images])
    return pixels / 127.5 - 1, np.array([label for _, label in files])


if __name__ == "__main__":
    main()
