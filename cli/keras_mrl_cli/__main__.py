"""`keras-mrl`: finds the command and runs it; no room is imported before that."""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from types import ModuleType

from . import classify, demo, embed, serve

_COMMANDS: dict[str, ModuleType] = {
    "demo": demo,
    "serve": serve,
    "classify": classify,
    "embed": embed,
}


def parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    top = argparse.ArgumentParser(
        prog="keras-mrl",
        description="Matryoshka representations in Keras: train once, serve every dim.",
        epilog="`keras-mrl COMMAND --help` explains a command. Start with `keras-mrl demo`.",
    )
    top.add_argument("--version", action="version", version=f"keras-mrl {version('keras-mrl')}")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for name, module in _COMMANDS.items():
        summary, _, rest = (module.__doc__ or "").partition("\n")
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary}\n{rest}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return top


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
