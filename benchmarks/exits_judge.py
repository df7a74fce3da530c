"""Policies that are chosen on `val`, and judged on other rows: accuracy, work, harm, rivals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import NormalDist
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
from exits_rivals import Curve, Floats, TfIdf, cost_at_equal_accuracy
from exits_texts import DIMS, Ids, Texts, padded

from keras_mrl import measure_costs
from keras_mrl_serving import (
    CascadeFront,
    CascadePolicy,
    Stage,
    break_down,
    certify_cascade,
    fit_temperatures,
    search_cascades,
)

WIDTH = DIMS[-1]
EMBEDDINGS = "embeddings_dropout"
BATCH = 32  # rows that are padded together
PADDED = 32  # tokens, where all rows are padded alike
Stages = dict[tuple[str | None, int], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Configuration:
    """What is chosen without the test part.

    Args:
        exits: What rows may leave at before the whole encoder: the n-grams, and layers of it.
        loss_on_val: How much accuracy the cheapest policy may lose on `val`; below 0, how much it
            must gain.
        bare_exits: The same where nothing stands before the encoder's first layer.
        bare_loss_on_val: The same for these.
        epochs: Of the training.
        alpha: Most harm that is promised.
        delta: How often the promise may fail.
    """

    exits: tuple[str, ...]
    loss_on_val: float
    bare_exits: tuple[str, ...]
    bare_loss_on_val: float
    epochs: int
    alpha: float = 0.01
    delta: float = 0.05

    @property
    def bare(self) -> Configuration:
        """The cascade with nothing before the encoder's first layer."""
        return replace(self, exits=self.bare_exits, loss_on_val=self.bare_loss_on_val)


class Work:
    """What one row costs by its length, in multiply-adds.

    Attention grows with the square of the length and all else in proportion, so three lengths tell.
    """

    def __init__(self, model: keras.Model, lengths: tuple[int, int, int] = (4, 12, 28)) -> None:
        self._lengths = lengths
        self._costs = [
            measure_costs(model, (), padded([np.ones(length, np.int32)]), laps=1)
            for length in lengths
        ]

    def of(self, stages: Any, length: float | npt.NDArray[Any]) -> Floats:
        """Return what a row costs that stops at each stage, `(stages, *length's shape)`."""
        known = np.array([costs.of(stages) for costs in self._costs])
        factors = np.polyfit(self._lengths, known, 2)
        powers = np.stack([np.asarray(length, np.float64) ** n for n in (2, 1, 0)])
        return np.asarray(np.tensordot(factors.T, powers, 1))


@dataclass(frozen=True)
class Part:
    """A part of the data, as a trained net answers it.

    Args:
        stages: Logits by exit and dim, those of all layers.
        labels: Class ids, -1 of texts without an intent.
        lengths: Tokens of each row, padded to the longest of its batch.
    """

    stages: Stages
    labels: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    def rows(self, chosen: npt.NDArray[np.int64]) -> Part:
        """Return some of the rows."""
        stages = {key: logits[chosen] for key, logits in self.stages.items()}
        return Part(stages, self.labels[chosen], self.lengths[chosen])


def padded_lengths(rows: Ids, seed: int = 0) -> npt.NDArray[np.int64]:
    """Return how many tokens each row has, padding included, in batches drawn at random."""
    lengths = np.array([len(row) for row in rows])
    order = np.random.default_rng(seed).permutation(len(rows))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        lengths[batch] = lengths[batch].max()
    return lengths


def stages_of(exits: tuple[str, ...]) -> list[tuple[str | None, int]]:
    """Return the stages that a cascade may ask."""
    return [*((name, WIDTH) for name in exits), (None, WIDTH)]


def search(val: Part, exits: tuple[str, ...], work: Work) -> CascadeFront:
    """Return the policies that `val` shows no better one for."""
    stages = {key: val.stages[key] for key in stages_of(exits)}
    return search_cascades(
        stages,
        val.labels,
        costs=partial(work.of, length=float(val.lengths.mean())),
        temperatures=fit_temperatures(stages, val.labels),
    )


