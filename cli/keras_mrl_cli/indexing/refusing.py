"""From what the serving room raises to the one sentence that ends a command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from keras_mrl_serving import KerasMrlError

from ..asking import RefusalError, one_line


@contextmanager
def refusing(status: int = 1) -> Iterator[None]:
    """End with what an error says; the serving room says it in three clauses.

    Args:
        status: Exit status.

    Raises:
        RefusalError: For every error of an index.
    """
    try:
        yield
    except (KerasMrlError, ImportError, ValueError) as error:
        raise RefusalError(one_line(error), status) from error
    except BrokenPipeError:  # no fault of an index: whoever read the answers has enough
        raise
    except OSError as error:
        if error.errno is None:  # a sentence of ours
            raise RefusalError(one_line(error), status) from error
        where = "" if error.filename is None else f"{error.filename}: "
        raise RefusalError(
            "An index lies in a folder that can be read, and written to build it. "
            f"Received: {where}{error.strerror}. Correct the path, or make room there."
        ) from error
    except MemoryError as error:
        raise RefusalError(
            "A plan holds a scaled copy of the gallery in memory, and an index its first stage. "
            f"Received: {one_line(error).rstrip('.') or 'no memory is left'}. "
            "Give --dims and --shortlists with a small first dim, and nothing is planned."
        ) from error
