"""The measures of a comparison: scores of every method at every dim, from the trained nets.

Heads are judged by all test images. Cascades learn their thresholds, and funnels are chosen, on a
fifth of the test images; the others judge them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
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
from keras_mrl_serving.cascade.bounds import least_rows

from ..adapt import MatryoshkaAdaptor
from ..baselines import low_rank_head, principal_components, random_probe
from ..evaluation import (
    LinearProbe,
    linear_probe,
    mean_average_precision_at_k,
    score_embeddings,
    score_head,
)
from .data import Part, split_classes
from .plan import Plan
from .splits import Rows, holdouts, unseen_classes
from .training import predict

Array = npt.NDArray[Any]
ByDim = dict[str, dict[str, Any]]  # dim to measure to value; dims are text, as in JSON
Sides = tuple[Array, Array]  # embeddings of the gallery and of the queries

# Training rows at most that a linear probe sees, and one of the baseline: minutes for 256 dims.
PROBED, _BASELINE_PROBED = 10_000, 20_000

WITHIN = 0.005  # half a point: what a cascade may lose in accuracy, and a funnel in map10
RISK, DELTA = 0.02, 0.1  # of the certified cascade


@dataclass(frozen=True, eq=False)
class TrainedNets:
    """The nets of a plan, all trained, and the images they were trained and judged on.

    Args:
        folder: Of the nets, one folder each.
        plan: Of the comparison.
        training: Part that trained them: the gallery of every search.
        test: Part that judge them: the queries.
    """

    folder: Path
    plan: Plan
    training: Part
    test: Part

    @property
    def width(self) -> int:
        """The full dim."""
        return self.plan.dims[-1]

    @property
    def full(self) -> str:
        """The name of the separate net of full width, without its seed."""
        return f"ff_{self.width}"

    def logits(self, name: str) -> Array:
        """Return the logits of the test images, `(rows, num_dims, num_classes)`."""
        logits: Array = np.load(self.folder / name / "test_logits.npy")
        return logits

    def features(self, name: str, dim: int) -> Sides:
        """Return the features of the training and the test images that the net may see."""
        folder = self.folder / name
        return np.load(folder / f"train_{dim}.npy"), np.load(folder / f"test_{dim}.npy")

    def model(self, name: str) -> Any:
        """Return a net itself."""
        return keras.saving.load_model(self.folder / name / "model.keras")

    def minutes(self, name: str) -> float:
        """Return how long its epochs took."""
        history = json.loads((self.folder / name / "net.json").read_text())["history"]
        return round(sum(epoch["seconds"] for epoch in history) / 60, 1)


def heads(nets: TrainedNets) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Return `top1`, `top5` and `ece` of the head by method and dim, one number per seed."""
    scores: dict[str, dict[str, dict[str, list[float]]]] = {"top1": {}, "top5": {}, "ece": {}}
    for method, dim, logits in _logits(nets):
        # Logits are features that a head of ones takes as they are.
        values = score_head(logits, nets.test.labels, np.eye(logits.shape[1]), None)
        for measure, by_method in scores.items():
            by_method.setdefault(method, {}).setdefault(str(dim), []).append(values[measure])
    return scores


def _logits(nets: TrainedNets) -> Iterator[tuple[str, int, Array]]:
    """Logits of the test images by method and dim: of nets, and of what is cut from the widest."""
    for net in nets.plan.nets:
        if net.all_classes and not net.half:
            logits = nets.logits(net.name)
            for column, dim in enumerate(net.dims):
                yield net.method, dim, logits[:, column]
    for dim, logits in low_rank(nets):
        yield "svd", dim, logits
    gallery, queries = nets.features(f"{nets.full}-0", nets.width)
    rows = _draw(len(gallery), _BASELINE_PROBED)
    for dim in nets.plan.dims:
        random = random_probe(gallery[rows], nets.training.labels[rows], dim)
        logits = logits_of_all_classes(
            random.probe, random.embed(queries), len(nets.training.names)
        )
        yield "rand_lp", dim, logits


