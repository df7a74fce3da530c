"""What every command shares: how flags are declared, how a command refuses, what ends it.

A command is a function of one namespace, declared with `@command(text, *params)`. It returns its
exit status: 0 done, 1 could not. `RefusalError` ends it with one sentence and a status, 2 for
arguments that do not fit; `main` alone prints that sentence. No room of the project is imported
with this module, so that help is quick and needs nothing installed.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, SimpleNamespace
from typing import Any

import click

from .output import print_note

DONE, FAILED, MISUSED, INTERRUPTED = 0, 1, 2, 130
MAX_PORT = 2**16 - 1

HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 80}

Run = Callable[[SimpleNamespace], int]
Check = Callable[[click.Context, click.Parameter, Any], Any]

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class RefusalError(Exception):
    """Ends a command with one sentence.

    Args:
        sentence: Rule, received, remedy.
        status: Exit status.
    """

    def __init__(self, sentence: str, status: int = FAILED) -> None:
        super().__init__(sentence)
        self.status = status


def refuse(sentence: str, status: int = FAILED) -> int:
    """Print a sentence where errors go, and return the exit status."""
    print_note(f"keras-mrl: {sentence}")
    return status


def one_line(error: BaseException) -> str:
    """Return an error's text in one line; it may quote a server that used many."""
    return " ".join(str(error).split())


@contextmanager
def refusing(
    *kinds: type[Exception],
    rule: str = "",
    remedy: str = "",
    place: str = "",
    status: int = FAILED,
) -> Iterator[None]:
    """Turn errors of a room into refusals; the rooms write sentences of three clauses already.

    Args:
        kinds: Classes of error, besides an `OSError` with a sentence of a room.
        rule: First clause of the sentence for an error of the system; empty lets it pass.
        remedy: Its last clause.
        place: The file or folder it names where the error names none.
        status: Exit status.

    Raises:
        RefusalError: For these errors.
    """
    try:
        yield
    except kinds as error:
        raise RefusalError(one_line(error), status) from error
    except BrokenPipeError:  # the reader of our output has enough: `main` ends quietly
        raise
    except OSError as error:
        if not rule:
            raise
        if error.errno is None:
            raise RefusalError(one_line(error), status) from error
        named = error.filename or place
        received = f"{named} ({error.strerror})" if named else error.strerror
        raise RefusalError(f"{rule} Received: {received}. {remedy}") from error


@contextmanager
def needing(extras: str, rule: str) -> Iterator[None]:
    """Turn an import that fails into a refusal, which says what to install.

    Args:
        extras: Extras of the package that bring the import, with commas between them.
        rule: First clause of the sentence: what the command does with it.
    """
    try:
        yield
    except ImportError as error:
        raise RefusalError(
            f"{rule} Received: {error}. Install what it needs: pip install 'keras-mrl[{extras}]'."
        ) from error


@contextmanager
def refusing_index_errors(status: int = FAILED) -> Iterator[None]:
    """Turn errors of an index, its files and its libraries into refusals."""
    from keras_mrl_serving import KerasMrlError

    rule = "An index lies in a folder that can be read, and written to build it."
    remedy = "Correct the path, or make room there."
    kinds = (KerasMrlError, ImportError, ValueError)
    try:
        with refusing(*kinds, rule=rule, remedy=remedy, status=status):
            yield
    except MemoryError as error:
        raise RefusalError(
            "A plan holds a scaled copy of the gallery in memory, and an index its first stage. "
            f"Received: {one_line(error).rstrip('.') or 'no memory is left'}. "
            "Give --dims and --shortlists with a small first dim, and nothing is planned."
        ) from error


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise `SystemExit` meanwhile, so that `finally` clauses run.

    A signal that is ignored, as under nohup, stays so.
    """
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    taken = [number for number, handler in before.items() if handler is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


def _end(number: int, frame: FrameType | None) -> None:
    del frame  # that of the interrupted code
    raise SystemExit(128 + number)


# Flags.


class Option(click.Option):
    """A flag that remembers its old spellings, and may take several words.

    Args:
        names: Its spelling, and the name of its value where that differs.
        old: Spellings of before, which are accepted and not shown.
        many: Whether it takes every word up to the next flag, as in `--data A B`.
        settings: As of `click.Option`.

    Attributes:
        section: Heading of the help it stands under.
    """

    def __init__(
        self, *names: str, old: Sequence[str] = (), many: bool = False, **settings: Any
    ) -> None:
        if many:
            settings["multiple"] = True
        super().__init__(names, **settings)
        self.old = tuple(old)
        self.many = many
        self.section = "Options"

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Accept the old spellings too."""
        shown, self.opts = self.opts, [*self.opts, *self.old]
        super().add_to_parser(parser, ctx)
        self.opts = shown


def under(section: str, *options: Option) -> tuple[Option, ...]:
    """Return the options, to stand under a heading of their own."""
    for option in options:
        option.section = section
    return options


