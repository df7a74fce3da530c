"""What a client tells of its calls and answers, and OpenTelemetry's metrics made of it.

OpenTelemetry is imported when `OpenTelemetryMetrics` is made, and its API alone: the application
chooses the SDK and where its numbers go.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Protocol

from .calls import Envelope
from .cascade.policy import CascadePolicy
from .contract import LAST_EXIT, Manifest
from .errors import KerasMrlError
from .results import Classification

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider

_SCOPE = "keras_mrl"
# Seconds: a call takes a millisecond or less on one machine, and the default timeout is ten.
_BOUNDARIES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class Observer(Protocol):
    """Is told what a client does: `Options(observer=)`.

    Its methods are called in the thread of the call, by many threads at once, and must not raise:
    an error of theirs would be raised in place of the answer.

    Examples:
        >>> class Count:
        ...     calls = 0
        ...     def called(self, envelope, seconds, error):
        ...         self.calls += 1
        ...     def classified(self, model, manifest, answer):
        ...         pass
        >>> observer: Observer = Count()
        >>> observer.calls
        0
    """

    def called(self, envelope: Envelope, seconds: float, error: KerasMrlError | None) -> None:
        """Note a call that has ended, all of its attempts together.

        Args:
            envelope: The call, with the names of its model and signature.
            seconds: How long it took.
            error: What it ended in; None for a reply.
        """

    def classified(self, model: str, manifest: Manifest, answer: Classification) -> None:
        """Note an answer of the model's own cascade.

        Args:
            model: Name of the model.
            manifest: Its manifest.
            answer: All rows of the answer.
        """


class OpenTelemetryMetrics:
    """OpenTelemetry metrics of a client: calls, exits, drift and audits. See docs/watch.md.

    | metric | what it counts | attributes |
    |---|---|---|
    | `keras_mrl.call.duration` | seconds of each call, a histogram | model, signature, error |
    | `keras_mrl.rows` | rows that a cascade answered | model, exit, dim |
    | `keras_mrl.holdout.share` | share of the holdout that stopped there | model, exit, dim |
    | `keras_mrl.audited_rows` | rows that were run to the end as well | model, agrees |

    One object may serve many clients.

    Args:
        provider: Where the numbers go; None takes the one that the application has set.

    Raises:
        ImportError: If `opentelemetry-api` is not installed.

    Examples:
        ```
        options = Options(observer=OpenTelemetryMetrics())
        client = Client("localhost:8500", model="digits", options=options)
        ```
    """

    def __init__(self, provider: MeterProvider | None = None) -> None:
        try:
            from opentelemetry.metrics import get_meter
        except ImportError as error:
            raise ImportError(
                "OpenTelemetryMetrics needs opentelemetry-api. Received: it is not installed. "
                "Install it: pip install 'keras-mrl[opentelemetry]'."
            ) from error
        meter = get_meter(_SCOPE, meter_provider=provider)
        self._durations = meter.create_histogram(
            "keras_mrl.call.duration",
            unit="s",
            description="Duration of a call, all of its attempts together.",
            explicit_bucket_boundaries_advisory=_BOUNDARIES,
        )
        self._rows = meter.create_counter(
            "keras_mrl.rows", description="Rows by the exit and the dim that decided them."
        )
        self._shares = meter.create_gauge(
            "keras_mrl.holdout.share",
            description="Share of the holdout that stopped at the exit and the dim.",
        )
        self._audited = meter.create_counter(
            "keras_mrl.audited_rows",
            description="Audited rows, by whether the last stage agrees with the answer.",
        )

    def called(self, envelope: Envelope, seconds: float, error: KerasMrlError | None) -> None:
        """Record the duration of a call, with the class of its error."""
        attributes = {"model": envelope.model, "signature": envelope.signature}
        if error is not None:
            attributes["error"] = type(error).__name__
        self._durations.record(seconds, attributes)

    def classified(self, model: str, manifest: Manifest, answer: Classification) -> None:
        """Count where rows stopped, beside the holdout's shares, and what audits say."""
        exits = [LAST_EXIT] * len(answer) if answer.exit is None else answer.exit.tolist()
        rows = Counter(zip(exits, answer.dim.tolist(), strict=True))
        policy = CascadePolicy.from_json(manifest.adaptive_cascade or {})
        for index, (name, dim) in enumerate(policy.keys):
            attributes = {"model": model, "exit": name or LAST_EXIT, "dim": dim}
            self._rows.add(rows[name or LAST_EXIT, dim], attributes)  # 0, too: a share is of all
            if policy.holdout is not None:
                self._shares.set(policy.holdout.exit_fractions[index], attributes)
        if answer.full_class_ids is not None:
            audited = answer.audited
            agree = int((answer.class_ids[audited, 0] == answer.full_class_ids[audited]).sum())
            self._audited.add(agree, {"model": model, "agrees": "yes"})
            self._audited.add(len(audited) - agree, {"model": model, "agrees": "no"})
