"""Train, calibrate, export, serve and ask, once, on handwritten digits.

Trains a Matryoshka model on scikit-learn's 1,797 handwritten digits with model.fit, learns a
cascade on a holdout, exports the model for TensorFlow Serving, serves it in a process of its own,
and asks that server over gRPC: adaptive classification of the test images, and a funnel over the
training images. Takes a minute or two; everything it made stays in --out.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..refuse import refuse, unknown_flags

_BACKENDS = ("tensorflow", "jax", "torch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "--backend",
        choices=_BACKENDS,
        default=os.environ.get("KERAS_BACKEND", "tensorflow"),
        help="what trains; the exported model is the same (KERAS_BACKEND, else tensorflow)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("keras-mrl-demo"), help="folder to write (keras-mrl-demo)"
    )
    parser.add_argument("--epochs", type=int, default=10, help="passes over the data (10)")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the training (0)")
    parser.add_argument(
        "--json", action="store_true", help="print the report as one JSON object, the last line"
    )


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Walk the whole road."""
    if rest:
        return refuse(unknown_flags(rest), status=2)
    if arguments.epochs < 1:
        return refuse(f"--epochs must be at least 1. Received: {arguments.epochs}. Try 10.", 2)
    if not 0 <= arguments.seed < 2**32:
        return refuse(
            f"--seed must lie in 0..{2**32 - 1}. Received: {arguments.seed}. Leave it out for 0.", 2
        )
    if arguments.backend not in _BACKENDS:  # argparse checks what was given, not the default
        return refuse(
            f"KERAS_BACKEND must be one of {', '.join(_BACKENDS)} for the demo. "
            f"Received: {arguments.backend}. Give --backend.",
            2,
        )
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return refuse(
            "--out must be a folder that can be written. "
            f"Received: {arguments.out} ({error.strerror}). Name another."
        )
    # All must be said before Keras is first imported.
    os.environ["KERAS_BACKEND"] = arguments.backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # The net is too small to share: on a busy machine PyTorch's threads wait for each other, and
    # an epoch takes ten times as long with two as with one.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        from .road import walk
    except ImportError as error:
        return refuse(
            "The demo trains, exports, serves and draws. "
            f"Received: {error}. Install what it needs: "
            f"pip install 'keras-mrl[{arguments.backend},export,server,evaluate]'."
        )
    report = walk(arguments.out, arguments.backend, arguments.epochs, arguments.seed)
    if arguments.json:
        print(json.dumps(report))
    return 0
