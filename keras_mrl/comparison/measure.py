"""Adaptive classification: some test images teach the thresholds, the others judge them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from keras_mrl_serving import (
    CascadeFront,
    CascadePolicy,
    CascadeReport,
    ExactIndex,
    FunnelSchedule,
    certify_cascade,
    fit_temperatures,
    oracle_report,
    search_cascades,
)
from keras_mrl_serving.cascade.policy import least_rows

from ..baselines import low_rank_head, principal_components, random_probe
from ..evaluation import (
    LinearProbe,
    linear_probe,
    mean_average_precision_at_k,
    score_embeddings,
    score_head,
)
from .data import Images, split_classes
from .plan import Plan
from .splits import Rows, holdouts, unseen_classes
from .training import AT_ONCE

# What the trained nets of a comparison answered, read from their folders.

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Answers:
    """The nets of a plan, all trained, and the images they were asked about.

    Args:
        folder: Of the nets, one folder each.
        plan: Of the comparison.
        training: Images that trained them: the gallery of every search.
        test: Images that judge them: the queries.
    """

    folder: Path
    plan: Plan
    training: Images
    test: Images

    @property
    def width(self) -> int:
        """The full dim."""
        return self.plan.dims[-1]

    @property
    def full(self) -> str:
        """The name of the separate net of full width."""
        return f"ff_{self.width}"

    def logits(self, name: str) -> Array:
        """Return those of the test images, `(rows, num_dims, num_classes)`."""
        found: Array = np.load(self.folder / name / "test_logits.npy")
        return found

    def features(self, name: str, dim: int) -> tuple[Array, Array]:
        """Return those of the training and the test images that the net may see."""
        place = self.folder / name
        return np.load(place / f"train_{dim}.npy"), np.load(place / f"test_{dim}.npy")

    def model(self, name: str) -> Any:
        """Return a net itself."""
        return keras.saving.load_model(self.folder / name / "model.keras")

    def minutes(self, name: str) -> float:
        """Return what its epochs took."""
        history = json.loads((self.folder / name / "net.json").read_text())["history"]
        return round(sum(epoch["seconds"] for epoch in history) / 60, 1)


# What heads are worth for every method and dim, and linear probes of the features.

# Training rows at most that a linear probe sees, and one of the baseline: minutes for 256 dims.
PROBED, _BASELINE_PROBED = 10_000, 20_000

ByDim = dict[str, dict[str, list[float]]]


def scores(answers: Answers) -> dict[str, ByDim]:
    """Return `top1`, `top5` and `ece` of the head by method and dim, one number per seed."""
    found: dict[str, ByDim] = {"top1": {}, "top5": {}, "ece": {}}
    for method, dim, logits in _logits(answers):
        # Logits are features that a head of ones takes as they are.
        judged = score_head(logits, answers.test.labels, np.eye(logits.shape[1]), None)
        for measure, by_method in found.items():
            by_method.setdefault(method, {}).setdefault(str(dim), []).append(judged[measure])
    return found


def probes(answers: Answers) -> ByDim:
    """Return the accuracy of a linear probe of the first Matryoshka net's features, dim by dim."""
    shown, asked = answers.features("mrl-0", answers.width)
    rows = _drawn(len(shown), PROBED)
    labels = answers.training.labels[rows]
    found: dict[str, list[float]] = {}
    for dim in answers.plan.dims:
        probe = linear_probe(shown[rows, :dim], labels)
        right = probe.predict(asked[:, :dim]) == answers.test.labels
        found[str(dim)] = [float(right.mean())]
    return {"mrl": found}


def full_head(answers: Answers) -> tuple[Any, Any]:
    """Return kernel and bias of the separate net of full width."""
    kernel, bias = answers.model(f"{answers.full}-0").head.weights_at(answers.width)
    return kernel, bias


def of_all(probe: LinearProbe, features: Array, count: int) -> Array:
    """Return logits of all `count` classes; those the probe never saw are the least likely."""
    known = probe.logits(features)
    found = np.full((len(known), count), known.min() - 1e3)
    found[:, probe.classes] = known
    return found


def _logits(answers: Answers) -> Iterator[tuple[str, int, Array]]:
    """Those of the test images, by method and dim: of nets, and of what is cut from the widest."""
    for net in answers.plan.nets:
        if net.all_classes:
            logits = answers.logits(net.name)
            for at, dim in enumerate(net.dims):
                yield net.method, dim, logits[:, at]
    head = full_head(answers)
    shown, asked = answers.features(f"{answers.full}-0", answers.width)
    rows = _drawn(len(shown), _BASELINE_PROBED)
    for dim in answers.plan.dims:
        yield "svd", dim, low_rank_head(*head, dim).logits(asked)
        chosen = random_probe(shown[rows], answers.training.labels[rows], dim)
        found = of_all(chosen.probe, chosen.embed(asked), len(answers.training.names))
        yield "rand_lp", dim, found


def _drawn(rows: int, most: int) -> Array:
    return np.random.default_rng(0).permutation(rows)[:most]


