"""Show an exported model: its signatures, its manifest, its sizes.

FOLDER is a version's folder, or the folder above the versions, of which the highest is shown:
a server takes that one. A model that is served is shown with --target. Neither needs TensorFlow.

  keras-mrl inspect models/digits
  keras-mrl inspect --target localhost:8500 --model digits --json
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import click

from .output import Table, in_bytes, print_json, print_line, print_lines
from .shared import (
    DONE,
    MISUSED,
    SERVER_FLAGS,
    RefusalError,
    command,
    given_flags,
    json_option,
    refusing,
    server_options,
    target_option,
    under,
)

if TYPE_CHECKING:
    from keras_mrl_serving import Manifest
    from keras_mrl_serving.calls import Signature

# A word that is no path: with a scheme, several addresses, or a host and its port.
_ADDRESS = re.compile(r"\w+:(//)?/.*|[^/]*,[^/]*|[^/]*:\d+")
_FOREIGN = "none: another tool exported it, and only `predict` of a client can ask it"
_REPORTED = ("holdout_size", "accuracy", "full_accuracy", "expected_dim", "cumulative_dim")


@command(
    __doc__,
    click.Argument(
        ["folder"],
        required=False,
        metavar="FOLDER",
        help="a version, or the folder above the versions",
    ),
    json_option(),
    *under("A model that is served", target_option(), *server_options()),
)
def inspect(arguments: SimpleNamespace) -> int:
    """Print what the folder or the server says of a model."""
    folder = arguments.folder
    if folder is not None and not Path(folder).exists() and _ADDRESS.fullmatch(folder):
        folder, arguments.target = None, arguments.target or folder  # its old place
    if (folder is None) == (arguments.target is None):
        raise RefusalError(
            "A model is shown from its folder, or from its server. "
            f"Received: {'neither' if folder is None else 'both'}. "
            "Give a folder, for example models/digits, or --target localhost:8500.",
            MISUSED,
        )
    if folder is None:
        model = _of_server(arguments)
    elif flags := given_flags(arguments, SERVER_FLAGS):
        raise RefusalError(
            "A folder is read without a server. "
            f"Received: {', '.join(flags)} for {folder}. Leave them out, or name HOST:PORT."
        )
    else:
        model = _of_folder(folder)
    if arguments.json:
        print_json(**model)
    else:
        print_model(model)
    return DONE


def _of_folder(path: str) -> dict[str, Any]:
    from keras_mrl_serving import KerasMrlError
    from keras_mrl_serving.saved_model import read_manifest, read_signatures, sizes

    from .files import find_version, stray_files

    rule = "A model must lie in a folder that can be read."
    with refusing(KerasMrlError, rule=rule, remedy="Correct the path.", place=path):
        folder, versions = find_version(path)
        return {
            "path": str(folder),
            "versions": [
                {"version": number, "bytes": sum(sizes(version).values())}
                for number, version in versions.items()
            ],
            "strays": stray_files(path) if versions else [],
            "sizes": sizes(folder),
            **_described(read_manifest(folder), read_signatures(folder)),
        }


def _of_server(arguments: SimpleNamespace) -> dict[str, Any]:
    from keras_mrl_serving.contract import DESCRIBE

    from .client import connect

    with connect(arguments) as client:
        signatures = client.signatures()
        manifest = client.describe() if DESCRIBE in signatures else None
        return {
            "target": client.target,
            "model": client.model,
            "versions": [asdict(version) for version in client.status()],
            **_described(manifest, signatures),
        }


def _described(manifest: Manifest | None, signatures: Mapping[str, Signature]) -> dict[str, Any]:
    return {
        "manifest": None if manifest is None else json.loads(manifest.to_json()),
        "signatures": {name: asdict(signature) for name, signature in signatures.items()},
    }


def print_model(model: Mapping[str, Any]) -> None:
    """Print what a model is for a person: the manifest first, the signatures last.

    Args:
        model: As `--json` prints it.
    """
    manifest = model["manifest"]
    kind = "" if manifest is None else f": {manifest['name']}, {manifest['kind']}"
    place = model["path"] if "path" in model else f"{model['model']} at {model['target']}"
    print_line(place + kind)
    if manifest is None:
        _line("manifest", _FOREIGN)
    else:
        _print_manifest(manifest)
    if "sizes" in model:
        parts = [f"{name} {in_bytes(size)}" for name, size in model["sizes"].items()]
        _line("on disk", f"{in_bytes(sum(model['sizes'].values()))}: {', '.join(parts)}")
    for version in model["versions"]:
        _line("version", _version(version))
    for name in model.get("strays", ()):
        _line("no version", f"{name}, a file: a server takes it for a version and cannot load it")
    if manifest is not None:
        if manifest["exits"] is not None:
            _print_exits(manifest["exits"])
        cascade = manifest["exit_cascade"] or manifest["cascade"]
        if cascade is not None:
            _print_cascade(cascade)
        if manifest["quality"]:
            _print_quality(manifest["quality"])
    print_lines("\nsignatures")
    for name in sorted(model["signatures"], key=_by_number):
        signature = model["signatures"][name]
        print_line(f"  {name}: {_specs(signature['inputs'])}")
        print_line(f"    -> {_specs(signature['outputs'])}")


def _by_number(name: str) -> tuple[str, int]:
    """Return a key by which embed_16 comes after embed_8."""
    kind, _, dim = name.rpartition("_")
    return (kind, int(dim)) if dim.isdecimal() else (name, 0)


def _line(name: str, value: object) -> None:
    print_line(f"  {name:12} {value}")


def _version(version: Mapping[str, Any]) -> str:
    if "state" not in version:
        return f"{version['version']}, {in_bytes(version['bytes'])}"
    error = f" ({version['error']})" if version["error"] else ""
    return f"{version['version']}, {version['state']}{error}"


def _print_manifest(manifest: Mapping[str, Any]) -> None:
    _line("dims", _numbers(manifest["dims"]))
    if manifest["weights"] is not None:
        _line("weights", _numbers(manifest["weights"]))
    _line("inputs", _specs(manifest["inputs"]))
    if manifest["decoder"] is not None:
        _line("decoder", ", ".join(f"{key} {value}" for key, value in manifest["decoder"].items()))
    _print_preprocessor("", manifest["preprocessor"])
    other = manifest["other_tower"]
    if other is not None:
        _line("other tower", _specs(other["inputs"]))
        if other.get("decoder") is not None:
            settings = other["decoder"].items()
            _line("its decoder", ", ".join(f"{key} {value}" for key, value in settings))
        _print_preprocessor("its ", other.get("preprocessor"))
    scaled = "of unit length" if manifest["normalize"] else "as they are"
    _line("embeddings", f"{scaled}, compared by {manifest['metric']}")
    if manifest["num_classes"] is not None:
        names = "with names" if manifest["labels"] else "without names"
        tied = "one kernel for all dims" if manifest["tied"] else "a kernel for each dim"
        several = ", any number a row" if manifest["activation"] == "sigmoid" else ""
        classes = f"{manifest['num_classes']} {names}, top {manifest['top_k']}{several}"
        _line("classes", f"{classes}; {tied}")
    if manifest["num_values"] is not None:
        _line("values", f"{manifest['num_values']} a row")
    if manifest["size"] is not None:
        prompt = manifest["prompt"]
        with_prompt = "" if prompt is None else f", embedded with the prompt {prompt!r}"
        _line("gallery", f"{manifest['size']} rows{with_prompt}")
    if manifest["funnel"] is not None:
        funnel = manifest["funnel"]
        shortlists = _numbers(funnel["shortlists"]) or "none"
        dims = " -> ".join(map(str, funnel["dims"]))
        _line("funnel", f"{dims}, shortlists {shortlists}, k {funnel['k']}")
    _line("fingerprint", manifest["fingerprint"])
    if manifest["model_id"] is not None:
        _line("model id", manifest["model_id"])
    if manifest["encoder_fingerprint"] is not None:
        _line("encoder", manifest["encoder_fingerprint"])
    made = {key.replace("_", " "): value for key, value in manifest["made_with"].items()}
    _line("made with", ", ".join(f"{name} {value}" for name, value in made.items()))


def _print_preprocessor(of: str, preprocessor: Mapping[str, Any] | None) -> None:
    """Print what makes tokens of texts, and the prompts to put before them."""
    if preprocessor is None:
        return
    get = preprocessor.get
    lowercase = get("lowercase")
    case = "" if lowercase is None else f", {'lower' if lowercase else 'upper and lower'} case"
    pooling = "" if get("pooling") is None else f"; pooling {get('pooling')}"
    _line(
        f"{of}tokenizer",
        f"{get('tokenizer')} of {get('vocabulary_size')} tokens{case}; at most "
        f"{get('sequence_length')} tokens of a text{pooling}",
    )
    prompts = [f"{name} {text!r}" for name, text in preprocessor["prompts"].items()]
    _line(f"{of}prompts", ", ".join(prompts) or "none")
    if preprocessor["operations"]:
        version = get("tensorflow_text")
        made_by = "" if version is None else f", of tensorflow-text {version}"
        _line(f"{of}operations", ", ".join(preprocessor["operations"]) + made_by)


def _print_exits(exits: Sequence[Mapping[str, Any]]) -> None:
    """Print where rows may leave, what a model cut there has, and what a row costs there."""
    print_lines("\nexits, shallow to deep")
    measured = {size for own in exits for size in own.get("milliseconds") or {}}
    sizes = sorted(measured, key=lambda size: (len(size), size))  # digits, if it is a sound one
    named = {f"MS OF {size}": -9 for size in sizes}
    width = max(len(own["name"]) for own in exits) + 2
    table = Table({"  NAME": width, "PARAMETERS": -12, "MULTIPLY-ADDS": -14, **named})
    for own in exits:
        times = own.get("milliseconds") or {}
        numbers = [own.get("parameters"), own.get("multiply_adds")]
        table.row(
            f"  {own['name']}",
            *("-" if number is None else f"{number:.0f}" for number in numbers),
            *(f"{times[size]:.3g}" if size in times else "-" for size in sizes),
        )


def _print_cascade(cascade: Mapping[str, Any]) -> None:
    stages = cascade["exit_stages" if "exit_stages" in cascade else "stages"]
    names = [stage.get("exit") or "last" for stage in stages]
    exits = {"  EXIT": max(map(len, names)) + 2} if "exit_stages" in cascade else {}
    priced = {"COST": -6} if any("relative_cost" in stage for stage in stages) else {}
    print_line()
    print_line(f"cascade by {cascade['confidence']}")
    dims = {"DIM" if exits else "  DIM": -5}
    table = Table({**exits, **dims, "ABOVE": -9, "TEMPERATURE": -9, "ROWS": -6, **priced})
    shares = cascade.get("exit_fractions", [])
    if len(shares) != len(stages):  # the report was cut: unknown
        shares = [None] * len(stages)
    for name, stage, share in zip(names, stages, shares, strict=True):
        is_last, cost = stage["threshold"] is None, stage.get("relative_cost")
        table.row(
            *([f"  {name}"] if exits else []),
            stage["dim"],
            "-" if is_last else f"{stage['threshold']:.6f}",
            f"{stage.get('temperature', 1.0):g}",
            "-" if share is None else f"{share:.1%}",
            *(["-" if cost is None else f"{cost:.3f}"] if priced else []),
        )
    if all(cascade.get(name) is not None for name in _REPORTED):
        print_line(
            f"  on {cascade['holdout_size']} rows: accuracy {cascade['accuracy']:.4f}, "
            f"{cascade['full_accuracy']:.4f} at the full dim; "
            f"expected dim {cascade['expected_dim']:.1f}, "
            f"cumulative {cascade['cumulative_dim']:.1f}"
        )
    promise = cascade.get("guarantee")
    if promise is not None:
        print_line(
            f"  promised with delta {promise['delta']:g}: right at the full dim and wrong here "
            f"in at most {promise['risk']:g} of rows; certified on {promise['size']} rows, "
            f"{promise['errors']} of them so"
        )
    drop = cascade.get("accuracy_drop_guarantee")
    if drop is not None:
        print_line(
            f"  promised with delta {drop['delta']:g}: accuracy at most {drop['risk']:g} below the "
            f"last stage's; certified on {drop['size']} rows, {drop['errors']} lost and "
            f"{drop['gains']} gained"
        )


def _print_quality(quality: Mapping[str, Mapping[str, float]]) -> None:
    print_lines("\nquality")
    measures = list(dict.fromkeys(name for row in quality.values() for name in row))
    table = Table({"  DIM": -5, **{name: -8 for name in measures}})
    for dim, row in quality.items():
        table.row(dim, *(f"{row[name]:.4f}" if name in row else "-" for name in measures))


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _specs(specs: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(
        f"{n} {spec['dtype']} {_shape(spec['shape'])}" for n, spec in sorted(specs.items())
    )


def _shape(shape: Sequence[int | None] | None) -> str:
    if shape is None:
        return "of any shape"
    sizes = ["any" if size is None else str(size) for size in shape]
    return f"({', '.join(sizes)})"
