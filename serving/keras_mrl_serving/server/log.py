"""The server's log, in which no client can write a line of its own or control a terminal."""

import logging

from ..printable import printable


class Escaping(logging.Filter):
    """Escapes what does not print in messages, so that each is one line.

    A traceback keeps its lines, which are indented: what an exception quotes of a request cannot
    pass for a message.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Escapes the record, and lets it pass."""
        record.msg, record.args = printable(record.getMessage()), ()
        if record.exc_info and not record.exc_text:
            text = logging.Formatter().formatException(record.exc_info)
            record.exc_text = "\n".join("  " + printable(line) for line in text.split("\n"))
        return True


logger = logging.getLogger("keras_mrl_serving.server")
logger.addFilter(Escaping())
