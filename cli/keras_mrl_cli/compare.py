"""Compare Matryoshka with its alternatives on your own data.

With one recipe for all, trains a Matryoshka net (MRL, and MRL-E with a tied head), a separate net
per dim (FF) and a slimmable net; cuts the widest FF net by SVD, PCA, coordinates and the adaptor;
and judges all of them on test rows, dim by dim: accuracy and calibration of the head, a linear
probe, nearest neighbours, adaptive classification, funnel retrieval. The net is small, eight
convolutions for images and two dense layers for embeddings: the methods are compared, not how far a
large net would get. The answer comes first, with its uncertainty; where training has not converged
it says so and judges nothing.

Images are a folder with one sub-folder per class, a zip of it, an .npz with x_train and y_train
(and x_test and y_test), or a dataset of Keras: cifar10, cifar100, fashion_mnist, mnist. Files are
JPEG, PNG, GIF, BMP or WebP, and stand upright as their EXIF orientation says; all that cannot be
read are named before anything is trained. Embeddings are an .npz whose x_train has the shape
(rows, width). Without --test, test images are the second part of
an .npz or a dataset, else a fifth of every class. A test image that training has too is left out.

Writes report.html (one file, opens offline), results.json, .md and .csv, figures as SVG and PNG,
the nets, and splits.npz, which says by digest which image was in which part. Interrupted, it goes
on with the same command where it stopped.

  keras-mrl compare --data birds/ --budget 60
  keras-mrl compare --data embeddings.npz --budget 10
  keras-mrl compare --data train.zip --test test.zip --dims 8,32,128 --seeds 3
  keras-mrl compare --data cifar100 --unseen --out cifar
"""

from __future__ import annotations

import logging
import os
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

from .output import print_json, print_line, print_lines, print_note
from .shared import (
    DONE,
    MISUSED,
    Option,
    RefusalError,
    command,
    dims,
    given_flags,
    json_option,
    needing,
    refusing,
    skip_unreadable_option,
)

EPOCHS, FILTERS = 10, 32
_LEAST = {"seeds": 1, "epochs": 1, "filters": 1, "size": 8, "budget": 0.1}


@command(
    __doc__,
    Option(
        "--data", many=True, required=True, metavar="PATH...", help="training images or embeddings"
    ),
    Option("--test", many=True, metavar="PATH...", help="test images or embeddings (see above)"),
    Option(
        "--out",
        default="keras-mrl-compare",
        metavar="DIR",
        help="folder of everything (keras-mrl-compare)",
    ),
    Option(
        "--dims",
        type=dims,
        metavar="M,...",
        help="two dims or more (images: 8,16,32,64,128; embeddings: 256, too)",
    ),
    Option(
        "--seeds",
        type=int,
        default=1,
        metavar="N",
        help="how often MRL, and FF at the first, a middle and the last dim, are trained, for a "
        "standard deviation (1)",
    ),
    Option(
        "--budget",
        type=float,
        metavar="MINUTES",
        help="choose epochs and filters so that all ends in about this time; the speed is measured "
        "first, and a budget that is too small is refused with one that would do",
    ),
    Option("--epochs", type=int, metavar="N", help=f"epochs of every net ({EPOCHS})"),
    Option(
        "--filters", type=int, metavar="N", help=f"filters of the first convolution ({FILTERS})"
    ),
    Option(
        "--size",
        type=int,
        metavar="PIXELS",
        help="height and width that images are resized to (files: the first's height, 64 at most)",
    ),
    Option(
        "--unseen",
        is_flag=True,
        help="also train MRL and the separate nets without a fifth of the classes, and look for "
        "neighbours among those",
    ),
    skip_unreadable_option(),
    Option("--no-flip", is_flag=True, help="do not mirror images in training: digits, text"),
    json_option("print the results as one JSON object, the last line"),
)
def compare(arguments: SimpleNamespace) -> int:
    """Train, judge and report."""
    _check(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    rule = "A comparison trains with Keras, probes with scikit-learn and draws with matplotlib."
    with needing("tensorflow,compare,images", rule):
        for name in ("matplotlib", "sklearn"):  # now, and not when all nets are trained
            import_module(name)
        from keras_mrl.comparison import ComparisonError, Plan
        from keras_mrl.comparison import compare as compare_methods
    # TensorFlow warns of every net it traces, and this trains a dozen.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    plan = Plan(
        dims=tuple(arguments.dims or ()),
        seeds=arguments.seeds,
        epochs=arguments.epochs or EPOCHS,
        filters=arguments.filters or FILTERS,
        flip=not arguments.no_flip,
        unseen=arguments.unseen,
    )
    out = Path(arguments.out)
    with refusing(ComparisonError):
        try:
            results = compare_methods(
                list(arguments.data),
                out,
                plan,
                test=list(arguments.test) or None,
                budget_minutes=arguments.budget,
                size=arguments.size,
                progress=print_note,
                skip_unreadable=arguments.skip_unreadable,
            )
        except OSError as error:
            raise RefusalError(
                "The data must be readable, and --out writable with room for the nets. "
                f"Received: {error}. Mend that; the same command goes on where this one stopped."
            ) from error
    summary = (out / "results.md").read_text("utf-8").partition("\n\n")[0]
    print_lines(f"{summary}\n")
    print_line(f"The report is {out / 'report.html'}.")
    if arguments.json:
        print_json(**results)
    return DONE


def _check(arguments: SimpleNamespace) -> None:
    numbers = list(arguments.dims or ())
    is_ladder = len(numbers) > 1 and numbers[0] > 0 and numbers == sorted(set(numbers))
    if numbers and not is_ladder:
        raise RefusalError(
            "--dims must be two or more rising integers. "
            f"Received: {','.join(map(str, numbers))}. Give for example 8,16,32.",
            MISUSED,
        )
    for name, least in _LEAST.items():
        value = getattr(arguments, name)
        if value is not None and not least <= value < 1e6:
            raise RefusalError(
                f"--{name} must be at least {least}, and below a million. Received: {value}. "
                "Leave it out for the usual.",
                MISUSED,
            )
    chosen = given_flags(arguments, ("epochs", "filters"))
    if arguments.budget is not None and chosen:
        raise RefusalError(
            "A budget chooses epochs and filters itself. "
            f"Received: --budget with {' and '.join(chosen)}. Leave out one or the other.",
            MISUSED,
        )
