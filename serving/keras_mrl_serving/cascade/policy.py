"""A cascade's policy: cheap stages first, dearer ones only for the rows that are not confident yet.

`CascadePolicy` says when a row stops, `CascadePolicy.learn` finds its thresholds by the paper's
procedure, and `CascadeReport` counts how it fares on rows whose labels are known. `search` and
`certify` find policies in other ways.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import manifest_errors
from .confidence import check_confidence, check_temperatures, confidence_of
from .stages import (
    LAST_EXIT,
    Labels,
    Logits,
    Scores,
    StageKey,
    check_stages,
    has_exits,
    labelled_rows,
    labelled_stages,
    logits_of,
)
from .stages import Stage as Stage
from .thresholds import learn_thresholds

HARM, ACCURACY_DROP = "harm", "accuracy_drop"  # kinds of a `Guarantee`
MOST_STAGES = 4  # of a cascade with exits that is learned: more overfit the holdout

_LARGEST, _SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class CascadePolicy:
    """When to stop: a threshold on the confidence at each stage but the last.

    Args:
        stages: Exits from shallow to deep, the last one at the end; at each exit, and where there
            is only one, dims increasing. Every stage but the last has a threshold.
        confidence: How sure a row is: `max_probability`, `margin` (the best minus the second) or
            `entropy` (its negative). None means `margin` where there are exits before the last,
            since it tells better how deep a row has to go, else `max_probability`.
        holdout: How it fared on the holdout it was learned on; None for a policy made by hand.
        method: How the thresholds were found.
        guarantee: The promise that `certify_cascade` made; None without one.

    Raises:
        ValueError: If the stages are not a cascade.

    Reference:
        Kusupati et al., Matryoshka Representation Learning, section 4.2.1 and appendix D.

    Examples:
        >>> policy = CascadePolicy((Stage(8, 0.9), Stage(64, None)))
        >>> logits = np.array([[[4.0, 0.0], [0.0, 1.0]], [[0.1, 0.0], [0.0, 1.0]]])
        >>> class_ids, stage = policy.route(logits)
        >>> class_ids.tolist(), stage.tolist()
        ([0, 1], [0, 1])
        >>> policy = CascadePolicy((Stage(8, 0.9, exit="early"), Stage(8, None)))
        >>> policy.confidence, policy.route({("early", 8): logits[:, 0], (None, 8): logits[:, 1]})
        ('margin', (array([0, 1]), array([0, 1])))
    """

    stages: tuple[Stage, ...]
    confidence: str = None  # type: ignore[assignment]  # a str once it is made
    holdout: CascadeReport | None = None
    method: str = "by hand"
    guarantee: Guarantee | None = None

    def __post_init__(self) -> None:
        """Check the stages."""
        keys = check_stages(stage.key for stage in self.stages)
        thresholds = [stage.threshold for stage in self.stages]
        if thresholds[-1] is not None or None in thresholds[:-1]:
            raise ValueError(
                "Every stage but the last needs a threshold, and the last accepts all. "
                f"Received: thresholds={tuple(thresholds)}. End with Stage(dim, None)."
            )
        temperatures = [stage.temperature for stage in self.stages]
        numbers = [*temperatures, *thresholds[:-1]]
        # The graph compares in float32, where 1e300 is infinite and 1e-300 is 0.
        are_finite = all(
            isinstance(n, Real) and not isinstance(n, bool) and abs(n) <= _LARGEST for n in numbers
        )
        if not are_finite or min(temperatures) < _SMALLEST:
            raise ValueError(
                "Thresholds must be finite and temperatures positive, in float32. "
                f"Received: {self.stages}. A threshold of 1 accepts no row, one of 0 every row."
            )
        object.__setattr__(self, "confidence", choose_confidence(self.confidence, keys))
        # Python's own numbers, whatever NumPy's were given: they are hashed and written as JSON.
        limits = [None if threshold is None else float(threshold) for threshold in thresholds]
        stages = [
            Stage(dim, limit, float(temperature), exit_)
            for (exit_, dim), limit, temperature in zip(keys, limits, temperatures, strict=True)
        ]
        object.__setattr__(self, "stages", tuple(stages))

    @property
    def dims(self) -> tuple[int, ...]:
        """The dims of the stages."""
        return tuple(stage.dim for stage in self.stages)

    @property
    def keys(self) -> tuple[StageKey, ...]:
        """The exit and the dim of each stage, None for the last exit."""
        return tuple(stage.key for stage in self.stages)

    @property
    def has_exits(self) -> bool:
        """Whether a stage stands at an exit before the last."""
        return has_exits(self.keys)

    @classmethod
    def learn(
        cls,
        logits: Logits,
        labels: npt.ArrayLike,
        dims: Sequence[int] | None = None,
        temperatures: Sequence[float] | None = None,
        confidence: str | None = None,
    ) -> CascadePolicy:
        """Learn the thresholds on a holdout, by the paper's procedure.

        Each adjacent pair of stages on its own: the threshold between them is the smallest of those
        by which most rows are right.

        Args:
            logits: What `predict` of the nested model returns for the holdout; or that of its
                `all_exits()`, by exit; or logits by stage, as `stage_logits` makes them.
            labels: Class ids of the holdout, from 0. It must share no row with the training data
                nor with the data the cascade is judged on.
            dims: The dims of the head; left out where logits are by stage.
            temperatures: One per stage, as `fit_temperatures` returns; None means ones.
            confidence: How sure a row is, as in `CascadePolicy`.

        Shapes:
            logits: `(rows, num_dims, num_classes)`, or so for each exit, or `(rows, num_classes)`
            for each stage. labels: `(rows,)`.

        Raises:
            ValueError: If shapes do not fit, there are no rows, these are probabilities, a
                temperature is not above 0, or there are exits and more than four stages.
        """
        scores, truth, keys = labelled_stages(logits, labels, dims)
        _check_number(keys)
        scales = check_temperatures(temperatures, len(keys))
        measure = choose_confidence(confidence, keys)
        return learned(scores, truth, keys, scales, measure)

    def route(self, logits: Logits) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the class of each row and the index of the stage that decided it.

        Args:
            logits: `(rows, num_stages, num_classes)`; or by stage, `(rows, num_classes)` each, of
                the policy's stages and maybe others.

        Raises:
            ValueError: If their shape is another, they are not finite, or a stage has none.
        """
        scores = logits_of(logits, self.keys)
        stops = [self.is_sure(index, scores[:, index]) for index in range(len(self.stages))]
        stage_of = np.argmax(stops, axis=0)
        return np.argmax(scores[np.arange(len(scores)), stage_of], axis=-1), stage_of

    def is_sure(self, index: int, logits: npt.NDArray[Any]) -> npt.NDArray[np.bool]:
        """Return which rows of logits `(rows, num_classes)` stop at a stage.

        Args:
            index: Index of the stage.
            logits: The logits of its dim.

        Examples:
            >>> policy = CascadePolicy((Stage(8, 0.9), Stage(64, None)))
            >>> policy.is_sure(0, np.array([[4.0, 0.0], [0.1, 0.0]])).tolist()
            [True, False]
        """
        stage = self.stages[index]
        if stage.threshold is None:
            return np.ones(len(logits), bool)
        confidence = confidence_of(self.confidence, logits, stage.temperature)
        return np.asarray(confidence > np.float32(stage.threshold))

    def evaluate(self, logits: Logits, labels: npt.ArrayLike) -> CascadeReport:
        """Count how the policy fares on `logits` with known `labels`.

        `break_down` says more: the worst class, deciles of length, and intervals.

        Args:
            logits: As `route` takes them.
            labels: `(rows,)`.

        Raises:
            ValueError: As `learn`.
        """
        return _report(self, *labelled_rows(logits, labels, self.keys))

    def to_json(self) -> dict[str, Any]:
        """Return the policy as JSON: the `cascade` object of a manifest.

        Where there are exits, stages stand under `exit_stages`: a reader that knows no exits finds
        no `stages`, and refuses the object instead of dropping the exits.
        """
        report = asdict(self.holdout) if self.holdout else {}
        if report:
            report["exit_fractions"] = list(report["exit_fractions"])  # as JSON is read back
        stages = [asdict(stage) for stage in self.stages]
        if not self.has_exits:
            for stage in stages:
                del stage["exit"]
        promise = {} if self.guarantee is None else asdict(self.guarantee)
        kind = promise.pop("kind", HARM)
        if kind == HARM:
            promise.pop("gains", None)
        return {
            "exit_stages" if self.has_exits else "stages": stages,
            "confidence": self.confidence,
            "method": self.method,
            "guarantee": (promise or None) if kind == HARM else None,
            **({} if kind == HARM else {f"{kind}_guarantee": promise}),
            "holdout_size": report.pop("size", None),
            **report,
        }

    @classmethod
    def from_json(cls, cascade: Mapping[str, Any]) -> CascadePolicy:
        """Read what `to_json` wrote.

        Raises:
            ManifestError: If this version does not understand it.
        """
        rule = "A cascade names its stages and its confidence."
        with manifest_errors(rule, cascade, "exported the model"):
            entries = cascade["exit_stages" if "exit_stages" in cascade else "stages"]
            stages = tuple(
                Stage(
                    stage["dim"],
                    stage["threshold"],
                    stage.get("temperature", 1.0),
                    stage.get("exit"),
                )
                for stage in entries
            )
            report = {name: cascade[name] for name in _REPORT_KEYS if name in cascade}
            holdout = None
            if len(report) == len(_REPORT_KEYS):
                report["exit_fractions"] = tuple(report["exit_fractions"])
                holdout = CascadeReport(**report, size=cascade["holdout_size"])
            guarantee = None
            promise, drop = cascade.get("guarantee"), cascade.get(f"{ACCURACY_DROP}_guarantee")
            if drop is not None:
                keys = (*_GUARANTEE_KEYS, "gains")
                numbers = {name: drop[name] for name in keys}
                guarantee = Guarantee(**numbers, kind=ACCURACY_DROP)
            elif promise is not None:
                guarantee = Guarantee(*(promise[name] for name in _GUARANTEE_KEYS))
            method = cascade.get("method", "unknown")
            return cls(stages, cascade["confidence"], holdout, method, guarantee)