# Retrieval by few dims first: chosen by a part of the queries, judged by the others.

WITHIN = 0.005  # of the map10 of exhaustive search: half a point

_K = 10
_SHORTLIST = 200  # the paper's
_LEAST_SHARE = 50  # a shortlist is this part of the gallery at most


def retrieval(answers: Answers) -> dict[str, Any]:
    """Return map10 and multiply-adds of exhaustive search, of two stages, and of whole funnels.

    The cheapest schedule whose map10 is within half a point of exhaustive search is chosen by a
    fifth of the queries; all numbers are those of the rest.
    """
    taught, judged = holdouts(answers.test)[0]
    mrl = answers.features("mrl-0", answers.width)
    shown, asked = answers.features(f"{answers.full}-0", answers.width)
    pca = principal_components(shown, answers.width)
    found = {}
    for name, (gallery, queries) in {
        "mrl": mrl,
        "pca": (pca.embed(shown), pca.embed(asked)),
    }.items():
        rows = []
        for kind, schedule in _schedules(answers.plan.dims, len(gallery)):
            ids = ExactIndex.build(gallery, schedule).search(queries).ids
            hits = answers.training.labels[ids] == answers.test.labels[:, None]
            rows.append(
                {
                    "kind": kind,
                    **schedule.to_json(),
                    "madds": schedule.madds(len(gallery)),
                    "map10": mean_average_precision_at_k(hits[judged]),
                    "holdout_map10": mean_average_precision_at_k(hits[taught]),
                }
            )
        found[name] = {"rows": rows, "chosen": _chosen(rows)}
    return found


