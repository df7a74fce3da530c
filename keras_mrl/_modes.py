"""Which way an entry of the log improves, for callbacks of Keras whose `mode` is "auto".

Keras finds the direction of an entry by the name of a metric. An entry of one dim has the name of
no metric that Keras knows of, and Keras would say so after the first epoch only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import keras


class _Writer(keras.callbacks.Callback):
    """The base of callbacks that write entries into the log.

    `fit` of our models sets `metric_modes`: the modes of the metrics that write an entry per dim.
    """

    metric_modes: Mapping[str, str | None] = MappingProxyType({})

    def mode_of(self, entry: str) -> str | None:
        """Return "max" or "min" for an entry that this callback writes, None for any other.

        Args:
            entry: Name of the entry, without "val_".
        """
        raise NotImplementedError


def mode_of_metric(metric: keras.metrics.Metric) -> str | None:
    """Return "max" or "min" as Keras directs the metric; None if it says nothing."""
    return {"up": "max", "down": "min"}.get(getattr(metric, "_direction", ""))


def set_modes(callbacks: Any, modes: Mapping[str, str | None]) -> None:
    """Set `mode` on each callback that watches an entry of one dim and leaves it to Keras.

    Args:
        callbacks: The argument of `fit`.
        modes: Modes of the metrics that write an entry per dim, by the entry's name without "val_"
            and the dim.

    Raises:
        ValueError: If the metric of such an entry does not say which way it improves.
    """
    listed = getattr(callbacks, "callbacks", callbacks)
    flat = keras.tree.flatten(listed) if listed is not None else []
    for writer in flat:
        if isinstance(writer, _Writer):
            writer.metric_modes = modes
    for callback in flat:
        monitor = getattr(callback, "monitor", None)
        if getattr(callback, "mode", None) != "auto" or not isinstance(monitor, str):
            continue
        entry = monitor.removeprefix("val_")
        by_dim = re.fullmatch(r"(.+)_\d+", entry)
        stem = by_dim[1] if by_dim else ""
        if stem not in modes:
            stem = stem.removeprefix("weighted_")  # as Keras names the second of one name
        written = [other.mode_of(entry) for other in flat if isinstance(other, _Writer)]
        mode = next(filter(None, (modes.get(stem), *written)), None)
        if mode is not None:
            callback.mode = mode
        elif stem in modes:
            name = type(callback).__name__
            raise ValueError(
                "A callback must know whether more of what it watches is better. "
                f"Received: {name}(monitor={monitor!r}), whose metric does not say. "
                f"Write {name}(monitor={monitor!r}, mode='max'), or mode='min'."
            )