def cheapest(front: CascadeFront, loss: float) -> CascadePolicy:
    """Return the cheapest policy that loses at most so much, or gains as much where it is below 0.

    The most accurate policy, where none gains as much.
    """
    for policy in front.policies:
        report = policy.holdout
        if report and report.accuracy >= report.full_accuracy - loss - 1e-12:
            return policy
    return front.policies[-1]


def policies(
    val: Part, configuration: Configuration, work: Work
) -> tuple[CascadePolicy, CascadePolicy]:
    """Return the cheapest policy that loses little on `val`, and the certified one."""
    certified = certify_cascade(
        {key: val.stages[key] for key in stages_of(configuration.exits)},
        val.labels,
        risk="harm",
        alpha=configuration.alpha,
        delta=configuration.delta,
        costs=partial(work.of, length=float(val.lengths.mean())),
    )
    found = search(val, configuration.exits, work)
    return cheapest(found, configuration.loss_on_val), certified


@dataclass(frozen=True)
class Aim:
    """What a policy loses on rows that did not choose it, by what it may lose on those that did.

    Args:
        loss_on_val: What it may lose where it is chosen.
        loss: What it loses on other rows.
        error: Standard error of `loss`.
        work: What it takes there, as a share of the whole encoder.
    """

    loss_on_val: float
    loss: float
    error: float
    work: float

    def most_lost(self, delta: float) -> float:
        """Return the upper end of the one-sided interval that misses `loss` in `delta` of cases."""
        return self.loss + NormalDist().inv_cdf(1 - delta) * self.error


def aims(
    vals: Sequence[Part], exits: tuple[str, ...], work: Work, losses: Sequence[float]
) -> list[Aim]:
    """Return what policies lose that are chosen on one half of `val` and judged on the other.

    Args:
        vals: `val` as each of the trained nets answers it.
        exits: What rows may leave at.
        work: What rows cost.
        losses: What policies may lose on the half that chooses them.
    """
    rows = len(vals[0].labels)
    halves = np.array_split(np.random.default_rng(0).permutation(rows), 2)
    lost, paid = (np.zeros((len(losses), len(vals), rows)) for _ in range(2))
    for i, val in enumerate(vals):
        for chosen, other in (halves, halves[::-1]):
            found = search(val.rows(chosen), exits, work)
            part = val.rows(other)
            whole = judged(alone(None), part, work).is_right[0]
            for j, loss in enumerate(losses):
                curve = judged(cheapest(found, loss), part, work)
                lost[j, i, other] = whole.astype(float) - curve.is_right[0]
                paid[j, i, other] = curve.costs[0]
    by_row = lost.mean(axis=1)  # nets answer the same rows, so rows are what is drawn
    errors = by_row.std(axis=1) / np.sqrt(rows)
    numbers = zip(losses, by_row.mean(axis=1), errors, paid.mean(axis=(1, 2)), strict=True)
    return [Aim(*map(float, own)) for own in numbers]


def judged(policy: CascadePolicy, part: Part, work: Work, length: int | None = None) -> Curve:
    """Return where a policy is right, and what each row costs as a share of the whole encoder."""
    lengths = part.lengths if length is None else np.full(len(part.lengths), length)
    classes, stage_of = policy.route(part.stages)
    costs = work.of(policy.keys, lengths)[stage_of, np.arange(len(lengths))]
    shares = costs / work.of([(None, WIDTH)], lengths)[0]
    return Curve((classes == part.labels)[None], shares[None])


def point(curve: Curve) -> dict[str, float]:
    """Return accuracy and relative work of one policy."""
    return {
        "accuracy": float(curve.is_right.mean()),
        "relative_flops": float(curve.costs.mean()),
    }


def dims_only(val: Part, configuration: Configuration, work: Work) -> CascadePolicy:
    """Return the cheapest policy over the dims of the last exit that loses little on `val`."""
    stages = {(None, dim): val.stages[None, dim] for dim in DIMS}
    costs = partial(work.of, length=float(val.lengths.mean()))
    searched = search_cascades(stages, val.labels, costs=costs, confidence="margin")
    return cheapest(searched, configuration.loss_on_val)


