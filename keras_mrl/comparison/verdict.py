"""The answer of a comparison: how far Matryoshka is ahead by dim, how sure that is, what to do.

Both sides of a difference are judged on the same test rows, so the rows are resampled in pairs.
"Level" is a claim of its own: that the difference lies within half a point either way. It takes an
equivalence test, two one-sided tests of 5% each, and not merely a difference that is not seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..baselines import principal_components
from ..evaluation.neighbors import nearest_by_dim
from .measure import Array, Sides, TrainedNets, adapted, both, low_rank

MARGIN = 0.5  # points
_SAMPLES = 20_000

RIVALS = {
    "ff": ("top-1 accuracy", "a net of its own per dim"),
    "svd": ("top-1 accuracy", "SVD of the widest separate net"),
    "pca": ("1-NN accuracy", "PCA of the widest separate net"),
    "adaptor": ("1-NN accuracy", "the adaptor on the widest separate net"),
}


def difference(rows: npt.ArrayLike) -> dict[str, Any]:
    """Return the mean of paired differences in points, its interval, and what it shows.

    Args:
        rows: How far one side is ahead in each test row, -1 to 1.

    Returns:
        `points`; `low` and `high`, between which it lies with 95%; and `shows`: `level`, `ahead`,
        `behind`, or `unclear` where the rows are too few to tell.

    Examples:
        >>> from keras_mrl.comparison.verdict import difference
        >>> difference([1, 0, 0, 1] * 100)["shows"], difference([0] * 400)["shows"]
        ('ahead', 'level')
        >>> difference([1, -1, 0, 0] * 10)["shows"]
        'unclear'
    """
    values, counts = np.unique(np.asarray(rows, np.float64), return_counts=True)
    total = counts.sum()
    # Drawing rows with replacement draws so many of each value.
    drawn = np.random.default_rng(0).multinomial(total, counts / total, _SAMPLES)
    means = 100 * (drawn @ values) / total
    low, least, most, high = np.percentile(means, [2.5, 5, 95, 97.5])
    points = 100 * float(values @ counts / total)
    if -MARGIN < least and most < MARGIN:
        shows = "level"
    elif low > 0 or high < 0:
        shows = "ahead" if low > 0 else "behind"
    else:
        shows = "unclear"
    return {"points": points, "low": float(low), "high": float(high), "shows": shows}


def verdict(nets: TrainedNets) -> dict[str, Any]:
    """Return the differences by rival and dim, what more epochs still change, and the chance.

    `differences` is by rival and dim what `difference` returns for Matryoshka beside that rival;
    `moved` the same for how far the second half of the epochs moved Matryoshka beside separate
    nets; `best` the accuracy of the best head of a separate net, `chance` that of the most frequent
    class.
    """
    labels = nets.test.labels
    right = _heads(nets)
    ahead = {dim: right["mrl"][dim] - right["ff"][dim] for dim in nets.plan.dims}
    differences = {"ff": ahead}
    differences["svd"] = {dim: right["mrl"][dim] - right["svd"][dim] for dim in nets.plan.dims}
    full = nets.features(f"{nets.full}-0", nets.width)
    mrl = _nearest(nets, nets.features("mrl-0", nets.width))
    pca = principal_components(full[0], nets.width)
    for name, sides in (("pca", both(pca.embed, full)), ("adaptor", adapted(nets, full))):
        theirs = _nearest(nets, sides)
        differences[name] = {dim: mrl[dim] - theirs[dim] for dim in nets.plan.dims}
    moved = {}
    if any(net.half for net in nets.plan.nets):
        nested = _right(nets, "mrl_half-0")
        for dim in nets.plan.seeded:
            before = nested[:, nets.plan.dims.index(dim)] - _right(nets, f"ff_{dim}_half-0")[:, -1]
            moved[dim] = ahead[dim] - before
    return {
        "margin": MARGIN,
        "differences": {name: _by_dim(rows) for name, rows in differences.items()},
        "moved": _by_dim(moved),
        "best": max(float(rows.mean()) for rows in right["ff"].values()),
        "chance": float(np.bincount(labels).max() / len(labels)),
    }


def _by_dim(rows: Mapping[int, Array]) -> dict[str, Any]:
    return {str(dim): difference(values) for dim, values in rows.items()}


def _right(nets: TrainedNets, name: str) -> Array:
    """Whether each row is right, as numbers `(rows, num_dims)`."""
    right: Array = nets.logits(name).argmax(-1) == nets.test.labels[:, None]
    return right.astype(np.float64)


def _heads(nets: TrainedNets) -> dict[str, dict[int, Array]]:
    """Whether heads of Matryoshka, of separate nets and of SVD are right: means over the seeds."""
    seeds: dict[tuple[str, int], list[Array]] = {}
    for net in nets.plan.nets:
        if net.method in ("mrl", "ff") and net.all_classes and not net.half:
            for column, dim in enumerate(net.dims):
                seeds.setdefault((net.method, dim), []).append(_right(nets, net.name)[:, column])
    by_method: dict[str, dict[int, Array]] = {"mrl": {}, "ff": {}, "svd": {}}
    for (method, dim), rows in seeds.items():
        by_method[method][dim] = np.mean(rows, axis=0)
    for dim, logits in low_rank(nets):
        by_method["svd"][dim] = (logits.argmax(-1) == nets.test.labels).astype(np.float64)
    return by_method


def _nearest(nets: TrainedNets, sides: Sides) -> dict[int, Array]:
    """Whether the nearest training row is of the class of each test row, by dim."""
    ids = nearest_by_dim(sides[0], sides[1], nets.plan.dims, k=1)
    labels, expected = nets.training.labels, nets.test.labels
    return {dim: (labels[near[:, 0]] == expected).astype(np.float64) for dim, near in ids.items()}


def sentences(results: Mapping[str, Any]) -> list[str]:
    """Return the verdict: whether it pays off, by how much, and last what to do."""
    given = results["verdict"]
    refusal = _untrained(given, results["plan"])
    if refusal:
        return refusal
    differences = given["differences"]
    return [
        _headline(differences["pca"]),
        _against_separate(differences["ff"]),
        _against_cut(differences["pca"]),
        _advice(differences),
    ]


def is_judged(results: Mapping[str, Any]) -> bool:
    """Return whether training went far enough for anything to be said."""
    return not _untrained(results["verdict"], results["plan"])


def _untrained(given: Mapping[str, Any], plan: Mapping[str, Any]) -> list[str]:
    """Why nothing can be said yet, and what to do; nothing where something can."""
    more = f"Train longer: --epochs {3 * plan['epochs']}, or a larger --budget."
    best, chance = 100 * given["best"], 100 * given["chance"]
    if best < 2 * chance and best < (100 + chance) / 2:
        return [
            f"No verdict: the best separate net is {best:.1f}% right, and always answering the "
            f"most frequent class {chance:.1f}%.",
            more,
        ]
    unfinished = {dim: moved for dim, moved in given["moved"].items() if _is_unfinished(dim, given)}
    if unfinished:
        gaps = [given["differences"]["ff"][dim]["points"] for dim in unfinished]
        half = plan["epochs"] // 2
        return [
            f"No verdict: training has not converged. From {half} to {plan['epochs']} epochs the "
            f"difference between Matryoshka and separate nets changed by "
            f"{_points(unfinished.values())} points of top-1 accuracy at {_dims(unfinished)} dims. "
            f"It is {_list(map(signed, gaps))} now, and more epochs may change it again.",
            more,
        ]
    return []


def _is_unfinished(dim: str, given: Mapping[str, Any]) -> bool:
    """Whether the last half of the epochs moved a dim further than what there is to report."""
    moved, now = given["moved"][dim], given["differences"]["ff"][dim]["points"]
    is_seen = moved["low"] > 0 or moved["high"] < 0
    return bool(is_seen and abs(moved["points"]) > max(MARGIN, abs(now)))


def _is_worth_it(difference: Mapping[str, Any]) -> bool:
    """Whether it is surely ahead by more than what is called level."""
    return bool(difference["low"] > MARGIN)


def _headline(by_dim: Mapping[str, Any]) -> str:
    """Whether it is better anywhere than PCA of one net, which costs nothing."""
    gained = {dim: d for dim, d in by_dim.items() if _is_worth_it(d)}
    if gained:
        return (
            f"Matryoshka pays off at {_dims(gained)} dims: there it is surely more than {MARGIN:g} "
            "points better than PCA of one net."
        )
    if any(d["shows"] in ("unclear", "ahead") for d in by_dim.values()):
        return f"It is not shown that Matryoshka gains more than {MARGIN:g} points here."
    return "Matryoshka does not pay off here."


def _against_separate(by_dim: Mapping[str, Any]) -> str:
    parts: list[str] = []
    for shows, text in (
        ("level", "level with {them} at {dims} dims ({points}; {spread})"),
        ("ahead", "{sizes} points above {them} at {dims} dims"),
        ("behind", "{sizes} points below {them} at {dims} dims"),
        (
            "unclear",
            "too near {them} to tell by so few test rows at {dims} dims ({points}; {spread})",
        ),
    ):
        some = {dim: d for dim, d in by_dim.items() if d["shows"] == shows}
        if some:
            parts.append(
                text.format(
                    them="them" if parts else "separate nets",
                    dims=_dims(some),
                    points=_points(some.values()),
                    sizes=_sizes(some.values()),
                    spread=_spread(some.values()),
                )
            )
    return f"By top-1 accuracy Matryoshka is {'; '.join(parts)}."


def _against_cut(by_dim: Mapping[str, Any]) -> str:
    ahead = {dim: d for dim, d in by_dim.items() if d["shows"] == "ahead"}
    others = {dim: d for dim, d in by_dim.items() if d["shows"] != "ahead"}
    first = (
        f"By nearest neighbours it is {_sizes(ahead.values())} points above PCA of the widest "
        f"separate net at {_dims(ahead)} dims"
        if ahead
        else "By nearest neighbours it is above PCA of the widest separate net at no dim"
    )
    if not others:
        return f"{first}."
    if len(others) > 1 and _is_tail(others, by_dim):
        where = f"From {next(iter(others))} dims up"
    else:
        where = f"At {_dims(others)} dims"
    does = "PCA does as well"
    if any(d["shows"] == "unclear" for d in others.values()):
        does = "the test rows are too few to tell it from PCA"
    if any(d["shows"] == "behind" for d in others.values()):
        does = "PCA does as well or better"
    return f"{first}. {where} {does} ({_points(others.values())}; {_spread(others.values())})."


def _advice(differences: Mapping[str, Any]) -> str:
    gained = [dim for dim, d in differences["pca"].items() if _is_worth_it(d)]
    lost = [dim for dim, d in differences["ff"].items() if d["shows"] == "behind"]
    if not gained:
        return "What to do: train one net at its full width and cut it by PCA, which costs nothing."
    price = (
        f", and pay the points above at {_list(lost)} dims; where these count, a separate net"
        if lost
        else ""
    )
    most = gained[-1]
    wide = list(differences["pca"])[-1]
    rest = "" if most == wide else "; for more dims alone, cut one net by PCA"
    return f"What to do: train Matryoshka if you want {most} dims or fewer{price}{rest}."


def _is_tail(some: Mapping[str, Any], by_dim: Mapping[str, Any]) -> bool:
    return list(some) == list(by_dim)[-len(some) :]


def _points(differences: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(signed(d["points"]) for d in differences)


def signed(points: float) -> str:
    """Return points with their sign; what rounds to nothing has a plus.

    Examples:
        >>> from keras_mrl.comparison.verdict import signed
        >>> signed(-0.04), signed(-0.06)
        ('+0.0', '-0.1')
    """
    return f"{round(points, 1) + 0.0:+.1f}"


def _sizes(differences: Iterable[Mapping[str, Any]]) -> str:
    return _list(f"{abs(d['points']):.1f} {_spread([d])}" for d in differences)


def _spread(differences: Iterable[Mapping[str, Any]]) -> str:
    """Half of the widest of their intervals."""
    return f"+-{max((d['high'] - d['low']) / 2 for d in differences):.1f}"


def _dims(some: Mapping[str, Any]) -> str:
    return _list(some)


def _list(words: Iterable[str]) -> str:
    """Words with commas, and `and` before the last."""
    *first, last = list(words)
    return f"{', '.join(first)} and {last}" if first else str(last)
