"""What the slow parts of an evaluation show of how far they are."""

from __future__ import annotations

from collections.abc import Callable

import keras


def show_progress(steps: int, unit: str, verbose: int) -> Callable[[], None]:
    """Return what is called after every step, and draws a bar of them where `verbose` is not 0.

    The bar is there before the first step: that may take minutes.

    Examples:
        >>> from keras_mrl.evaluation.progress import show_progress
        >>> show_progress(3, "probe", verbose=0)()
    """
    if not verbose:
        return lambda: None
    bar = keras.utils.Progbar(steps, unit_name=unit)
    bar.update(0)
    return lambda: bar.add(1)