class Command(click.Command):
    """A command: a function of one namespace, with flags under headings.

    The function returns the exit status. Words that are no flag of the command are `rest` of its
    namespace, where the settings of the command allow them.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat a flag of many words before each of them: click takes one word a flag."""
        flags = {
            name
            for param in self.params
            if isinstance(param, Option) and param.many
            for name in (*param.opts, *param.old)
        }
        try:
            return super().parse_args(ctx, list(_one_word_a_flag(args, flags)))
        except click.UsageError as error:
            error.ctx = error.ctx or ctx  # so that the hint names this command
            raise

    def invoke(self, ctx: click.Context) -> int:
        """Do the work; return the exit status."""
        run: Run = self.callback  # type: ignore[assignment]
        return run(SimpleNamespace(**ctx.params, rest=ctx.args))

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the flags under their headings."""
        records_by_section: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)):
                section = getattr(param, "section", "Options")
                records_by_section.setdefault(section, []).append(record)
        for title, records in records_by_section.items():
            with formatter.section(title):
                formatter.write_dl(records)


def command(
    text: str | None, *params: click.Parameter, **settings: Any
) -> Callable[[Run], Command]:
    """Return a decorator that makes a command of a function.

    Args:
        text: Its help: summary, explanation and examples, whose lines begin with two spaces.
        params: Flags and arguments.
        settings: As of `click.Command`.
    """
    settings.setdefault("context_settings", {}).update(HELP)
    settings |= {"help": _with_examples(text or ""), "short_help": (text or "").partition("\n")[0]}
    return lambda run: Command(None, callback=run, params=list(params), **settings)


def group(text: str | None, **commands: click.Command) -> click.Group:
    """Return a command that has commands of its own."""
    return click.Group(
        commands=commands,
        help=_with_examples(text or ""),
        no_args_is_help=False,
        subcommand_metavar="COMMAND ...",
        context_settings=HELP,
    )


def _with_examples(text: str) -> str:
    """Return the text with click's mark before each paragraph of examples: do not wrap it."""
    paragraphs = text.strip("\n").split("\n\n")
    return "\n\n".join(f"\b\n{part}" if part.startswith("  ") else part for part in paragraphs)


def _one_word_a_flag(words: Sequence[str], flags: set[str]) -> Iterator[str]:
    """Yield the words, with a flag of many words before each of them."""
    flag = None
    for number, word in enumerate(words):
        if word == "--":
            yield from words[number:]
            return
        if _is_flag(word):
            flag = word if word in flags else None
            if flag is None:
                yield word
            elif number + 1 == len(words) or _is_flag(words[number + 1]):
                raise click.BadOptionUsage(flag, f"Option '{flag}' requires an argument.")
        elif flag is None:
            yield word
        else:
            yield from (flag, word)


def _is_flag(word: str) -> bool:
    return word.startswith("-") and word != "-"


def dims(text: str) -> tuple[int, ...]:
    """Return the integers of a flag, which have commas between them."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(
            f"must be integers with commas. Received: {text!r}. Give for example 8,16."
        ) from None


def share(text: str) -> float:
    """Return the number in (0, 1] of a flag."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise click.BadParameter(
            f"must be a share in (0, 1]. Received: {text!r}. Give for example 0.95."
        )
    return number


def checked_by(is_allowed: Callable[[float], bool], rule: str, remedy: str) -> Check:
    """Return a callback of a flag that refuses other numbers: the flag must `rule`."""

    def check(_ctx: click.Context, param: click.Parameter, number: Any) -> Any:
        if number is not None and not is_allowed(number):
            sentence = f"{param.opts[0]} must {rule}. Received: {number}. {remedy}"
            raise RefusalError(sentence, MISUSED)
        return number

    return check


def count_option(
    name: str,
    metavar: str,
    text: str,
    *,
    usual: int | None = None,
    least: int = 1,
    most: int | None = None,
    remedy: str = "",
) -> Option:
    """Return a flag whose value is an integer of at least `least`, and of at most `most`.

    Args:
        name: Its spelling.
        metavar: What its help calls the value.
        text: Its help.
        usual: The value without the flag.
        least: The smallest value.
        most: The largest value; None for any.
        remedy: Last sentence for another value; empty says to leave the flag out.
    """
    check = checked_by(
        lambda number: least <= number and (most is None or number <= most),
        f"be at least {least}" if most is None else f"lie in {least}..{most}",
        remedy or f"Leave it out for {usual}.",
    )
    return Option(name, type=int, default=usual, callback=check, metavar=metavar, help=text)


def flag_of(name: str) -> str:
    """Return the flag whose value has this name.

    Examples:
        >>> flag_of("max_batch_size")
        '--max-batch-size'
    """
    return "--" + name.replace("_", "-")


def given_flags(arguments: SimpleNamespace, names: Iterable[str]) -> list[str]:
    """Return which of these flags were given: their values differ from what holds without them."""
    return [
        flag_of(name)
        for name in names
        if getattr(arguments, name) not in (None, (), _DEFAULTS.get(name))
    ]


