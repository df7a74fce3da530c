"""What every command shares: flags of several words, old spellings, refusals, signals."""

import signal
from types import SimpleNamespace

import click
import pytest

from keras_mrl_cli import shared
from keras_mrl_cli.shared import (
    Option,
    RefusalError,
    check_one_of,
    command,
    dims,
    ended_by_signals,
    refusing,
    share,
    under,
)


@command(
    "Do something.\n\nAt length.\n\n  keras-mrl do it\n    and more\n",
    click.Argument(["place"], required=False),
    Option("--data", many=True, old=["--images"]),
    Option("--test", many=True),
    Option("--flip", is_flag=True),
    *under("Other flags", Option("--dims", type=dims)),
    Option("--share", type=share),
)
def do(arguments: SimpleNamespace) -> int:
    del arguments
    return 7


def parsed(*words: str) -> SimpleNamespace:
    return SimpleNamespace(**do.make_context("do", list(words)).params)


@pytest.mark.parametrize(
    ("words", "data", "test", "place"),
    [
        ("--data a", ["a"], [], None),
        ("--data a b c", ["a", "b", "c"], [], None),
        ("--data a b --test c d", ["a", "b"], ["c", "d"], None),
        ("--data a --data b c", ["a", "b", "c"], [], None),
        ("--data=a --test=c", ["a"], ["c"], None),
        ("--data=a b", ["a"], [], "b"),
        ("--images a b", ["a", "b"], [], None),
        ("--data a --flip b", ["a"], [], "b"),
        ("b --data a", ["a"], [], "b"),
        ("--data a -- b", ["a"], [], "b"),
        ("--data a -", ["a", "-"], [], None),
    ],
)
def test_a_flag_takes_every_word_up_to_the_next(
    words: str, data: list[str], test: list[str], place: str | None
) -> None:
    arguments = parsed(*words.split())
    assert (list(arguments.data), list(arguments.test)) == (data, test)
    assert arguments.place == place


@pytest.mark.parametrize("words", ["--data", "--data --flip", "--data -- a"])
def test_a_flag_of_several_words_needs_one(words: str) -> None:
    with pytest.raises(click.UsageError) as raised:
        parsed(*words.split())
    assert "--data" in raised.value.format_message()
    assert raised.value.ctx is not None


def test_values() -> None:
    arguments = parsed("--dims", "8,16", "--share", "0.5")
    assert (arguments.dims, arguments.share) == ((8, 16), 0.5)
    for flag, value, text in (
        ("--dims", "8;16", "must be integers with commas. Received: '8;16'. Give for example 8,16"),
        ("--share", "0", "must be a share in (0, 1]. Received: '0'. Give for example 0.95"),
    ):
        with pytest.raises(click.BadParameter) as raised:
            parsed(flag, value)
        assert raised.value.format_message() == f"Invalid value for '{flag}': {text}."


def test_help_keeps_examples_and_shows_headings() -> None:
    text = do.get_help(do.make_context("do", []))
    assert "\n    keras-mrl do it\n      and more\n" in text
    assert "\nOther flags:\n  --dims" in text
    assert "--images" not in text


def test_what_excludes_each_other() -> None:
    check_one_of(SimpleNamespace(dim=None, policy="p"), "dim", "policy")
    with pytest.raises(RefusalError) as raised:
        check_one_of(SimpleNamespace(a=1, b_c=0, d=None), "a", "b_c", "d")
    assert str(raised.value) == (
        "Only one of --a, --b-c, --d can be given. Received: --a with --b-c. Leave out one."
    )
    assert raised.value.status == 2


def test_errors_of_a_room_and_of_the_system_are_refusals() -> None:
    def refusal(error: Exception, place: str = "") -> str:
        with pytest.raises(RefusalError) as raised:
            with refusing(KeyError, rule="A rule.", remedy="A remedy.", place=place):
                raise error
        return str(raised.value)

    assert refusal(KeyError("in\n two lines")) == "'in\\n two lines'"
    assert refusal(OSError("A sentence.\nOf two lines.")) == "A sentence. Of two lines."
    full = OSError(28, "No space left")
    assert refusal(full) == "A rule. Received: No space left. A remedy."
    assert refusal(full, "out") == "A rule. Received: out (No space left). A remedy."
    gone = FileNotFoundError(2, "No such file", "a.npy")
    assert refusal(gone, "out") == "A rule. Received: a.npy (No such file). A remedy."
    for error in (ZeroDivisionError(), BrokenPipeError(32, "gone")):
        with pytest.raises(type(error)), refusing(KeyError, rule="A rule."):
            raise error


def test_signals_end_by_an_exception_unless_ignored() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with ended_by_signals():
            signal.raise_signal(signal.SIGHUP)  # as under nohup
            with pytest.raises(SystemExit) as ended:
                signal.raise_signal(signal.SIGTERM)
        assert ended.value.code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_examples_of_the_docstrings() -> None:
    import doctest

    from keras_mrl_cli import client, export, output

    for module in (shared, output, client, export):
        failed, tried = doctest.testmod(module)
        assert tried
        assert not failed
