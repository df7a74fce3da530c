"""Train Matryoshka and its alternatives on your images, and see whether it pays off.

With one recipe for all, trains a Matryoshka net (MRL, and MRL-E with a tied head), a separate net
per dim (FF) and a slimmable net; cuts the widest FF net by SVD, PCA and coordinates; and judges
all of them on test images, dim by dim: accuracy and calibration of the head, a linear probe,
nearest neighbours, adaptive classification, funnel retrieval. The net is small, eight
convolutions: what is compared is the methods, not how far a large net would get.

Images are a folder with one sub-folder per class, a zip of it, an .npz with x_train and y_train
(and x_test and y_test), or a dataset of Keras: cifar10, cifar100, fashion_mnist, mnist. Files are
turned upright as their EXIF orientation says. Without --test, test images are the second part of
an .npz or a dataset, else a fifth of every class. A test image that training has too is left out.

Writes report.html (one file, opens offline), results.json, .md and .csv, figures as SVG and PNG,
the nets, and splits.npz, which says by digest which image was in which part. Interrupted, it goes
on with the same command where it stopped.

  keras-mrl compare --data birds/ --budget 60
  keras-mrl compare --data train.zip --test test.zip --dims 8,32,128 --epochs 20 --seeds 3
  keras-mrl compare --data cifar100 --unseen --out cifar
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from . import asking
from .refuse import refuse, unknown_flags

EPOCHS, FILTERS, DIMS = 10, 32, (8, 16, 32, 64, 128)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--data", nargs="+", required=True, metavar="PATH", help="training images")
    parser.add_argument("--test", nargs="+", metavar="PATH", help="test images (see above)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("keras-mrl-compare"),
        metavar="DIR",
        help="folder of everything (keras-mrl-compare)",
    )
    parser.add_argument(
        "--dims",
        type=asking.dims,
        default=DIMS,
        metavar="M,...",
        help=f"two or more ({','.join(map(str, DIMS))})",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="times that MRL and FF at the first, a middle and the last dim are trained, for a "
        "standard deviation (1)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        metavar="MINUTES",
        help="choose epochs, filters and, if it must be, fewer images so that all ends in about "
        "this time; the speed is measured first",
    )
    parser.add_argument("--epochs", type=int, metavar="N", help=f"of every net ({EPOCHS})")
    parser.add_argument(
        "--filters", type=int, metavar="N", help=f"of the first convolution ({FILTERS})"
    )
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="height and width that images are resized to (files: the first's height, 64 at most)",
    )
    parser.add_argument(
        "--unseen",
        action="store_true",
        help="also train MRL and the separate nets without a fifth of the classes, and look for "
        "neighbours among those",
    )
    parser.add_argument(
        "--no-flip", action="store_true", help="do not mirror images in training: digits, text"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the results as one JSON object, the last line"
    )


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Compare."""
    if rest:
        return refuse(unknown_flags(rest), status=2)
    return asking.finished(lambda: _work(arguments))


def _work(arguments: argparse.Namespace) -> int:
    _check(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        for name in ("matplotlib", "sklearn"):  # now, and not when all nets are trained
            import_module(name)
        from keras_mrl.comparison import ComparisonError, Plan, compare
    except ImportError as error:
        raise asking.RefusalError(
            "A comparison trains with Keras, probes with scikit-learn and draws with matplotlib. "
            f"Received: {error}. Install what it needs: pip install 'keras-mrl[tensorflow,evaluate,"
            "images]'."
        ) from error
    # A net that is new is traced anew: nothing to be warned of at each of a dozen.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    plan = Plan(
        dims=arguments.dims,
        seeds=arguments.seeds,
        epochs=arguments.epochs or EPOCHS,
        filters=arguments.filters or FILTERS,
        flip=not arguments.no_flip,
        unseen=arguments.unseen,
    )
    try:
        results = compare(
            arguments.data,
            arguments.out,
            plan,
            test=arguments.test,
            budget_minutes=arguments.budget,
            size=arguments.size,
        )
    except ComparisonError as error:
        raise asking.RefusalError(str(error)) from error
    except OSError as error:
        raise asking.RefusalError(
            "Images must be readable, and --out writable with room for the nets. "
            f"Received: {error}. Mend that; the same command goes on where this one stopped."
        ) from error
    _show(arguments.out)
    if arguments.json:
        print(json.dumps(results))
    return 0


def _show(out: Path) -> None:
    said = (out / "results.md").read_text("utf-8").partition("\n\n")[0]
    print(f"{said}\n\nThe report is {out / 'report.html'}.")


def _check(arguments: argparse.Namespace) -> None:
    dims = arguments.dims
    if len(dims) < 2 or dims[0] < 1 or list(dims) != sorted(set(dims)):
        raise asking.RefusalError(
            "--dims must be two or more rising integers. "
            f"Received: {','.join(map(str, dims))}. Give for example 8,16,32.",
            status=2,
        )
    least = {"seeds": 1, "epochs": 1, "filters": 1, "size": 8, "budget": 0.1}
    for name, smallest in least.items():
        value = getattr(arguments, name)
        if value is not None and not smallest <= value < 1e6:
            raise asking.RefusalError(
                f"--{name} must be at least {smallest}, and below a million. Received: {value}. "
                "Leave it out for the usual.",
                status=2,
            )
    both = [n for n in ("epochs", "filters") if getattr(arguments, n) is not None]
    if arguments.budget is not None and both:
        raise asking.RefusalError(
            "A budget chooses epochs and filters itself. "
            f"Received: --budget with --{' and --'.join(both)}. Leave out one or the other.",
            status=2,
        )
