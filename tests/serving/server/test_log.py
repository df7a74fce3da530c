"""The log: one line a message, whatever clients send."""

import io
import logging
from collections.abc import Iterator

import pytest

from keras_mrl_serving.server.log import Escaping, logger
from keras_mrl_serving.server.models import Models, Retries
from tests.helpers.disk import Disk, config


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What a handler writes."""
    file = io.StringIO()
    handler = logging.StreamHandler(file)
    logger.addHandler(handler)
    yield file
    logger.removeHandler(handler)


def test_what_does_not_print_is_escaped(log: io.StringIO) -> None:
    logger.warning("%s: grün", "\x1b[2J\r\n12:00:00 m: version 2 loaded\x7f\u202e\ud800")
    assert log.getvalue() == (
        "\\x1b[2J\\r\\n12:00:00 m: version 2 loaded\\x7f\\u202e\\ud800: grün\n"
    )


def test_a_traceback_is_indented(log: io.StringIO) -> None:
    try:
        raise ValueError("a\n12:00:00 m: version 2 loaded\x1b")
    except ValueError:
        logger.exception("it failed")
    first, *rest = log.getvalue().splitlines()
    assert first == "it failed"
    assert {line[:2] for line in rest} == {"  "}
    assert rest[-1] == "  12:00:00 m: version 2 loaded\\x1b"


def test_as_filter_of_a_handler_it_escapes_what_every_logger_says() -> None:
    """As in `keras-mrl serve`: gRPC logs what a handler raises, with what a client sent in it."""
    file = io.StringIO()
    handler, other = logging.StreamHandler(file), logging.getLogger("tests.not_ours")
    handler.addFilter(Escaping())
    other.addHandler(handler)
    try:
        raise ValueError("a\n12:00:00 m: version 2 loaded\x1b")
    except ValueError:
        other.exception("\x1b[2J")
    finally:
        other.removeHandler(handler)
    first, *rest = file.getvalue().splitlines()
    assert first == "\\x1b[2J"
    assert {line[:2] for line in rest} == {"  "}
    assert rest[-1] == "  12:00:00 m: version 2 loaded\\x1b"


def test_the_name_of_a_model_writes_no_line(disk: Disk, log: io.StringIO) -> None:
    """A client gives it, in a reload."""
    models = Models(disk.load, Retries())
    models.watch([config(disk, "a\n12:00:00 b: version 2 loaded")])
    models.poll()
    (line,) = log.getvalue().splitlines()
    assert line.startswith("a\\n12:00:00 b: version 2 loaded: base path ")


@pytest.fixture
def disk(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    return Disk(tmp_path_factory.mktemp("disk"))