@dataclass(frozen=True)
class Judge:
    """One net on `test`, policies chosen on `val`.

    Args:
        texts: The data.
        lengths: Tokens of each row of `test`.
        configuration: What was chosen before.
        work: What rows cost.
        tfidf: The rival.
    """

    texts: Texts
    lengths: Sequence[int]
    configuration: Configuration
    work: Work
    tfidf: TfIdf

    def rival(self, val: Part, test: Part) -> tuple[Curve, float]:
        """Return TF-IDF before the whole encoder, and what TF-IDF has alone."""
        texts = self.texts.texts
        scale = fit_temperatures(self.tfidf.logits(texts["val"])[:, None], val.labels)[0]
        first = self.tfidf.logits(texts["test"]) / scale
        whole = self.work.of([(None, WIDTH)], test.lengths)[0]
        first_costs = self.tfidf.multiply_adds(texts["test"]) / whole
        curve = Curve.two_stages(
            first, test.stages[None, WIDTH], test.labels, first_costs, np.ones(len(whole))
        )
        return curve, float(np.mean(first.argmax(axis=-1) == test.labels))

    def oracle(self, policy: CascadePolicy, test: Part) -> Curve:
        """Return the stages of a policy asked by one who knows the label."""
        right = np.stack([test.stages[key].argmax(axis=-1) == test.labels for key in policy.keys])
        rows = np.arange(len(test.lengths))
        stage_of = np.argmax(right, axis=0)
        shares = self.work.of(policy.keys, test.lengths)[stage_of, rows]
        whole = self.work.of([(None, WIDTH)], test.lengths)[0]
        return Curve(right[stage_of, rows][None], (shares / whole)[None])

    def facts(self, val: Part, test: Part, oos: Part) -> dict[str, Any]:
        """Return what a net does."""
        configuration = self.configuration
        own, certified = policies(val, configuration, self.work)
        bare, bare_certified = policies(val, configuration.bare, self.work)
        curve = partial(judged, part=test, work=self.work)
        exits = {
            name: curve(alone(name))
            for name in [name for name, dim in test.stages if name and dim == WIDTH]
        }
        fixed = Curve.of_all([curve for name, curve in exits.items() if name != EMBEDDINGS])
        two_models, tfidf_accuracy = self.rival(val, test)
        rivals = {
            "fixed_exit": fixed,
            "embedding_exit": exits[EMBEDDINGS],
            "two_model_cascade": two_models,
            "cheapest": Curve.of_all([fixed, exits[EMBEDDINGS], two_models]),
        }
        parts = break_down(certified, test.stages, test.labels, self.lengths)
        return {
            "full": point(curve(alone(None))),
            "adaptive": point(curve(own)),
            "adaptive_at_32_tokens": point(curve(own, length=PADDED)),
            "exit_fractions": own.evaluate(test.stages, test.labels).exit_fractions,
            "certified": point(curve(certified)),
            "harm": asdict(parts.whole.harm),
            "worst_class": self.texts.classes[int(parts.worst_class.name.split()[-1])],
            "worst_class_harm": asdict(parts.worst_class.harm),
            "harm_by_length": [(group.name, group.harm.share) for group in parts.lengths],
            "without_front": point(curve(bare)),
            "without_front_certified": point(curve(bare_certified)),
            "fixed_exits": {name: point(one) for name, one in exits.items()},
            "tfidf_accuracy": tfidf_accuracy,
            "two_model_cascade": two_models.points(),
            "over_rivals": cost_at_equal_accuracy(curve(own), rivals),
            "dims_only": point(curve(dims_only(val, configuration, self.work))),
            "oracle": point(self.oracle(own, test)),
            "front": [
                (one["relative_flops"], one["accuracy"])
                for one in (
                    point(curve(policy))
                    for policy in search(val, configuration.exits, self.work).policies
                )
            ],
            "oos_relative_flops": float(judged(own, oos, self.work).costs.mean()),
            "policies": {
                "adaptive": own.to_json(),
                "certified": certified.to_json(),
                "without_front": bare.to_json(),
            },
        }