def low_rank(nets: TrainedNets) -> Iterator[tuple[int, Array]]:
    """Yield each dim, and the logits of the test rows by the widest head cut to it by SVD."""
    kernel, bias = _full_head(nets)
    queries = nets.features(f"{nets.full}-0", nets.width)[1]
    for dim in nets.plan.dims:
        yield dim, low_rank_head(kernel, bias, dim).logits(queries)


def _full_head(nets: TrainedNets) -> tuple[Any, Any]:
    """Kernel and bias of the separate net of full width."""
    kernel, bias = nets.model(f"{nets.full}-0").head.weights_at(nets.width)
    return kernel, bias


def logits_of_all_classes(probe: LinearProbe, features: Array, count: int) -> Array:
    """Return logits of `count` classes; those the probe never saw are the least likely."""
    seen = probe.logits(features)
    logits = np.full((len(seen), count), seen.min() - 1e3)
    logits[:, probe.classes] = seen
    return logits


def _draw(rows: int, most: int) -> Array:
    return np.random.default_rng(0).permutation(rows)[:most]


def probe(nets: TrainedNets, most_rows: int = PROBED) -> dict[str, dict[str, list[float]]]:
    """Return the accuracy of a linear probe of the first Matryoshka net's features, dim by dim.

    Args:
        nets: The trained nets.
        most_rows: The probe is trained on at most so many training images, drawn at random.
    """
    gallery, queries = nets.features("mrl-0", nets.width)
    rows = _draw(len(gallery), most_rows)
    labels = nets.training.labels[rows]
    accuracies: dict[str, list[float]] = {}
    for dim in nets.plan.dims:
        trained = linear_probe(gallery[rows, :dim], labels)
        right = trained.predict(queries[:, :dim]) == nets.test.labels
        accuracies[str(dim)] = [float(right.mean())]
    return {"mrl": accuracies}


def neighbors(nets: TrainedNets) -> dict[str, ByDim]:
    """Return what the neighbours of test images among training images are worth, by method."""
    dims, width = nets.plan.dims, nets.width

    def score(sides: Sides, dims: tuple[int, ...] = dims) -> ByDim:
        return _score(sides, nets.training, nets.test, dims)

    full = nets.features(f"{nets.full}-0", width)
    svd = low_rank_head(*_full_head(nets), width)
    return {
        "mrl": score(nets.features("mrl-0", width)),
        "mrl_e": score(nets.features("mrl_e-0", width)),
        "first_coordinates": score(full),
        "pca": score(both(principal_components(full[0], width).embed, full)),
        "svd": score(both(svd.embed, full)),
        "adaptor": score(adapted(nets, full)),
        "ff": _separate(dims, lambda dim: score(nets.features(f"ff_{dim}-0", dim), (dim,))),
    }


def unseen(nets: TrainedNets) -> dict[str, ByDim]:
    """Return the same for images of classes that neither the nets nor the baselines saw."""
    classes = unseen_classes(len(nets.training.names))
    gallery, queries = (split_classes(part, classes)[1] for part in (nets.training, nets.test))

    def score(sides: Sides, dims: tuple[int, ...] = nets.plan.dims) -> ByDim:
        return _score(sides, gallery, queries, dims)

    def embed(name: str) -> Sides:
        body = nets.model(f"{name}_seen-0").backbone
        return predict(body, gallery), predict(body, queries)

    full = embed(nets.full)
    trained, _ = nets.features(f"{nets.full}_seen-0", nets.width)
    return {
        "mrl": score(embed("mrl")),
        "first_coordinates": score(full),
        "pca": score(both(principal_components(trained, nets.width).embed, full)),
        "ff": _separate(
            nets.plan.dims,
            lambda dim: score(full if dim == nets.width else embed(f"ff_{dim}"), (dim,)),
        ),
    }


def _score(sides: Sides, gallery: Part, queries: Part, dims: tuple[int, ...]) -> ByDim:
    scores = score_embeddings(sides[1], queries.labels, sides[0], gallery.labels, dims)
    return {str(dim): measures for dim, measures in scores.items()}


_LEARNT_FROM = 1000  # rows at least; of fewer the adaptor takes principal components