def check_one_of(arguments: SimpleNamespace, *names: str) -> None:
    """Raise `RefusalError` where two flags were given that exclude each other."""
    flags = given_flags(arguments, names)
    if len(flags) > 1:
        raise RefusalError(
            f"Only one of {', '.join(map(flag_of, names))} can be given. "
            f"Received: {' with '.join(flags)}. Leave out one.",
            MISUSED,
        )


# Flags that several commands have.

DEFAULT_MODEL = "default"
SERVER_FLAGS = tuple(
    "model timeout tls_ca tls_server_name tls_cert tls_key metadata no_proxy".split()
)
FILE_FLAGS = ("max_batch_size", "scale", "skip_unreadable")
_SWITCHES = ("no_proxy", "skip_unreadable", "no_verify")
_DEFAULTS = {"model": DEFAULT_MODEL, "scale": 1.0, **dict.fromkeys(_SWITCHES, False)}


def files_argument(before: str = "") -> click.Argument:
    """Return the files of rows that a server is asked about."""
    images = "images (.jpg .jpeg .png .gif .bmp .webp)"
    texts = "texts (.txt, - for standard input, .csv .tsv .jsonl with --column, words with a blank)"
    text = f"{before}{images}, .npy of rows, .npz of rows by input name, {texts}"
    return click.Argument(["files"], nargs=-1, metavar="FILES...", help=text)


def target_option(text: str = "the server's gRPC port; several with commas") -> Option:
    """Return the flag that names a server."""
    return Option("--target", metavar="HOST:PORT", help=text)


def take_target(arguments: SimpleNamespace) -> None:
    """Take the server from the first word, its old place, where `--target` names none.

    Raises:
        RefusalError: If there is no server, or no file to ask it about.
    """
    words = arguments.files
    if arguments.target is None and words:
        arguments.target, arguments.files = words[0], words[1:]
    if not (arguments.files or arguments.text):
        raise RefusalError(
            "A server is asked about files. "
            f"Received: {arguments.target or 'neither'}{' alone' if arguments.target else ''}. "
            "Give both, for example --target localhost:8500 photo.jpg.",
            MISUSED,
        )


def server_options() -> list[Option]:
    """Return the flags that say how a server is asked."""
    return [
        Option(
            "--model",
            default=DEFAULT_MODEL,
            metavar="NAME",
            help=f"name the server gives it ({DEFAULT_MODEL})",
        ),
        Option(
            "--timeout",
            type=float,
            callback=checked_by(
                lambda seconds: math.isfinite(seconds) and seconds > 0,
                "be a positive number of seconds",
                "Give for example 10.",
            ),
            metavar="SECONDS",
            help="how long an answer may take, retries included (10)",
        ),
        Option(
            "--wait",
            type=float,
            default=0.0,
            callback=checked_by(
                lambda seconds: math.isfinite(seconds) and seconds >= 0,
                "be a number of seconds",
                "Give for example 60.",
            ),
            metavar="SECONDS",
            help="how long to wait for a server that is starting, or still loads the model (0)",
        ),
        Option(
            "--tls-ca",
            metavar="FILE",
            help="PEM file of the authority that signs the server's certificate (that of gRPC "
            "where another --tls flag is given, else no TLS)",
        ),
        Option(
            "--tls-server-name",
            metavar="NAME",
            help="name in the server's certificate, if it is not the target's; turns TLS on",
        ),
        Option("--tls-cert", metavar="FILE", help="PEM file of the client's certificates"),
        Option("--tls-key", metavar="FILE", help="PEM file of the key of --tls-cert"),
        Option(
            "--metadata",
            multiple=True,
            metavar="KEY=VALUE",
            help="sent with every call; may be given again. KEY=@FILE takes the value from a file, "
            "which keeps it out of the list of processes, and so do lines of KEY=VALUE in the "
            "environment variable KERAS_MRL_METADATA",
        ),
        Option(
            "--no-proxy",
            is_flag=True,
            help="ask no proxy that http_proxy, https_proxy or grpc_proxy names",
        ),
    ]


def file_options() -> list[Option]:
    """Return the flags that say how the rows of files become calls."""
    return [
        count_option(
            "--max-batch-size",
            "ROWS",
            "rows of one call (1000, 64 of texts, fewer where rows are large)",
            most=2**31 - 1,
            remedy="Leave it out for 1000.",
        ),
        Option(
            "--scale",
            type=float,
            default=1.0,
            callback=checked_by(
                lambda factor: math.isfinite(factor) and factor != 0,
                "be a finite number other than 0",
                "Give 0.00392156862745098 for pixels in 0..1.",
            ),
            metavar="FACTOR",
            help="multiplies the pixels of decoded images, 0..255 as in Keras's own loaders (1)",
        ),
        skip_unreadable_option(),
    ]


def skip_unreadable_option() -> Option:
    """Return the flag that goes on without the files that cannot be read."""
    text = "leave out the files that cannot be read, and go on; they are named (all are refused)"
    return Option("--skip-unreadable", is_flag=True, help=text)


def json_option(text: str = "print one JSON object") -> Option:
    """Return the flag that asks for JSON."""
    return Option("--json", is_flag=True, help=text)