def kept_promises(
    parts: Sequence[Part], configuration: Configuration, work: Work, splits: int
) -> dict[str, Any]:
    """Return how often certified cascades keep their promises on rows that certified nothing.

    `val` and `test` are put together and split anew, by the numbers of rows that they have.

    Args:
        parts: `val` and `test`, as one net answers them.
        configuration: Exits and promise.
        work: What rows cost.
        splits: How many.

    Returns:
        By kind of promise, the measured risk and the work of each split, and in how many the risk
        is within the promise.
    """
    labels, lengths = (
        np.concatenate([getattr(own, name) for own in parts]) for name in ("labels", "lengths")
    )
    keys = stages_of(configuration.exits)
    stages = {key: np.concatenate([own.stages[key] for own in parts]) for key in keys}
    both, size = Part(stages, labels, lengths), len(parts[0].labels)
    facts: dict[str, Any] = {}
    for risk in ("harm", "accuracy_drop"):
        risks, spent = [], []
        for split in range(splits):
            order = np.random.default_rng(split).permutation(len(labels))
            held, other = both.rows(order[:size]), both.rows(order[size:])
            policy = certify_cascade(
                held.stages,
                held.labels,
                risk=risk,
                alpha=configuration.alpha,
                delta=configuration.delta,
                costs=partial(work.of, length=float(held.lengths.mean())),
                seed=split,
            )
            own = judged(policy, other, work)
            whole = judged(alone(None), other, work).is_right[0]
            is_right = own.is_right[0]
            lost = whole & ~is_right if risk == "harm" else whole.astype(int) - is_right
            risks.append(float(lost.mean()))
            spent.append(float(own.costs.mean()))
        facts[risk] = {
            "within": int(np.sum(np.array(risks) <= configuration.alpha)),
            "splits": splits,
            "mean_risk": round(float(np.mean(risks)), 5),
            "largest_risk": round(max(risks), 5),
            "relative_flops": round(float(np.mean(spent)), 4),
        }
    return facts


def alone(exit_: str | None) -> CascadePolicy:
    """Return the policy that asks one exit."""
    return CascadePolicy((Stage(WIDTH, None, exit=exit_),), "margin")


def summary(by_seed: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the numbers of the issue: means over seeds."""

    def mean(*path: str) -> float:
        values = by_seed
        for name in path:
            values = [own[name] for own in values]
        return round(float(np.mean(values)), 4)  # type: ignore[arg-type]

    shares = [own["over_rivals"]["cheapest"] for own in by_seed]
    return {
        "full_accuracy": mean("full", "accuracy"),
        "adaptive_accuracy": mean("adaptive", "accuracy"),
        "relative_flops": mean("adaptive", "relative_flops"),
        "relative_flops_at_32_tokens": mean("adaptive_at_32_tokens", "relative_flops"),
        "certified_accuracy": mean("certified", "accuracy"),
        "certified_relative_flops": mean("certified", "relative_flops"),
        "harm": mean("harm", "share"),
        "without_front_accuracy": mean("without_front", "accuracy"),
        "without_front_relative_flops": mean("without_front", "relative_flops"),
        "without_front_certified_relative_flops": mean("without_front_certified", "relative_flops"),
        "fixed_exits": {
            name: [
                mean("fixed_exits", name, "accuracy"),
                mean("fixed_exits", name, "relative_flops"),
            ]
            for name in by_seed[0]["fixed_exits"]
            if name != EMBEDDINGS
        },
        "embedding_exit": [
            mean("fixed_exits", EMBEDDINGS, "accuracy"),
            mean("fixed_exits", EMBEDDINGS, "relative_flops"),
        ],
        "two_model_cascade": {
            "tfidf_accuracy": mean("tfidf_accuracy"),
            "cost_over": [own["over_rivals"]["two_model_cascade"]["share"] for own in by_seed],
        },
        "cost_over_cheapest_rival": [share["share"] for share in shares],
        "cost_over_cheapest_rival_high": [share["high"] for share in shares],
        "dims_only_relative_flops": mean("dims_only", "relative_flops"),
        "oracle_relative_flops": mean("oracle", "relative_flops"),
        "oracle_accuracy": mean("oracle", "accuracy"),
        "oos_relative_flops": mean("oos_relative_flops"),
    }
