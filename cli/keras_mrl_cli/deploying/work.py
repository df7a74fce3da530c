"""From a model's manifest and the templates to the files of a deployment."""

from __future__ import annotations

import argparse
import json
import re
from importlib.resources import files
from pathlib import Path
from string import Template
from textwrap import indent

from keras_mrl_serving import Manifest, ManifestError
from keras_mrl_serving.saved_model import read_manifest, read_signatures

from ..asking import RefusalError, one_line
from ..indexing.places import in_bytes
from ..inspecting.folders import disk_bytes, find_version

FILES = (
    "README.md",
    "docker-compose.yml",
    "kubernetes.yaml",
    "kustomization.yaml",
    "models.config",
    "batching.config",
    "monitoring.config",
)
_CONNECTION_AGE_S = 60
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?")
# An image as containers name one: host and port, a path in lower case, a tag, a digest.
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?"
_PART = "[a-z0-9]+((\\.|_{1,2}|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    f"({_LABEL}(\\.{_LABEL})*(:[0-9]+)?/)?{_PART}(/{_PART})*"
    "(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@[A-Za-z][A-Za-z0-9]*:[0-9a-fA-F]{32,})?"
)
_ALONE = re.compile(r"^(?P<margin> *)\$(?P<key>[a-z_]+)$", re.MULTILINE)
_MOST_SLUG = 40  # Kubernetes allows 63, and names of ours are longer by a suffix


def deploy(arguments: argparse.Namespace) -> int:
    """Render every template into the folder, and print what was written."""
    values = _values(arguments)
    out = Path(arguments.out)
    rendered = {name: render(name, values) for name in FILES}
    try:
        out.mkdir(parents=True, exist_ok=True)
        there = [name for name in FILES if (out / name).exists()]
        if there and not arguments.force:
            raise RefusalError(
                "Files are replaced only with --force. "
                f"Received: {out}, which holds {there[0]}. Add --force, or name another folder."
            )
        for name, text in rendered.items():
            (out / name).write_text(text, "utf-8")
    except OSError as error:
        raise RefusalError(
            "OUT_DIR must be a folder that can be written. "
            f"Received: {error.filename or out} ({error.strerror}). Name another."
        ) from error
    for name in FILES:
        print(out / name)
    return 0


def render(name: str, values: dict[str, str]) -> str:
    """Return the file `name` with these values in it; one alone on its line keeps its margin."""
    text = (files("keras_mrl_serving") / "deploy" / name).read_text("utf-8")
    spread = _ALONE.sub(lambda line: indent(values[line["key"]], line["margin"]), text)
    return Template(spread).substitute(values)


def _values(arguments: argparse.Namespace) -> dict[str, str]:
    folder, manifest = _model(arguments.model_base_path)
    name = _checked(manifest.name if arguments.name is None else arguments.name)
    if not _IMAGE.fullmatch(arguments.image):
        raise RefusalError(
            "--image must be the name of an image. "
            f"Received: {arguments.image!r}. Give for example tensorflow/serving:2.20.0.",
            status=2,
        )
    size = disk_bytes(folder)
    memory = arguments.memory
    why = "given to keras-mrl deploy"
    if memory is None:
        memory = 1024 + 3 * -(-size // 2**20)
        why = f"1024 MiB and three times the {in_bytes(size)} of version {folder.name} on disk"
    batch = arguments.max_batch_size
    allowed = [2**power for power in range(batch.bit_length()) if 2**power < batch]
    path = json.dumps(str(folder.parent.absolute()), ensure_ascii=False)
    base_path = path.replace("$", "$$")  # compose's escape
    flags, why_batching = _batching(manifest)
    return {
        "name": name,
        "slug": _slug(name),
        "kind": manifest.kind,
        "version": folder.name,
        "dims": ", ".join(map(str, manifest.dims)),
        "base_path": base_path,
        "batching_flags": flags,
        "batching_why": why_batching,
        "image": arguments.image,
        "replicas": str(arguments.replicas),
        "port": str(arguments.port),
        "rest_port": str(arguments.rest_port),
        "memory_mib": str(memory),
        "memory_why": why,
        "max_batch_size": str(batch),
        "allowed_batch_sizes": "\n".join(f"allowed_batch_sizes: {n}" for n in [*allowed, batch]),
        "connection_age_s": str(_CONNECTION_AGE_S),
        "connection_age_ms": str(_CONNECTION_AGE_S * 1000),
    }


def _batching(manifest: Manifest) -> tuple[str, str]:
    """The flags of batching, and why: rows are put together only where their shapes are equal."""
    open_ended = [name for name, spec in manifest.inputs.items() if None in spec["shape"][1:]]
    if not open_ended:
        return (
            "- --enable_batching=true\n- --batching_parameters_file=/config/batching.config",
            "In use: every row of the model's inputs has one shape.",
        )
    why = (
        f"Not in use: requests differ in the shape of {', '.join(open_ended)}, and only equal "
        "shapes are batched."
    )
    return f"# {why}\n- --enable_batching=false", why


def _model(base_path: str) -> tuple[Path, Manifest]:
    try:
        folder, known = find_version(base_path)
        manifest = read_manifest(folder)
        read_signatures(folder)  # a version that cannot be read is not deployed
    except ManifestError as error:
        raise RefusalError(one_line(error)) from error
    except OSError as error:
        raise RefusalError(
            "--model-base-path must be a folder that can be read. "
            f"Received: {error.filename or base_path} ({error.strerror}). Correct the path."
        ) from error
    if not known:
        raise RefusalError(
            "--model-base-path must be the folder above the versions. "
            f"Received: {base_path}, which is itself a version. Give {folder.absolute().parent}."
        )
    if manifest is None:
        raise RefusalError(
            "A deployment is made for a model that carries a manifest. "
            f"Received: {folder}, which has none. Export it with keras-mrl export."
        )
    return folder, manifest


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise RefusalError(
            "The name of a model that is served is of letters, digits, '_', '.' and '-', the first "
            f"and the last a letter or digit. Received: {name!r}. Give another: --name."
        )
    return name


def _slug(name: str) -> str:
    """The name as Kubernetes takes one: lower case, digits and '-', a letter first."""
    slug = re.sub("[^a-z0-9]+", "-", name.lower())[:_MOST_SLUG].strip("-")
    return slug if slug[0].isalpha() else f"model-{slug}"