def _schedules(dims: tuple[int, ...], rows: int) -> list[tuple[str, FunnelSchedule]]:
    longest = min(_SHORTLIST, max(_K, rows // _LEAST_SHARE))
    found = [("exhaustive", FunnelSchedule((dim,), (), _K)) for dim in dims]
    for at, dim in enumerate(dims[:-1]):
        found.append(("two stages", FunnelSchedule((dim, dims[-1]), (longest,), _K)))
        if at < len(dims) - 2:
            lengths = tuple(max(_K, longest >> stage) for stage in range(len(dims) - at - 1))
            found.append(("funnel", FunnelSchedule(dims[at:], lengths, _K)))
    return found


def _chosen(rows: list[dict[str, Any]]) -> int:
    """The position of the cheapest that the holdout finds as good as exhaustive search."""
    whole = max((r for r in rows if r["kind"] == "exhaustive"), key=lambda r: r["dims"][-1])
    good = [r for r in rows if r["holdout_map10"] >= whole["holdout_map10"] - WITHIN]
    return rows.index(min(good, key=lambda row: row["madds"]))


RISK, DELTA = 0.02, 0.1  # of the certified cascade

_EQUAL = 1e-9  # costs that differ by rounding alone


@dataclass(frozen=True, eq=False)
class _Scores:
    """What a Matryoshka net answered to the test images."""

    logits: npt.NDArray[Any]
    labels: Rows
    dims: tuple[int, ...]

    def given(self, rows: Rows) -> tuple[Any, Any, tuple[int, ...]]:
        return self.logits[rows], self.labels[rows], self.dims

    def report(self, policy: CascadePolicy, rows: Rows) -> CascadeReport:
        columns = [self.dims.index(dim) for dim in policy.dims]
        return policy.evaluate(self.logits[rows][:, columns], self.labels[rows])


def cascades(answers: Answers) -> dict[str, Any]:
    """Return how policies of the first Matryoshka net fare, split by split.

    `splits` has a list per policy; `search_over_greedy` how far the joint search is above the
    paper's thresholds at an equal expected dim.
    """
    scores = _Scores(answers.logits("mrl-0"), answers.test.labels, answers.plan.dims)
    full = answers.logits(f"{answers.full}-0")[:, -1].argmax(-1) == scores.labels
    splits: dict[str, list[dict[str, float]]] = {}
    parts = holdouts(answers.test)
    equal, refused = [], _refusal(min(len(taught) for taught, _ in parts))
    for split, (taught, judged) in enumerate(parts):
        given = scores.given(taught)
        greedy, front = CascadePolicy.learn(*given), search_cascades(*given)
        spent = scores.report(greedy, taught).expected_dim + _EQUAL
        scaled = search_cascades(*given, temperatures=fit_temperatures(*given[:2]))
        policies = {
            "greedy": greedy,
            "search at greedy's cost": front.best_under(spent),
            "search within half a point": scaled.cheapest_within(WITHIN),
        }
        if not refused:
            with warnings.catch_warnings():  # that none passed shows in the expected dim
                warnings.simplefilter("ignore", UserWarning)
                policies["certified"] = certify_cascade(*given, risk=RISK, delta=DELTA, seed=split)
        reports = {name: scores.report(policy, judged) for name, policy in policies.items()}
        reports["oracle"] = oracle_report(*scores.given(judged))
        for name, report in reports.items():
            splits.setdefault(name, []).append(
                {
                    "accuracy": report.accuracy,
                    "full_accuracy": report.full_accuracy,
                    "ff_accuracy": float(full[judged].mean()),
                    "expected_dim": report.expected_dim,
                    "cumulative_dim": report.cumulative_dim,
                }
            )
        equal.append(_over(greedy, front, spent, scores, {"taught": taught, "judged": judged}))
    return {
        "risk": RISK,
        "delta": DELTA,
        "splits": splits,
        "search_over_greedy": equal,
        "refused": refused,
    }


def _refusal(rows: int) -> str:
    """Why a holdout of so many rows certifies nothing; empty where it may."""
    needed = 2 * least_rows(RISK, DELTA)
    if rows >= needed:
        return ""
    return (
        f"a risk of {RISK} with delta {DELTA} takes a holdout of {needed} rows, a fifth of the "
        f"test images, and here it has {rows}"
    )


def _over(
    greedy: CascadePolicy,
    front: CascadeFront,
    spent: float,
    scores: _Scores,
    parts: dict[str, Rows],
) -> dict[str, dict[str, float]]:
    """How far a front is above greedy where both cost as much on the rows that taught them.

    Between two neighbours of the front lies the policy that takes either by chance.
    """
    at = max(i for i, cost in enumerate(front.costs) if cost <= spent)
    pair, costs = front.policies[at : at + 2], front.costs[at : at + 2]
    share = (spent - costs[0]) / (costs[1] - costs[0]) if len(pair) > 1 else 0.0
    found = {}
    for name, rows in parts.items():
        less, more = (scores.report(policy, rows) for policy in (pair[0], pair[-1]))
        its = scores.report(greedy, rows)
        found[name] = {
            measure: (1 - share) * getattr(less, measure)
            + share * getattr(more, measure)
            - getattr(its, measure)
            for measure in ("accuracy", "expected_dim")
        }
    return found


# What neighbours are worth for every method and dim, among seen and unseen classes.


def neighbors(answers: Answers) -> dict[str, dict[str, dict[str, float]]]:
    """Return what the neighbours of the test images among the training images are worth."""
    found: dict[str, Any] = {}
    dims, width = answers.plan.dims, answers.width
    for name in ("mrl", "mrl_e"):
        found[name] = _scores(answers, *answers.features(f"{name}-0", width))
    shown, asked = answers.features(f"{answers.full}-0", width)
    found |= _cut(answers, shown, asked)
    found["ff"] = {}
    for dim in dims:
        own = answers.features(f"ff_{dim}-0", dim)
        found["ff"] |= _of_its_own(_scores(answers, *own, dims=(dim,)))
    return found


def unseen(answers: Answers) -> dict[str, dict[str, dict[str, float]]]:
    """Return the same for images of classes that neither the nets nor the baselines saw."""
    classes = unseen_classes(len(answers.training.names))
    shown, asked = (split_classes(part, classes)[1] for part in (answers.training, answers.test))

    def scored(sides: tuple[Array, Array], *dims: int) -> dict[str, dict[str, float]]:
        gallery, queries = sides
        return _as_json(score_embeddings(queries, asked.labels, gallery, shown.labels, dims))

    def embedded(name: str) -> tuple[Array, Array]:
        body = answers.model(f"{name}_seen-0").backbone
        gallery, queries = (
            body.predict(part.pixels, batch_size=AT_ONCE, verbose=0) for part in (shown, asked)
        )
        return gallery, queries

    dims, width, full = answers.plan.dims, answers.width, embedded(answers.full)
    trained, _ = answers.features(f"{answers.full}_seen-0", width)
    pca = principal_components(trained, width)
    found: dict[str, Any] = {
        "mrl": scored(embedded("mrl"), *dims),
        "first_coordinates": scored(full, *dims),
        "pca": scored((pca.embed(full[0]), pca.embed(full[1])), *dims),
        "ff": {},
    }
    for dim in dims:
        own = full if dim == width else embedded(f"ff_{dim}")
        found["ff"] |= _of_its_own(scored(own, dim))
    return found


def _cut(answers: Answers, shown: Any, asked: Any) -> dict[str, Any]:
    """What is cut from the net of full width: its first coordinates, its PCA, its head's SVD."""
    pca = principal_components(shown, answers.width)
    svd = low_rank_head(*full_head(answers), answers.width)
    return {
        "first_coordinates": _scores(answers, shown, asked),
        "pca": _scores(answers, pca.embed(shown), pca.embed(asked)),
        "svd": _scores(answers, svd.embed(shown), svd.embed(asked)),
    }


def _scores(
    answers: Answers, shown: Any, asked: Any, dims: tuple[int, ...] | None = None
) -> dict[str, dict[str, float]]:
    labels = answers.test.labels, answers.training.labels
    return _as_json(score_embeddings(asked, labels[0], shown, labels[1], dims or answers.plan.dims))


def _of_its_own(scores: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Those of a net of one dim, whose recall would be that of itself."""
    return {
        dim: {name: value for name, value in measures.items() if name != "recall10"}
        for dim, measures in scores.items()
    }


def _as_json(scores: dict[int, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {str(dim): measures for dim, measures in scores.items()}
