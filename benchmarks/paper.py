"""The paper's comparison on CIFAR-100: `keras-mrl compare`, with the dims and seeds of the page.

    python benchmarks/paper.py --data FOLDER --out FOLDER [--epochs 8] [--filters 32] [--seeds 3]

`--data` holds `train*.zip` and `test.zip`, images in one folder per class; without it the images
come from `keras.datasets.cifar100`, which the network must allow. Nets that are trained already
are not trained again, and an interrupted net goes on after its last whole epoch. `--out` receives
tables, figures and a report; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from keras_mrl.comparison import Plan, compare

DIMS = (8, 16, 32, 64, 128, 256)


def main() -> None:
    """Train what is missing, evaluate, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="folder of the zips (keras.datasets)")
    parser.add_argument("--out", type=Path, required=True, help="folder of nets and results")
    parser.add_argument("--epochs", type=int, default=8, help="of every net (%(default)s)")
    parser.add_argument("--filters", type=int, default=32, help="of the first layer (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="(%(default)s)")
    arguments = parser.parse_args()
    training, test = ["cifar100"], None
    if arguments.data is not None:
        training = sorted(str(path) for path in arguments.data.glob("train*.zip"))
        test = [str(arguments.data / "test.zip")]
    plan = Plan(
        dims=DIMS,
        seeds=arguments.seeds,
        epochs=arguments.epochs,
        filters=arguments.filters,
        unseen=True,
    )
    print(json.dumps(compare(training, arguments.out, plan, test=test)))


if __name__ == "__main__":
    main()
