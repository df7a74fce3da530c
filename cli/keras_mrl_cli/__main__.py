"""`keras-mrl`: finds the command and runs it; no room is imported before that."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from importlib.metadata import version
from types import ModuleType

from . import classify, compare, demo, deploy, embed, export, index, inspect, search, serve

_COMMANDS: dict[str, ModuleType] = {
    "demo": demo,
    "compare": compare,
    "export": export,
    "serve": serve,
    "deploy": deploy,
    "classify": classify,
    "embed": embed,
    "index": index,
    "search": search,
    "inspect": inspect,
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    top = argparse.ArgumentParser(
        prog="keras-mrl",
        description="Matryoshka representations in Keras: train once, serve every dim.",
        epilog="`keras-mrl COMMAND --help` explains a command. Start with `keras-mrl demo`.",
    )
    top.add_argument("--version", action="version", version=f"keras-mrl {version('keras-mrl')}")
    _add(top, _COMMANDS)
    return top


def _add(parser: argparse.ArgumentParser, modules: Mapping[str, ModuleType]) -> None:
    """Add commands; a module that holds commands of its own is but their name."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, module in modules.items():
        summary, _, rest = (module.__doc__ or "").partition("\n")
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary}\n{rest}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if hasattr(module, "COMMANDS"):
            _add(command, module.COMMANDS)
        else:
            module.add_arguments(command)
            command.set_defaults(run=module.run)


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 if it did its work, 1 if it could not, 2 for arguments that do not fit.
    """
    known, rest = parser().parse_known_args(arguments)
    try:
        return int(known.run(known, rest))
    except KeyboardInterrupt:
        print("keras-mrl: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
