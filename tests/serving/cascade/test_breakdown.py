"""Parts of the rows, counted by hand; their intervals hold together."""

from typing import Any

import numpy as np
import pytest

from keras_mrl_serving import CascadePolicy, Stage, break_down, stage_logits
from tests.helpers.galleries import Refuses
from tests.helpers.holdouts import noisy_holdout

POLICY = CascadePolicy((Stage(8, 0.6, exit="early"), Stage(8, None)))


def rows(seed: int, number: int = 2000) -> tuple[Any, Any, Any]:
    """Logits by stage of which class 2 is hard for the early exit, labels, and lengths."""
    logits, labels = noisy_holdout(seed, number, noise=(0.5, 0.4))
    rng = np.random.default_rng(seed)
    logits[labels == 2, 0] += 2 * np.eye(5)[rng.integers(0, 5, (labels == 2).sum())]
    by_stage = stage_logits({"early": logits[:, :1], "last": logits[:, 1:]}, (8,))
    return by_stage, labels, rng.integers(3, 40, number)


def test_the_parts_are_those_counted_by_hand() -> None:
    by_stage, labels, lengths = rows(0)
    parts = break_down(POLICY, by_stage, labels, lengths)
    class_ids, stage_of = POLICY.route(by_stage)
    full = by_stage[None, 8].argmax(-1)
    harmed, gained = (full == labels) & (class_ids != labels), (class_ids == labels)
    gained &= full != labels
    assert [group.name for group in parts.classes] == [f"class {label}" for label in range(5)]
    assert parts.worst_class is parts.classes[2]
    masks = [labels == label for label in range(5)]
    assert 6 < len(parts.lengths) <= 10
    for group in parts.lengths:
        _, low, _, high = group.name.split()
        masks.append((lengths >= int(low)) & (lengths <= int(high)))
    assert sum(map(np.sum, masks)) == 2 * len(labels)
    groups = [*parts.classes, *parts.lengths, parts.whole]
    for group, mask in zip(groups, [*masks, labels >= 0], strict=True):
        assert group.size == mask.sum()
        for estimate, expected in (
            (group.accuracy, (class_ids == labels)[mask].mean()),
            (group.full_accuracy, (full == labels)[mask].mean()),
            (group.harm, harmed[mask].mean()),
            (group.accuracy_drop, harmed[mask].mean() - gained[mask].mean()),
        ):
            assert estimate.share == pytest.approx(expected)
            assert estimate.low <= estimate.share <= estimate.high
        assert group.exit_fractions[0] == pytest.approx((stage_of[mask] == 0).mean())
    lines = str(parts).splitlines()
    assert lines[:2] == [str(parts.whole), str(parts.classes[2])]
    assert len(lines) == 2 + len(parts.lengths)


def test_the_intervals_of_all_classes_hold_together() -> None:
    """The worst class is chosen by these very rows, and is covered all the same."""
    by_stage, labels, _ = rows(7, 60_000)
    truth = break_down(POLICY, by_stage, labels)
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(20):
        chosen = rng.integers(0, len(labels), 700)
        some = {key: logits[chosen] for key, logits in by_stage.items()}
        worst = break_down(POLICY, some, labels[chosen]).worst_class
        (expected,) = (group for group in truth.classes if group.name == worst.name)
        covered += (
            worst.harm.low <= expected.harm.share <= worst.harm.high
            and worst.accuracy_drop.low <= expected.accuracy_drop.share <= worst.accuracy_drop.high
        )
    assert covered >= 18


def test_equal_lengths_stay_together() -> None:
    by_stage, labels, _ = rows(0, 100)
    parts = break_down(POLICY, by_stage, labels, np.full(100, 7))
    assert [group.name for group in parts.lengths] == ["length 7 to 7"]
    assert break_down(POLICY, by_stage, labels).lengths == ()


def test_an_array_of_the_policy_s_stages_is_the_same() -> None:
    by_stage, labels, lengths = rows(1, 300)
    array = np.stack([by_stage[key] for key in POLICY.keys], axis=1)
    assert break_down(POLICY, array, labels, lengths) == (
        break_down(POLICY, by_stage, labels, lengths)
    )


def test_lengths_that_are_refused(refuses: Refuses) -> None:
    by_stage, labels, lengths = rows(1, 300)
    text = (
        "lengths must be one finite number for each row. "
        "Received: shape (299,) for 300 rows. Give each row's number of tokens."
    )
    with refuses(ValueError, text):
        break_down(POLICY, by_stage, labels, lengths[1:])