_REPORT_KEYS = ("accuracy", "full_accuracy", "expected_dim", "cumulative_dim", "exit_fractions")
_GUARANTEE_KEYS = ("risk", "delta", "size", "errors")


def learned(
    scores: Scores,
    truth: Labels,
    keys: Sequence[StageKey],
    temperatures: Sequence[float],
    confidence: str,
) -> CascadePolicy:
    """Return the policy that `CascadePolicy.learn` finds, from arguments that are checked already.

    Examples:
        >>> logits = np.float32([[[1, 0], [0, 9]], [[9, 0], [0, 1]]])
        >>> keys = [(None, 8), (None, 64)]
        >>> learned(logits, np.array([1, 0]), keys, (1.0, 1.0), "margin").holdout.accuracy
        1.0
    """
    thresholds = [*learn_thresholds(scores, truth, temperatures, confidence), None]
    stages = [
        Stage(dim, threshold, temperature, exit_)
        for (exit_, dim), threshold, temperature in zip(keys, thresholds, temperatures, strict=True)
    ]
    method = "paper: adjacent pairs, grid of 100, smallest best threshold"
    policy = CascadePolicy(tuple(stages), confidence, method=method)
    return replace(policy, holdout=_report(policy, scores, truth))


def choose_confidence(measure: str | None, keys: Sequence[StageKey]) -> str:
    """Return the measure, or the default of such stages: the margin where there are exits.

    Raises:
        ValueError: If there is no such measure.

    Examples:
        >>> choose_confidence(None, [(None, 8), (None, 64)])
        'max_probability'
    """
    default = "margin" if has_exits(keys) else "max_probability"
    return default if measure is None else check_confidence(measure)


