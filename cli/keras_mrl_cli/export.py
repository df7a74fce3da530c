"""Write a .keras file as a version that TensorFlow Serving serves.

The model is loaded on the backend of KERAS_BACKEND, rebuilt on TensorFlow, and compared with
itself signature by signature before the version gets its number. The last line on stdout is the
folder of the version.

  keras-mrl export digits.keras --base-path models/digits --sample few.npy
  keras-mrl export birds.keras --base-path models/birds --images few/*.jpg
  keras-mrl export mail.keras --base-path models/mail --sample few.txt
  keras-mrl export own.keras --base-path models/own --import my_layers
  keras-mrl export two.keras --base-path m --sample u.npy --other-sample i.npy
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from .output import print_line, print_note
from .shared import (
    DONE,
    Option,
    RefusalError,
    command,
    dims,
    ended_by_signals,
    needing,
    one_line,
    refusing,
)

if TYPE_CHECKING:
    from keras_mrl_export import ImageDecoder

_LABELS_BYTES = 2**26
_ROWS = 8  # of a random sample
_RANDOM_ROWS = "The export is verified on random rows in [0, 1); real rows verify more: {}."


def names(text: str) -> list[str]:
    """Return the names of a flag, which have commas between them."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise click.BadParameter(
            f"must be names with commas. Received: {text!r}. Give for example embed,classify_64."
        )
    return parts


def float32(text: str) -> float:
    """Return the number of a flag; float32 must have it, for the graph computes in float32."""
    try:
        number = float(text)
        in_float32 = struct.unpack("f", struct.pack("f", number))[0]
    except (ValueError, OverflowError):
        in_float32 = math.nan
    if not math.isfinite(in_float32) or in_float32 == 0:
        raise click.BadParameter(
            f"must be a finite number other than 0. Received: {text!r}. "
            "Give for example 0.00392157, which is 1 / 255."
        )
    return number


def prompt(text: str) -> tuple[str, str]:
    """Return the name of a prompt, and what it puts before a text."""
    name, equals, prefix = text.partition("=")
    if not (name and equals):
        raise click.BadParameter(
            f"must be NAME=TEXT. Received: {text!r}. Give for example 'query=query: '."
        )
    return name, prefix


