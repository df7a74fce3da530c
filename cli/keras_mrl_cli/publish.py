"""Publish another policy for the weights of a version.

VERSION is a version's folder, or the folder above the versions, of which the highest is taken.
Weights and graph stay: nothing is trained or exported again, and thresholds and temperatures are
written into a copy whose other files are linked. The policy asks the stages of the one before, by
the same confidence. Rows of the version's warm-up, or those of --sample, are decided by the new
version and by the policy, and must agree. The last line on stdout is the folder of the version.

  keras-mrl publish models/birds --policy stricter.json
  keras-mrl publish models/birds/3 --policy b.json --base-path models/birds_b
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import click

from .output import print_line, print_note
from .shared import DONE, Option, RefusalError, command, ended_by_signals, needing, refusing


@command(
    __doc__,
    click.Argument(["version_folder"], metavar="VERSION", help="a version, or the folder above"),
    Option("--policy", required=True, metavar="FILE", help="JSON of a CascadePolicy"),
    Option("--base-path", metavar="DIR", help="folder to publish in (that of VERSION)"),
    Option("--version", type=int, metavar="N", help="number of the version (the next one)"),
    Option(
        "--sample",
        metavar="FILE",
        help="a few real rows to compare on, .npy, or .npz by input name (those of the warm-up)",
    ),
)
def publish(arguments: SimpleNamespace) -> int:
    """Publish the policy, and print the folder of the version."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with needing("export", "A policy is compared with TensorFlow before it is published."):
        return _publish(arguments)


def _publish(arguments: SimpleNamespace) -> int:
    from keras_mrl_export import ExportError, publish_policy
    from keras_mrl_serving import KerasMrlError

    from .files import find_version, load_arrays, load_policy

    policy, sample = load_policy(arguments.policy), None
    if arguments.sample is not None:
        arrays = load_arrays(arguments.sample)
        sample = arrays[""] if set(arrays) == {""} else dict(arrays)
    rule = "VERSION must be a folder that can be read, and its place one that can be written."
    place = arguments.base_path or arguments.version_folder
    with refusing(rule=rule, remedy="Name another.", place=place):
        folder, _ = find_version(arguments.version_folder)
        print_note(f"Publishing the policy for the weights of {folder} ...")
        try:
            with ended_by_signals(), refusing(ExportError, KerasMrlError, TypeError, ValueError):
                path = publish_policy(
                    folder, policy, arguments.base_path, arguments.version, sample=sample
                )
        except RefusalError as refusal:
            text = str(refusal).replace("sample=images[:16]", "--sample few.npy")
            raise RefusalError(text, refusal.status) from refusal
    parent = folder.parent if arguments.base_path is None else Path(arguments.base_path)
    print_line(str(parent / path.name))
    return DONE