def _check_number(keys: Sequence[StageKey]) -> None:
    if has_exits(keys) and len(keys) > MOST_STAGES:
        raise ValueError(
            f"A cascade over exits has at most {MOST_STAGES} stages: more overfit the holdout. "
            f"Received: {keys}. Leave stages out of the mapping, or let search_cascades choose."
        )


def check_no_exits(
    policy: CascadePolicy, asker: str, remedy: str, error: type[ValueError] = ValueError
) -> None:
    """Raise an error if a policy has exits, where dims alone can be asked.

    Args:
        policy: The policy.
        asker: What asks dims alone, for the error.
        remedy: What the caller should do.
        error: Which error.

    Raises:
        ValueError: Or the error given.

    Examples:
        >>> check_no_exits(CascadePolicy((Stage(8, 0.9), Stage(64, None))), "A decoder", "Stop.")
    """
    if policy.has_exits:
        names = ", ".join(dict.fromkeys(exit_ or LAST_EXIT for exit_, _ in policy.keys))
        raise error(
            f"{asker} asks the dims of the last exit. Received: a policy over the exits {names}. "
            f"{remedy}"
        )


def _report(
    policy: CascadePolicy, scores: npt.NDArray[np.float32], truth: npt.NDArray[np.int64]
) -> CascadeReport:
    """Return the report of a policy on logits and labels that are checked already."""
    _, stage_of = policy.route(scores)
    return report_exits(policy.dims, stage_of, np.argmax(scores, axis=-1) == truth[:, None])