@command(
    __doc__,
    click.Argument(["model"], metavar="MODEL.keras", help="the file that model.save wrote"),
    Option("--base-path", required=True, metavar="DIR", help="folder of the model's versions"),
    Option(
        "--sample",
        metavar="FILE",
        help="a few real rows to compare on, .npy, or .npz by input name (random floats); texts, "
        ".txt, one a line: the version then takes texts, made tokens of in its graph",
    ),
    Option(
        "--other-sample",
        metavar="FILE",
        help="of a model of two towers: as --sample, for the other tower",
    ),
    Option(
        "--prompt",
        "prompts",
        multiple=True,
        type=prompt,
        metavar="NAME=TEXT",
        help="of a version that takes texts: what its clients may put before a text, such as "
        "'query=query: '; may be given again (none)",
    ),
    Option("--policy", metavar="FILE", help="JSON of a CascadePolicy (no cascade)"),
    Option("--labels", metavar="FILE", help="class names, one a line (no names)"),
    Option("--dims", type=dims, metavar="M,...", help="dims to export (those of the model's head)"),
    Option(
        "--signatures",
        type=names,
        metavar="S,S",
        help="signatures to write, by name or family: embed,classify_64 (all but those of exits, "
        "which are named: classify_EXIT_64)",
    ),
    Option(
        "--images",
        many=True,
        metavar="FILE...",
        help="a few image files: the version then takes the bytes of such files, decoded "
        "in its graph to the size of the model's input (it takes pixels)",
    ),
    Option(
        "--other-images",
        many=True,
        metavar="FILE...",
        help="of a model of two towers: as --images, for the other tower",
    ),
    Option(
        "--pixel-scale",
        type=float32,
        metavar="X",
        help="with --images or --other-images: pixels of 0..255 are multiplied by it (1)",
    ),
    Option(
        "--activation",
        type=click.Choice(["softmax", "sigmoid", "none"]),
        help="what the head's outputs are: one class a row, any number of classes, or values "
        "(as the model's loss says)",
    ),
    Option(
        "--top-k",
        type=int,
        metavar="K",
        help="how many classes are named (5, or all where a row may have several)",
    ),
    Option("--name", metavar="NAME", help="name in the manifest (the model's own)"),
    Option(
        "--output",
        metavar="NAME",
        help="which of several outputs the version serves (the only one)",
    ),
    Option(
        "--version",
        type=int,
        metavar="N",
        help="its number (seconds since 1970, or one more than the highest)",
    ),
    Option("--no-normalize", is_flag=True, help="do not scale embeddings to unit length"),
    Option(
        "--no-identity", is_flag=True, help="leave model_id out of answers: one output over REST"
    ),
    Option(
        "--import",
        "modules",
        multiple=True,
        metavar="MODULE",
        help="imported before the model is loaded, as it registers classes; may be given again",
    ),
)
def export(arguments: SimpleNamespace) -> int:
    """Load the model, export it, and print the folder of the version."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        with needing(
            "export", "An export loads the model with Keras and writes it with TensorFlow."
        ):
            return _export(arguments)
    except RefusalError as refusal:
        raise RefusalError(in_flags(str(refusal)), refusal.status) from refusal


# What the sentences of an export name, and what the command has for it.
_FLAGS = {
    r"\b(output|activation|name)='([^']+)'": r"--\1 \2",
    r"\b(activation)=:": r"--\1:",
    r"\b(output) (?=must name|names one)": r"--\1 ",
    r"\bLeave (dims|labels|policy) out": r"Leave --\1 out",
    r"\bother_sample=items\[:8\]": "--other-sample FILE.npy",
    r"\bother_sample\b": "--other-sample",
    r"\bother_decoder\b": "--other-images",
    r"\btop_k (?=must)": "--top-k ",
}


def in_flags(sentence: str) -> str:
    """Return a sentence of an export with the flags of this command for its arguments.

    Examples:
        >>> in_flags("output must name one of the outputs. Give for example output='digit'.")
        '--output must name one of the outputs. Give for example --output digit.'
    """
    for argument, flag in _FLAGS.items():
        sentence = re.sub(argument, flag, sentence)
    return sentence


def _export(arguments: SimpleNamespace) -> int:
    import keras

    from keras_mrl_export import ExportError, export_saved_model
    from keras_mrl_serving import KerasMrlError

    from .files import load_policy

    for names in (("sample", "images"), ("other_sample", "other_images")):
        if all(getattr(arguments, name) for name in names):
            rows, images = (f"--{name.replace('_', '-')}" for name in names)
            raise RefusalError(
                f"An export is verified on rows or on images. Received: {rows} and {images}. "
                f"Give {images} for a version that takes files, {rows} for one that takes pixels."
            )
    if arguments.pixel_scale is not None and not (arguments.images or arguments.other_images):
        raise RefusalError(
            "--pixel-scale is of images that the version decodes. Received: no --images. "
            "Give a few: --images FILE FILE."
        )
    policy = None if arguments.policy is None else load_policy(arguments.policy)
    labels = None if arguments.labels is None else _labels(arguments.labels)
    sample, other_sample = _rows(arguments.sample), _rows(arguments.other_sample)
    _import(arguments.modules)
    print_note(f"Loading {arguments.model} on {keras.backend.backend()} ...")
    model = _load(arguments.model)
    flags = ("dims", "signatures", "top_k", "name", "activation", "output")
    optional = {flag: getattr(arguments, flag) for flag in flags}
    with refusing(
        ExportError,
        KerasMrlError,
        ValueError,
        rule="--base-path must be a folder that can be written.",
        remedy="Name another.",
        place=arguments.base_path,
    ):
        backbone, other = _towers(model, arguments.output)
        scale = 1.0 if arguments.pixel_scale is None else arguments.pixel_scale
        decoder = other_decoder = None
        if arguments.images:
            sample, decoder = _encoded_images(backbone, arguments.images, scale)
        elif sample is None:
            sample = _random_rows(backbone, "--sample")
            print_note(_RANDOM_ROWS.format("--sample"))
        if arguments.other_images:
            files = arguments.other_images
            other_sample, other_decoder = _encoded_images(other or backbone, files, scale)
        elif other_sample is None and other is not None:
            other_sample = _random_rows(other, "--other-sample")
            print_note(_RANDOM_ROWS.format("--other-sample"))
        print_note("Exporting, and comparing every signature with the model ...")
        with ended_by_signals(), _warnings_as_notes():
            version = export_saved_model(
                model,
                arguments.base_path,
                sample,
                policy,
                labels,
                version=arguments.version,
                normalize=not arguments.no_normalize,
                identity=not arguments.no_identity,
                decoder=decoder,
                other_sample=other_sample,
                other_decoder=other_decoder,
                prompts=dict(arguments.prompts) or None,
                **{name: value for name, value in optional.items() if value is not None},
            )
    print_line(str(Path(arguments.base_path) / version.name))  # a relative base path stays one
    return DONE


@contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Print what the export warns of, such as what it assumes, where notes go."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", UserWarning)
        yield
    for warning in caught:
        if warning.category is UserWarning:
            print_note(in_flags(str(warning.message)))


def _labels(file: str) -> list[str]:
    from keras_mrl_serving.untrusted import read_bytes

    rule = "--labels must be a file that can be read."
    try:
        with refusing(rule=rule, remedy="Correct the path."):
            text = read_bytes(file, _LABELS_BYTES).decode("utf-8-sig")
        lines = text.replace("\r\n", "\n").split("\n")
    except ValueError as error:  # of the bytes, or of what the file is
        reason = error.reason if isinstance(error, UnicodeDecodeError) else error
        raise RefusalError(
            f"--labels must be a text in UTF-8. Received: {file} ({reason}). "
            "Write one class name a line."
        ) from error
    while len(lines) > 1 and not lines[-1].strip():
        lines.pop()
    return lines


def _import(modules: Sequence[str]) -> None:
    if modules:  # as `python script.py` would: the console script does not look where it is run
        sys.path.insert(0, os.getcwd())
    for module in modules:
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:  # a module of the user's may raise anything
            reason = f"{type(error).__name__}: {one_line(error)}"
            if isinstance(error, SystemExit):  # a script that is no module
                reason = f"it ends by sys.exit({error.code!r})"
            raise RefusalError(
                "--import must name a module that can be imported, here or installed. "
                f"Received: {module} ({reason}). Name it as in an import statement, without .py."
            ) from error


def _load(file: str) -> Any:
    import keras

    if not Path(file).is_file():
        raise RefusalError(
            "A model to export must be a .keras file. "
            f"Received: {file}, which is none. Correct the path, or write it: model.save(...)."
        )
    try:
        model = keras.saving.load_model(file, compile=False)
        loss = _loss_in(file)
        if loss is not None:
            model.compile(loss=loss)  # without the state of the optimizer
        return model
    except Exception as error:  # Keras raises whatever a layer raises
        raise RefusalError(
            "The .keras file must load on this backend. "
            f"Received: {file} on {keras.backend.backend()}, {type(error).__name__}: "
            f"{one_line(error)} Import the modules that register classes of your own with "
            "--import, and make Lambda layers classes."
        ) from error


def _loss_in(file: str) -> Any:
    """Return the loss that the model of a file was compiled with; None without one of Keras's."""
    import keras

    with zipfile.ZipFile(file) as archive:
        compiled = json.loads(archive.read("config.json")).get("compile_config") or {}
    try:
        return keras.saving.deserialize_keras_object(compiled.get("loss"))
    except (TypeError, ValueError):  # a loss of the user's own, which nothing has registered
        return None


