"""What a comparison answers: differences with their uncertainty, and sentences."""

from typing import Any

import numpy as np
import pytest

from keras_mrl.comparison.measure import TrainedNets
from keras_mrl.comparison.verdict import difference, is_judged, sentences, verdict
from tests.helpers.comparisons import PLAN, Compared


@pytest.mark.parametrize(
    ("ahead", "behind", "rows", "shows"),
    [
        (30, 30, 10_000, "level"),
        (100, 40, 10_000, "ahead"),
        (40, 200, 10_000, "behind"),
        (3, 3, 100, "unclear"),  # no difference is seen, and 100 rows do not show there is none
        (60, 30, 10_000, "level"),  # 0.3 points are seen, and are within half a point
    ],
)
def test_level_is_what_an_equivalence_test_shows(
    ahead: int, behind: int, rows: int, shows: str
) -> None:
    values = np.zeros(rows)
    values[:ahead], values[ahead : ahead + behind] = 1, -1
    result = difference(values)
    assert result["shows"] == shows
    assert result["points"] == pytest.approx(100 * (ahead - behind) / rows)
    error = 100 * values.std() / np.sqrt(rows)
    assert result["high"] - result["low"] == pytest.approx(2 * 1.96 * error, rel=0.1)


def given(shows: str, points: float, spread: float = 0.4) -> dict[str, Any]:
    return {
        "points": points,
        "low": points - spread,
        "high": points + spread,
        "shows": shows,
    }


FF = {"8": given("level", -0.2), "16": given("level", 0.2), "32": given("level", -0.1)}
PCA = {"8": given("ahead", 13.6), "16": given("ahead", 1.3), "32": given("level", 0.1)}


def results(**changes: Any) -> dict[str, Any]:
    judged = {
        "best": 0.95,
        "chance": 0.01,
        "moved": {"8": given("level", 0.1)},
        "differences": {"ff": FF, "pca": PCA},
    }
    return {"verdict": {**judged, **changes}, "plan": {"epochs": 20}}


def test_the_verdict_is_told_by_dim() -> None:
    assert sentences(results()) == [
        "Matryoshka pays off at 8 and 16 dims: there it is surely more than 0.5 points better than "
        "PCA of one net.",
        "By top-1 accuracy Matryoshka is level with separate nets at 8, 16 and 32 dims (-0.2, "
        "+0.2, -0.1; +-0.4).",
        "By nearest neighbours it is 13.6 +-0.4 and 1.3 +-0.4 points above PCA of the widest "
        "separate net at 8 and 16 dims. At 32 dims PCA does as well (+0.1; +-0.4).",
        "What to do: train Matryoshka if you want 16 dims or fewer; for more dims alone, cut one "
        "net by PCA.",
    ]


def test_a_price_and_too_few_rows_are_told() -> None:
    ff = {"8": given("behind", -9.6, 2), "16": given("unclear", -1.0, 2), "32": FF["32"]}
    pca = {dim: given("unclear", 0.3, 2) for dim in ff}
    headline, first, second, last = sentences(results(differences={"ff": ff, "pca": pca}))
    assert headline == "It is not shown that Matryoshka gains more than 0.5 points here."
    assert first == (
        "By top-1 accuracy Matryoshka is level with separate nets at 32 dims (-0.1; +-0.4); 9.6 "
        "+-2.0 points below them at 8 dims; too near them to tell by so few test rows at 16 "
        "dims (-1.0; +-2.0)."
    )
    assert "From 8 dims up the test rows are too few to tell it from PCA" in second
    assert last.startswith("What to do: train one net at its full width and cut it by PCA")
    only = sentences(results(differences={"ff": {"16": ff["16"]}, "pca": pca}, moved={}))[1]
    assert only == (
        "By top-1 accuracy Matryoshka is too near separate nets to tell by so few test rows at 16 "
        "dims (-1.0; +-2.0)."
    )


def test_no_gain_over_the_free_cut_is_no_pay_off() -> None:
    pca = {"8": given("behind", -2.0), "16": given("level", 0.1), "32": given("level", 0.0)}
    told = sentences(results(differences={"ff": FF, "pca": pca}))
    assert told[0] == "Matryoshka does not pay off here."
    assert told[-1] == (
        "What to do: train one net at its full width and cut it by PCA, which costs nothing."
    )


def test_a_gain_of_less_than_half_a_point_is_told_and_not_advised() -> None:
    pca = {"8": given("ahead", 13.6), "16": given("ahead", 0.6), "32": given("ahead", 0.8)}
    headline, _, second, last = sentences(results(differences={"ff": FF, "pca": pca}))
    assert headline.startswith("Matryoshka pays off at 8 dims: ")
    assert "13.6 +-0.4, 0.6 +-0.4 and 0.8 +-0.4 points above PCA" in second
    assert "train Matryoshka if you want 8 dims or fewer;" in last
    pca["8"] = given("ahead", 0.7)
    told = sentences(results(differences={"ff": FF, "pca": pca}))
    assert told[0] == "It is not shown that Matryoshka gains more than 0.5 points here."
    assert "cut it by PCA" in told[-1]


def test_training_that_goes_on_moving_is_not_judged() -> None:
    moving = results(moved={"8": given("ahead", 5.0), "16": given("level", 0.1)})
    assert not is_judged(moving)
    assert sentences(moving) == [
        "No verdict: training has not converged. From 10 to 20 epochs the difference between "
        "Matryoshka and separate nets changed by +5.0 points of top-1 accuracy at 8 dims. It is "
        "-0.2 now, and more epochs may change it again.",
        "Train longer: --epochs 60, or a larger --budget.",
    ]
    # What moved less than the difference that is left does not change the answer.
    far = {**FF, "8": given("behind", -9.0)}
    assert is_judged(results(moved=moving["verdict"]["moved"], differences={"ff": far, "pca": PCA}))


def test_nets_at_chance_are_not_judged() -> None:
    untrained = results(best=0.12, chance=0.1)
    assert sentences(untrained)[0] == (
        "No verdict: the best separate net is 12.0% right, and always answering the most frequent "
        "class 10.0%."
    )
    # Of two classes nobody is twice as good as chance.
    assert is_judged(results(best=0.9, chance=0.5))


def test_differences_are_those_of_the_nets(compared: Compared) -> None:
    nets = TrainedNets(compared.out / "nets", PLAN, compared.training, compared.test)
    result = verdict(nets)
    assert set(result["differences"]) == {"ff", "svd", "pca", "adaptor"}
    assert set(result["moved"]) == {"4", "12"}
    top1, nearest = compared.results["top1"], compared.results["neighbors"]
    for dim in ("4", "12"):
        by_rival = {name: result["differences"][name][dim]["points"] for name in ("ff", "pca")}
        assert by_rival["ff"] == pytest.approx(100 * (top1["mrl"][dim][0] - top1["ff"][dim][0]))
        gap = nearest["mrl"][dim]["nn1"] - nearest["pca"][dim]["nn1"]
        assert by_rival["pca"] == pytest.approx(100 * gap)
    assert result == compared.results["verdict"]
