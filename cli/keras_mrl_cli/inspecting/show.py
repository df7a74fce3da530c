"""The work of `inspect`: what is read of a model, from its folder or from its server."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from keras_mrl_serving import KerasMrlError, Manifest
from keras_mrl_serving.calls import Signature
from keras_mrl_serving.contract import DESCRIBE
from keras_mrl_serving.saved_model import read_manifest, read_signatures, sizes

from ..asking import RefusalError, one_line, server_flags
from ..asking.printing import print_json
from ..asking.server import connected
from . import text
from .folders import disk_bytes, find_version, strays

# What is no path: a scheme, several addresses, or a host and its port.
_TARGET = re.compile(r"\w+:(//)?/.*|[^/]*,[^/]*|[^/]*:\d+")


def show(arguments: argparse.Namespace) -> int:
    """Print what the folder or the server says."""
    what = arguments.what
    if Path(what).exists() or not _TARGET.fullmatch(what):
        if flags := server_flags(arguments):
            raise RefusalError(
                "A folder is read without a server. "
                f"Received: {', '.join(flags)} for {what}. Leave them out, or name HOST:PORT."
            )
        found = _of_folder(what)
    else:
        found = _of_server(arguments)
    if arguments.json:
        print_json(**found)
    else:
        text.show(found)
    return 0


def _of_folder(path: str) -> dict[str, Any]:
    try:
        folder, known = find_version(path)
        manifest, signatures = read_manifest(folder), read_signatures(folder)
        return {
            "path": str(folder),
            "versions": [{"version": n, "bytes": disk_bytes(p)} for n, p in known.items()],
            "strays": strays(Path(path)) if known else [],
            "sizes": sizes(folder),
            **_described(manifest, signatures),
        }
    except KerasMrlError as error:
        raise RefusalError(one_line(error)) from error
    except OSError as error:
        raise RefusalError(
            "A model must lie in a folder that can be read. "
            f"Received: {error.filename or path} ({error.strerror}). Correct the path."
        ) from error


def _of_server(arguments: argparse.Namespace) -> dict[str, Any]:
    arguments.target = arguments.what
    with connected(arguments) as client:
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