def _rows(file: str | None) -> Any:
    """Return a sample: an array, arrays by input name, or texts; None without a file."""
    from .files import load_arrays
    from .texts import texts_of
    from .words import LINES

    if file is None:
        return None
    if Path(file).suffix.lower() in LINES:
        with refusing(ValueError, rule="--sample must be a file of texts.", remedy="Correct it."):
            return [*texts_of(file)]
    arrays = load_arrays(file)
    return arrays[""] if set(arrays) == {""} else dict(arrays)


def _towers(model: Any, output: str | None) -> tuple[Any, Any]:
    """Return the part of a model that takes queries, and its other tower; None without one."""
    from keras_mrl import split
    from keras_mrl.models.cut import gallery_backbone

    backbone, _ = split(model, output)
    other = gallery_backbone(model, backbone)
    return backbone, None if other is backbone else other


def _declared_inputs(backbone: Any) -> dict[str, Any]:
    """Return the symbolic inputs of a model's backbone by name."""
    from keras_mrl_export.sample import declared_inputs

    return dict(declared_inputs(backbone))


def _random_rows(backbone: Any, flag: str) -> Any:
    """Return random rows in [0, 1), an array or arrays by input name.

    Raises:
        RefusalError: If the model takes anything but floats of known shape.
    """
    import numpy as np

    inputs = _declared_inputs(backbone)
    others = [
        f"{name} {tensor.dtype} {tuple(tensor.shape)}"
        for name, tensor in inputs.items()
        if "float" not in str(tensor.dtype) or None in tensor.shape[1:]
    ]
    if others or not inputs:
        raise RefusalError(
            "An export is verified on rows, and random ones stand only for floats of known shape. "
            f"Received: {', '.join(others) or 'a model that declares no inputs'}. "
            f"Give a few real rows: {flag} FILE.npy, or .npz by input name."
        )
    rng = np.random.default_rng(0)
    rows = {
        name: rng.random((_ROWS, *tensor.shape[1:]), np.float32) for name, tensor in inputs.items()
    }
    return next(iter(rows.values())) if len(rows) == 1 else rows


def _encoded_images(
    backbone: Any, files: Sequence[str], scale: float
) -> tuple[list[bytes], ImageDecoder]:
    """Return the bytes of image files, and the decoder that makes the model's input of them.

    Raises:
        RefusalError: If a file does not read, or the model takes no image of known size.
    """
    from keras_mrl_export import ImageDecoder
    from keras_mrl_serving import UnreadableImageError, served_image

    shapes = [tuple(tensor.shape[1:]) for tensor in _declared_inputs(backbone).values()]
    if len(shapes) != 1 or len(shapes[0]) != 3 or None in shapes[0]:
        raise RefusalError(
            "Images are decoded to the one input of a model: height, width and channels. "
            f"Received: a model with inputs of shapes {shapes}. Put an input of known size before "
            "it: x = keras.Input((224, 224, 3)); keras.Model(x, model(x))."
        )
    height, width, channels = shapes[0]
    rule = "--images must name files that can be read."
    with refusing(UnreadableImageError, ImportError, rule=rule, remedy="Correct the path."):
        encoded = [served_image(Path(file).read_bytes(), file) for file in files]
    return encoded, ImageDecoder(height=height, width=width, channels=channels, scale=scale)
