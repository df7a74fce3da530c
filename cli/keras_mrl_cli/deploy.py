"""Write docker compose, Kubernetes and config files for a model.

They run tensorflow/serving over the model's folder, and are made for the highest version in it:
its name, its dims, its size on disk. A README.md among them says how to start, and how clients
name the servers.

  keras-mrl deploy deploy/digits --base-path models/digits
"""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from string import Template
from textwrap import indent
from types import SimpleNamespace
from typing import TYPE_CHECKING

import click

from .output import in_bytes, print_line
from .shared import DONE, MAX_PORT, MISUSED, Option, RefusalError, command, count_option, refusing

if TYPE_CHECKING:
    from keras_mrl_serving import Manifest

FILES = (
    "README.md",
    "docker-compose.yml",
    "kubernetes.yaml",
    "kustomization.yaml",
    "models.config",
    "batching.config",
    "monitoring.config",
    "grafana.json",
)
_MOST_ROWS = 1024
_CONNECTION_AGE_S = 60
# An image as containers name one: host and port, a path in lower case, a tag, a digest.
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?"
_PART = "[a-z0-9]+((\\.|_{1,2}|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    f"({_LABEL}(\\.{_LABEL})*(:[0-9]+)?/)?{_PART}(/{_PART})*"
    "(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@[A-Za-z][A-Za-z0-9]*:[0-9a-fA-F]{32,})?"
)
_ALONE = re.compile(r"^(?P<margin> *)\$(?P<key>[a-z_]+)$", re.MULTILINE)
_MOST_SLUG = 40  # Kubernetes allows 63, and names of ours are longer by a suffix


@command(
    __doc__,
    click.Argument(["out"], metavar="OUT_DIR", help="folder to write to"),
    Option(
        "--base-path",
        old=["--model-base-path"],
        required=True,
        metavar="DIR",
        help="folder of the model's versions",
    ),
    Option("--name", metavar="NAME", help="name clients ask for (the manifest's)"),
    Option(
        "--image",
        default="tensorflow/serving:2.20.0",
        metavar="IMAGE",
        help="image of the server (tensorflow/serving:2.20.0)",
    ),
    count_option("--replicas", "N", "servers (2)", usual=2, most=1000),
    count_option("--port", "PORT", "gRPC port (8500)", usual=8500, most=MAX_PORT),
    count_option("--rest-port", "PORT", "HTTP port (8501)", usual=8501, most=MAX_PORT),
    count_option(
        "--memory",
        "MIB",
        "memory of a server in MiB (1024 and three times the version's size on disk)",
        most=2**31 - 1,
        remedy="Leave it out for a first guess.",
    ),
    count_option("--max-batch-size", "ROWS", "rows of a batch (128)", usual=128, most=_MOST_ROWS),
    Option("--force", is_flag=True, help="replace files that are there"),
)
def deploy(arguments: SimpleNamespace) -> int:
    """Render every template into the folder, and print each file's path."""
    if arguments.port == arguments.rest_port:
        raise RefusalError(
            "gRPC and HTTP need a port each. "
            f"Received: --port and --rest-port {arguments.port}. Name another.",
            MISUSED,
        )
    values = _values(arguments)
    out = Path(arguments.out)
    text_by_name = {name: _rendered(name, values) for name in FILES}
    rule = "OUT_DIR must be a folder that can be written."
    with refusing(rule=rule, remedy="Name another.", place=str(out)):
        out.mkdir(parents=True, exist_ok=True)
        there = [name for name in FILES if (out / name).exists()]
        if there and not arguments.force:
            raise RefusalError(
                "Files are replaced only with --force. "
                f"Received: {out}, which holds {there[0]}. Add --force, or name another folder."
            )
        for name, text in text_by_name.items():
            (out / name).write_text(text, "utf-8")
    for name in FILES:
        print_line(str(out / name))
    return DONE


def _rendered(name: str, values: dict[str, str]) -> str:
    """Return a template's text with these values; one alone on its line keeps its margin."""
    text = (files("keras_mrl_serving") / "deploy" / name).read_text("utf-8")

    def spread(line: re.Match[str]) -> str:
        return indent(values[line["key"]], line["margin"]).replace("$", "$$")

    return Template(_ALONE.sub(spread, text)).substitute(values)