def adapted(nets: TrainedNets, sides: Sides) -> Sides:
    """Return both sides after an adaptor that was learnt on the gallery, without its labels."""
    folder = nets.folder / "adaptor"
    if not folder.exists():
        method = "listwise" if len(sides[0]) >= _LEARNT_FROM else "pca"
        adaptor = MatryoshkaAdaptor(nets.plan.dims, method, verbose=0).fit(sides[0])
        adaptor.save(folder)
    return both(MatryoshkaAdaptor.load(folder).transform, sides)


def both(embed: Callable[[Array], Array], sides: Sides) -> Sides:
    """Return both sides embedded."""
    return embed(sides[0]), embed(sides[1])


def _separate(dims: tuple[int, ...], score: Callable[[int], ByDim]) -> ByDim:
    """The scores of a net per dim; recall is left out: it would compare each net with itself."""
    by_dim: ByDim = {}
    for dim in dims:
        (measures,) = score(dim).values()
        by_dim[str(dim)] = {name: value for name, value in measures.items() if name != "recall10"}
    return by_dim


_K = 10
_SHORTLIST = 200  # the paper's
_LEAST_SHARE = 50  # a shortlist is this part of the gallery at most


def retrieval(nets: TrainedNets) -> dict[str, Any]:
    """Return map10 and multiply-adds of exhaustive search, of two stages, and of whole funnels.

    The cheapest schedule whose map10 is within half a point of exhaustive search is chosen by a
    fifth of the queries; all numbers are those of the rest.
    """
    teaching, judging = holdouts(nets.test)[0]
    full = nets.features(f"{nets.full}-0", nets.width)
    sides_by_name = {
        "mrl": nets.features("mrl-0", nets.width),
        "pca": both(principal_components(full[0], nets.width).embed, full),
    }
    results = {}
    for name, (gallery, queries) in sides_by_name.items():
        rows = []
        for kind, schedule in _schedules(nets.plan.dims, len(gallery)):
            ids = ExactIndex.build(gallery, schedule).search(queries).ids
            hits = nets.training.labels[ids] == nets.test.labels[:, None]
            rows.append(
                {
                    "kind": kind,
                    **schedule.to_json(),
                    "madds": schedule.madds(len(gallery)),
                    "map10": mean_average_precision_at_k(hits[judging]),
                    "holdout_map10": mean_average_precision_at_k(hits[teaching]),
                }
            )
        results[name] = {"rows": rows, "chosen": _choose(rows)}
    return results


