"""What a model is, in lines a person reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..asking.printing import Table, printable
from ..indexing.places import in_bytes

_FOREIGN = "none: another tool exported it, and only `predict` of a client can ask it"
_REPORTED = ("holdout_size", "accuracy", "full_accuracy", "expected_dim", "cumulative_dim")


def show(found: Mapping[str, Any]) -> None:
    """Print what `inspect` found, the manifest first and the signatures last."""
    manifest = found["manifest"]
    kind = "" if manifest is None else f": {manifest['name']}, {manifest['kind']}"
    place = found["path"] if "path" in found else f"{found['model']} at {found['target']}"
    print(printable(place + kind))
    if manifest is None:
        _line("manifest", _FOREIGN)
    else:
        _manifest(manifest)
    if "sizes" in found:
        parts = [f"{name} {in_bytes(size)}" for name, size in found["sizes"].items()]
        _line("on disk", f"{in_bytes(sum(found['sizes'].values()))}: {', '.join(parts)}")
    for version in found["versions"]:
        _line("version", _version(version))
    for name in found.get("strays", ()):
        _line("no version", f"{name}, a file: a server takes it for a version and cannot load it")
    if manifest is not None:
        _tables(manifest)
    print("\nsignatures")
    for name in sorted(found["signatures"], key=_by_number):
        signature = found["signatures"][name]
        print(printable(f"  {name}: {_specs(signature['inputs'])}"))
        print(printable(f"    -> {_specs(signature['outputs'])}"))


def _by_number(name: str) -> tuple[str, int]:
    """A key by which embed_16 comes after embed_8."""
    kind, _, dim = name.rpartition("_")
    return (kind, int(dim)) if dim.isdecimal() else (name, 0)


def _line(name: str, value: object) -> None:
    print(f"  {name:12} {printable(str(value))}")


def _version(version: Mapping[str, Any]) -> str:
    if "state" not in version:
        return f"{version['version']}, {in_bytes(version['bytes'])}"
    error = f" ({version['error']})" if version["error"] else ""
    return f"{version['version']}, {version['state']}{error}"


def _manifest(manifest: Mapping[str, Any]) -> None:
    _line("dims", _numbers(manifest["dims"]))
    if manifest["weights"] is not None:
        _line("weights", _numbers(manifest["weights"]))
    _line("inputs", _specs(manifest["inputs"]))
    if manifest["decoder"] is not None:
        _line("decoder", ", ".join(f"{key} {value}" for key, value in manifest["decoder"].items()))
    scaled = "of unit length" if manifest["normalize"] else "as they are"
    _line("embeddings", f"{scaled}, compared by {manifest['metric']}")
    if manifest["num_classes"] is not None:
        names = "with names" if manifest["labels"] else "without names"
        tied = "one kernel for all dims" if manifest["tied"] else "a kernel for each dim"
        _line("classes", f"{manifest['num_classes']} {names}, top {manifest['top_k']}; {tied}")
    if manifest["size"] is not None:
        _line("gallery", f"{manifest['size']} rows")
    if manifest["funnel"] is not None:
        funnel = manifest["funnel"]
        shortlists = _numbers(funnel["shortlists"]) or "none"
        dims = " -> ".join(map(str, funnel["dims"]))
        _line("funnel", f"{dims}, shortlists {shortlists}, k {funnel['k']}")
    _line("fingerprint", manifest["fingerprint"])
    if manifest["encoder_fingerprint"] is not None:
        _line("encoder", manifest["encoder_fingerprint"])
    made = {key.replace("_", " "): value for key, value in manifest["made_with"].items()}
    _line("made with", ", ".join(f"{name} {value}" for name, value in made.items()))


def _tables(manifest: Mapping[str, Any]) -> None:
    cascade = manifest["cascade"]
    if cascade is not None:
        print()
        print(printable(f"cascade by {cascade['confidence']}"))
        table = Table({"  DIM": -5, "ABOVE": -9, "TEMPERATURE": -9, "ROWS": -6})
        exits = cascade.get("exit_fractions", [])  # as many as stages, or nobody knows
        if len(exits) != len(cascade["stages"]):
            exits = [None] * len(cascade["stages"])
        for stage, share in zip(cascade["stages"], exits, strict=True):
            last = stage["threshold"] is None
            table.row(
                stage["dim"],
                "-" if last else f"{stage['threshold']:.6f}",
                f"{stage.get('temperature', 1.0):g}",
                "-" if share is None else f"{share:.1%}",
            )
        if all(cascade.get(name) is not None for name in _REPORTED):
            print(
                f"  on {cascade['holdout_size']} rows: accuracy {cascade['accuracy']:.4f}, "
                f"{cascade['full_accuracy']:.4f} at the full dim; "
                f"expected dim {cascade['expected_dim']:.1f}, "
                f"cumulative {cascade['cumulative_dim']:.1f}"
            )
        promise = cascade.get("guarantee")
        if promise is not None:
            print(
                f"  promised with delta {promise['delta']:g}: right at the full dim and wrong here "
                f"in at most {promise['risk']:g} of rows; certified on {promise['size']} rows, "
                f"{promise['errors']} of them so"
            )
    quality = manifest["quality"]
    if quality:
        print("\nquality")
        measures = list(dict.fromkeys(name for row in quality.values() for name in row))
        table = Table({"  DIM": -5, **{name: -8 for name in measures}})
        for dim, row in quality.items():
            table.row(dim, *(f"{row[name]:.4f}" if name in row else "-" for name in measures))


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _specs(specs: Mapping[str, Mapping[str, Any]]) -> str:
    return ", ".join(f"{n} {spec['dtype']} {_shape(spec['shape'])}" for n, spec in specs.items())


def _shape(shape: Sequence[int | None] | None) -> str:
    if shape is None:
        return "of any shape"
    sizes = ["any" if size is None else str(size) for size in shape]
    return f"({', '.join(sizes)})"