@dataclass(frozen=True)
class CascadeReport:
    """How a policy fared on rows whose labels are known.

    Args:
        accuracy: Share of rows the cascade classifies right.
        full_accuracy: The same at the last dim alone.
        expected_dim: Mean of the dim that decided.
        cumulative_dim: Mean of the sum of the dims up to it: what the heads together cost.
        exit_fractions: Share of the rows that stopped at each stage.
        size: Number of rows.

    Examples:
        >>> from keras_mrl_serving import CascadePolicy, Stage
        >>> policy = CascadePolicy((Stage(8, 0.9), Stage(64, None)))
        >>> sure, unsure = [[4.0, 0.0], [0.0, 1.0]], [[0.1, 0.0], [0.0, 1.0]]
        >>> policy.evaluate([sure, unsure], labels=[0, 1])  # doctest: +NORMALIZE_WHITESPACE
        CascadeReport(accuracy=1.0, full_accuracy=0.5, expected_dim=36.0, cumulative_dim=40.0,
                      exit_fractions=(0.5, 0.5), size=2)
    """

    accuracy: float
    full_accuracy: float
    expected_dim: float
    cumulative_dim: float
    exit_fractions: tuple[float, ...]
    size: int


def report_exits(
    dims: Sequence[int], stage_of: npt.NDArray[np.int64], is_right: npt.NDArray[np.bool]
) -> CascadeReport:
    """Return the report of rows from the stage that decided each.

    Args:
        dims: Dims of the stages.
        stage_of: The stage of each row, `(rows,)`.
        is_right: Whether each row's class is right at each stage, `(rows, stages)`.

    Examples:
        >>> is_right = np.array([[True, True], [False, True]])
        >>> report_exits((8, 64), np.array([0, 1]), is_right).accuracy
        1.0
    """
    rows = len(is_right)
    exits = np.bincount(stage_of, minlength=len(dims)) / rows
    return CascadeReport(
        accuracy=float(np.mean(is_right[np.arange(rows), stage_of])),
        full_accuracy=float(np.mean(is_right[:, -1])),
        expected_dim=float(exits @ np.asarray(dims)),
        cumulative_dim=float(exits @ np.cumsum(dims)),
        exit_fractions=tuple(float(share) for share in exits),
        size=rows,
    )


@dataclass(frozen=True)
class Guarantee:
    """A promise about new rows, made on rows that no threshold was chosen on.

    With probability at least 1 - delta over the draw of those rows, for new rows of the same kind:
    of `harm`, a row has a chance of at most `risk` that the last stage is right and the cascade
    wrong; of `accuracy_drop`, the cascade's accuracy is at most `risk` below the last stage's.

    Args:
        risk: What is promised to be at most so much.
        delta: How often the promise may fail.
        size: Number of rows it was certified on.
        errors: How many of them the last stage had right and the cascade wrong.
        gains: How many the cascade had right and the last stage wrong; 0 of `harm`, where they do
            not count.
        kind: "harm" or "accuracy_drop".

    Examples:
        >>> Guarantee(risk=0.01, delta=0.05, size=2000, errors=9)
        Guarantee(risk=0.01, delta=0.05, size=2000, errors=9, gains=0, kind='harm')
    """

    risk: float
    delta: float
    size: int
    errors: int
    gains: int = 0
    kind: str = HARM