def _schedules(dims: tuple[int, ...], rows: int) -> list[tuple[str, FunnelSchedule]]:
    longest = min(_SHORTLIST, max(_K, rows // _LEAST_SHARE))
    schedules = [("exhaustive", FunnelSchedule((dim,), (), _K)) for dim in dims]
    for first, dim in enumerate(dims[:-1]):
        schedules.append(("two stages", FunnelSchedule((dim, dims[-1]), (longest,), _K)))
        if first < len(dims) - 2:
            lengths = tuple(max(_K, longest >> stage) for stage in range(len(dims) - first - 1))
            schedules.append(("funnel", FunnelSchedule(dims[first:], lengths, _K)))
    return schedules


def _choose(rows: list[dict[str, Any]]) -> int:
    """The position of the cheapest that the holdout finds as good as exhaustive search."""
    whole = max((r for r in rows if r["kind"] == "exhaustive"), key=lambda r: r["dims"][-1])
    good = [r for r in rows if r["holdout_map10"] >= whole["holdout_map10"] - WITHIN]
    return rows.index(min(good, key=lambda row: row["madds"]))


def cascades(nets: TrainedNets) -> dict[str, Any]:
    """Return how policies of the first Matryoshka net fare, split by split.

    `splits` has a list per policy; `policies` the first split's policy itself, its dims and the
    share of rows that stop at each; `search_over_greedy` how far the joint search is above the
    paper's thresholds at an equal expected dim.
    """
    holdout = _Holdout(nets.logits("mrl-0"), nets.test.labels, nets.plan.dims)
    full_is_right = nets.logits(f"{nets.full}-0")[:, -1].argmax(-1) == nets.test.labels
    splits: dict[str, list[dict[str, float]]] = {}
    learned: dict[str, dict[str, Any]] = {}
    parts = holdouts(nets.test)
    gains, refusal = [], _certificate_refusal(min(len(teaching) for teaching, _ in parts))
    for seed, (teaching, judging) in enumerate(parts):
        lesson = holdout.take(teaching)
        greedy, front = CascadePolicy.learn(*lesson), search_cascades(*lesson)
        cost = holdout.report(greedy, teaching).expected_dim + _EQUAL
        scaled = search_cascades(*lesson, temperatures=fit_temperatures(*lesson[:2]))
        policies = {
            "greedy": greedy,
            "search at greedy's cost": front.best_under(cost),
            "search within half a point": scaled.cheapest_within(WITHIN),
        }
        if not refusal:
            with warnings.catch_warnings():  # that none passed shows in the expected dim
                warnings.simplefilter("ignore", UserWarning)
                policies["certified"] = certify_cascade(*lesson, risk=RISK, delta=DELTA, seed=seed)
        reports = {name: holdout.report(policy, judging) for name, policy in policies.items()}
        for name, policy in policies.items():
            stops = {"dims": list(policy.dims), "fractions": list(reports[name].exit_fractions)}
            learned.setdefault(name, {"policy": policy.to_json(), **stops})
        reports["oracle"] = oracle_report(*holdout.take(judging))
        for name, report in reports.items():
            splits.setdefault(name, []).append(
                {
                    "accuracy": report.accuracy,
                    "full_accuracy": report.full_accuracy,
                    "ff_accuracy": float(full_is_right[judging].mean()),
                    "expected_dim": report.expected_dim,
                    "cumulative_dim": report.cumulative_dim,
                }
            )
        rows_by_part = {"taught": teaching, "judged": judging}
        gains.append(
            {part: _gain(greedy, front, cost, holdout, rows) for part, rows in rows_by_part.items()}
        )
    return {
        "risk": RISK,
        "delta": DELTA,
        "splits": splits,
        "policies": learned,
        "search_over_greedy": gains,
        "refused": refusal,
    }


_EQUAL = 1e-9  # costs that differ by rounding alone


@dataclass(frozen=True, eq=False)
class _Holdout:
    """The logits `(rows, num_dims, num_classes)` of the test images, and their labels."""

    logits: npt.NDArray[Any]
    labels: Rows
    dims: tuple[int, ...]

    def take(self, rows: Rows) -> tuple[Any, Any, tuple[int, ...]]:
        return self.logits[rows], self.labels[rows], self.dims

    def report(self, policy: CascadePolicy, rows: Rows) -> CascadeReport:
        columns = [self.dims.index(dim) for dim in policy.dims]
        return policy.evaluate(self.logits[rows][:, columns], self.labels[rows])


def _certificate_refusal(rows: int) -> str:
    """Why a holdout of so many rows certifies no cascade; empty where it can."""
    needed = 2 * least_rows(RISK, DELTA)
    if rows >= needed:
        return ""
    return (
        f"a risk of {RISK} with delta {DELTA} takes a holdout of {needed} rows, a fifth of the "
        f"test images, and here it has {rows}"
    )


def _gain(
    greedy: CascadePolicy, front: CascadeFront, cost: float, holdout: _Holdout, rows: Rows
) -> dict[str, float]:
    """How far a front is above greedy on some rows, where both cost as much on those that taught.

    Between two neighbours of the front lies the policy that takes either by chance.
    """
    first = max(i for i, expected_dim in enumerate(front.costs) if expected_dim <= cost)
    pair, costs = front.policies[first : first + 2], front.costs[first : first + 2]
    share = (cost - costs[0]) / (costs[1] - costs[0]) if len(pair) > 1 else 0.0
    cheaper, dearer = (holdout.report(policy, rows) for policy in (pair[0], pair[-1]))
    baseline = holdout.report(greedy, rows)
    return {
        measure: (1 - share) * getattr(cheaper, measure)
        + share * getattr(dearer, measure)
        - getattr(baseline, measure)
        for measure in ("accuracy", "expected_dim")
    }