def _values(arguments: SimpleNamespace) -> dict[str, str]:
    from keras_mrl_serving.contract import is_model_name
    from keras_mrl_serving.saved_model import sizes, version_number

    folder, manifest = _model(arguments.base_path)
    name = manifest.name if arguments.name is None else arguments.name
    if not is_model_name(name):
        raise RefusalError(
            "The name of a model that is served is of letters, digits, '_', '.' and '-', the first "
            f"and the last a letter or digit. Received: {name!r}. Give another: --name."
        )
    if not _IMAGE.fullmatch(arguments.image):
        raise RefusalError(
            "--image must be the name of an image. "
            f"Received: {arguments.image!r}. Give for example tensorflow/serving:2.20.0.",
            MISUSED,
        )
    slug = _slug(name)
    number = str(version_number(folder.name))  # the folder may be named " 007"
    disk_bytes = sum(sizes(folder).values())
    memory_mib, why_memory = arguments.memory, "given to keras-mrl deploy"
    if memory_mib is None:
        memory_mib = 1024 + 3 * -(-disk_bytes // 2**20)
        on_disk = f"{in_bytes(disk_bytes)} of version {number} on disk"
        why_memory = f"1024 MiB and three times the {on_disk}"
    batch = arguments.max_batch_size
    allowed = [2**power for power in range(batch.bit_length()) if 2**power < batch]
    batching_flags, why_batching = _batching(manifest)
    return {
        "name": name,
        "slug": slug,
        "slug_scalar": _scalar(slug),
        "models_scalar": _scalar(f"{slug}-models"),
        "config_scalar": _scalar(f"{slug}-config"),
        "mount_scalar": _scalar(f"/models/{name}"),
        "kind": manifest.kind,
        "version": number,
        "dims": ", ".join(map(str, manifest.dims)),
        "source_scalar": _scalar(str(folder.parent.absolute())).replace("$", "$$"),  # for compose
        "batching_flags": batching_flags,
        "batching_why": why_batching,
        "image_scalar": _scalar(arguments.image),
        "replicas": str(arguments.replicas),
        "port": str(arguments.port),
        "rest_port": str(arguments.rest_port),
        "memory_mib": str(memory_mib),
        "memory_why": why_memory,
        "max_batch_size": str(batch),
        "allowed_batch_sizes": "\n".join(f"allowed_batch_sizes: {n}" for n in [*allowed, batch]),
        "connection_age_s": str(_CONNECTION_AGE_S),
        "connection_age_ms": str(_CONNECTION_AGE_S * 1000),
    }


def _batching(manifest: Manifest) -> tuple[str, str]:
    """Return the flags of batching, and why: only rows of equal shapes are put together."""
    towers = (manifest.inputs, (manifest.other_tower or {}).get("inputs", {}))
    open_ended = [
        name for inputs in towers for name, spec in inputs.items() if None in spec["shape"][1:]
    ]
    if not open_ended:
        return (
            "- --enable_batching=true\n- --batching_parameters_file=/config/batching.config",
            "In use: every row of the model's inputs has one shape.",
        )
    why = (
        f"Not in use: requests differ in the shape of {', '.join(map(_plain, open_ended))}, and "
        "only equal shapes are batched."
    )
    return f"# {why}\n- --enable_batching=false", why


def _model(base_path: str) -> tuple[Path, Manifest]:
    """Return the folder of the highest version, and its manifest."""
    from keras_mrl_serving import ManifestError
    from keras_mrl_serving.saved_model import read_manifest, read_signatures

    from .files import find_version

    rule = "--base-path must be a folder that can be read."
    with refusing(ManifestError, rule=rule, remedy="Correct the path.", place=base_path):
        folder, versions = find_version(base_path)
        manifest = read_manifest(folder)
        read_signatures(folder)  # a version that cannot be read is not deployed
    if not versions:
        raise RefusalError(
            "--base-path must be the folder above the versions. "
            f"Received: {base_path}, which is itself a version. Give {folder.absolute().parent}."
        )
    if manifest is None:
        raise RefusalError(
            "A deployment is made for a model that carries a manifest. "
            f"Received: {folder}, which has none. Export it with keras-mrl export."
        )
    return folder, manifest


def _slug(name: str) -> str:
    """Return the name as Kubernetes takes one: lower case, digits and '-', a letter first."""
    slug = re.sub("[^a-z0-9]+", "-", name.lower())[:_MOST_SLUG].strip("-")
    return slug if slug[0].isalpha() else f"model-{slug}"


def _scalar(text: str) -> str:
    """Return a string of YAML: one of JSON, with what does not print as an escape of YAML's.

    Raises:
        RefusalError: If it is the name of a file that is no text.
    """
    if not text.isprintable():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RefusalError(
                "--base-path must be a path in UTF-8. "
                f"Received: {text}. Rename the folder, or link to it."
            ) from error
    quoted = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)


def _plain(name: str) -> str:
    """Return a name for a comment or for Markdown: other characters than these are escaped."""
    return re.sub("[^A-Za-z0-9_.:/ -]", lambda c: f"\\u{ord(c[0]):04x}", name)
