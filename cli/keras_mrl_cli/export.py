"""Write a .keras file as the next version that TensorFlow Serving serves.

The model is loaded on the backend of KERAS_BACKEND, rebuilt on TensorFlow, and compared with
itself signature by signature before the version gets its number. The last line on stdout is the
folder of the version.

  keras-mrl export digits.keras --base-path models/digits --sample few.npy --policy policy.json
  keras-mrl export birds.keras --base-path models/birds --images few/*.jpg --pixel-scale 0.00392157
  keras-mrl export own.keras --base-path models/own --import my_layers --sample few.npz
"""

from __future__ import annotations

import argparse
import math
import struct
from collections.abc import Sequence

from . import asking
from .refuse import refuse, unknown_flags


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL.keras", help="what model.save wrote")
    parser.add_argument(
        "--base-path", required=True, metavar="DIR", help="folder of the model's versions"
    )
    parser.add_argument(
        "--sample",
        metavar="FILE",
        help="a few real rows to compare on, .npy, or .npz by input name (random floats)",
    )
    parser.add_argument("--policy", metavar="FILE", help="JSON of a CascadePolicy (no cascade)")
    parser.add_argument("--labels", metavar="FILE", help="class names, one a line (no names)")
    parser.add_argument(
        "--dims", type=asking.dims, metavar="M,M", help="dims to export (those of the model's head)"
    )
    parser.add_argument(
        "--signatures",
        type=_names,
        metavar="S,S",
        help="signatures to write, by name or family: embed,classify_64 (all)",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="FILE",
        help="a few JPEG or PNG files: the version then takes the bytes of such files, decoded "
        "in its graph to the size of the model's input (it takes pixels)",
    )
    parser.add_argument(
        "--pixel-scale",
        type=_scale,
        metavar="X",
        help="with --images: what pixels of 0..255 are multiplied by (1)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="classes that are named (5)")
    parser.add_argument("--name", help="name in the manifest (the model's own)")
    parser.add_argument("--version", type=int, metavar="N", help="its number (the next)")
    parser.add_argument(
        "--no-normalize", action="store_true", help="do not scale embeddings to unit length"
    )
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="imported before the model is loaded, as it registers classes; may be given again",
    )


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Export a model."""
    if rest:
        return refuse(unknown_flags(rest), status=2)
    return asking.finished(lambda: _work(arguments))


def _names(text: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise argparse.ArgumentTypeError(
            f"must be names with commas. Received: {text!r}. Give for example embed,classify_64."
        )
    return names


def _scale(text: str) -> float:
    """A number that float32 has, for that is what the graph computes in."""
    try:
        scale = float(text)
        served = struct.unpack("f", struct.pack("f", scale))[0]
    except (ValueError, OverflowError):
        served = math.nan
    if not math.isfinite(served) or served == 0:
        raise argparse.ArgumentTypeError(
            f"must be a finite number other than 0. Received: {text!r}. "
            "Give for example 0.00392157, which is 1 / 255."
        )
    return scale


def _work(arguments: argparse.Namespace) -> int:
    import os

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        from .exporting.work import export

        return export(arguments)
    except ImportError as error:
        raise asking.RefusalError(
            "An export loads the model with Keras and writes it with TensorFlow. "
            f"Received: {error}. Install what it needs: pip install 'keras-mrl[export]'."
        ) from error
