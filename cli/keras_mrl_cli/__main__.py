"""`keras-mrl`: finds the command and runs it; a command's module is imported when it is called."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

import click

from .output import print_note
from .shared import FAILED, HELP, INTERRUPTED, MISUSED, RefusalError, refuse

# The first line of each command's own help, so that listing them imports none.
COMMANDS = {
    "demo": "Train, calibrate, export, serve and ask, on handwritten digits.",
    "compare": "Compare Matryoshka with its alternatives on your own data.",
    "export": "Write a .keras file as a version that TensorFlow Serving serves.",
    "publish": "Publish another policy for the weights of a version.",
    "serve": "Serve a model over gRPC and REST, with TensorFlow Serving's flags.",
    "deploy": "Write docker compose, Kubernetes and config files for a model.",
    "classify": "Ask a server for the classes of texts, images or rows.",
    "regress": "Ask a server for the values of texts, images or rows.",
    "embed": "Ask a server for the embeddings of texts, images or rows.",
    "adapt": "Make embeddings Matryoshka that were not trained so.",
    "index": "Build an index of embeddings, and look at one that is there.",
    "search": "Search an index by embeddings, or by texts and images.",
    "inspect": "Show an exported model: its signatures, its manifest, its sizes.",
}


class FrontDoor(click.Group):
    """The group of all commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order a newcomer needs them."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command and return it; None for a name that is none."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"{__package__}.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the names and summaries; no module is imported."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


door = FrontDoor(
    help="Matryoshka representations in Keras: train once, serve every dim.",
    epilog="`keras-mrl COMMAND --help` explains a command. Start with `keras-mrl demo`.",
    no_args_is_help=False,
    subcommand_metavar="COMMAND ...",
    context_settings=HELP,
)
click.version_option(package_name="keras-mrl", message="keras-mrl %(version)s")(door)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 if it did its work, 1 if it could not, 2 for arguments that do not fit, 130 after an
        interrupt.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with door.make_context("keras-mrl", words) as context:
            status: int = door.invoke(context)
        sys.stdout.flush()
        return status
    except click.exceptions.Exit as ended:  # of --help and --version
        return ended.exit_code
    except click.UsageError as error:
        path = "keras-mrl" if error.ctx is None else error.ctx.command_path
        text = error.format_message()
        stop = "" if text.endswith((".", "?")) else "."
        return refuse(f"{text}{stop} Try '{path} --help'.", MISUSED)
    except RefusalError as refusal:
        return refuse(str(refusal), refusal.status)
    except KeyboardInterrupt:
        return refuse("interrupted", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has enough; Python would say so at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception:  # a mistake of ours; what it quotes may be anybody's
        for line in traceback.format_exc().splitlines():
            print_note(line)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
