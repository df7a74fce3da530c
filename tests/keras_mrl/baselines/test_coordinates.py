import numpy as np
import pytest

from keras_mrl.baselines import first_coordinates, random_probe
from keras_mrl.evaluation import linear_probe
from tests.helpers.laws import exactly

RANDOM = np.random.default_rng(0)
LABELS = np.arange(60) % 3
FEATURES = (RANDOM.normal(size=(60, 8)) + LABELS[:, None]).astype("float32")


def test_the_first_are_the_first() -> None:
    np.testing.assert_array_equal(first_coordinates(FEATURES, 3), FEATURES[:, :3])


@pytest.mark.parametrize("dim", [1, 5, 8])
def test_the_probe_reads_its_coordinates_alone(dim: int) -> None:
    probe = random_probe(FEATURES, LABELS, dim, seed=1)
    assert len(set(probe.indices)) == dim
    expected = linear_probe(FEATURES[:, probe.indices], LABELS)
    np.testing.assert_array_equal(
        probe.predict(FEATURES), expected.predict(FEATURES[:, probe.indices])
    )
    changed = FEATURES.copy()
    changed[:, np.setdiff1d(np.arange(8), probe.indices)] = 1e6
    np.testing.assert_array_equal(probe.predict(changed), probe.predict(FEATURES))


def test_smaller_dims_are_the_first_of_larger_ones() -> None:
    small, large = (random_probe(FEATURES, LABELS, dim, seed=2).indices for dim in (2, 6))
    np.testing.assert_array_equal(large[:2], small)


def test_another_seed_chooses_others() -> None:
    chosen = {tuple(random_probe(FEATURES, LABELS, 4, seed=seed).indices) for seed in range(4)}
    assert len(chosen) == 4
    again = random_probe(FEATURES, LABELS, 4, seed=3).indices
    assert tuple(again) in chosen


def test_labels_of_another_length_are_refused() -> None:
    sentence = (
        "labels must hold one label per row of the features. "
        "Received: labels of shape (59,) for features of shape (60, 4). "
        "Give integer labels, not one-hot rows."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        random_probe(FEATURES, LABELS[1:], 4)


@pytest.mark.parametrize("dim", [0, 9])
def test_dims_that_are_not_there_are_refused(dim: int) -> None:
    with pytest.raises(ValueError, match="dims must"):
        first_coordinates(FEATURES, dim)
    with pytest.raises(ValueError, match="dims must"):
        random_probe(FEATURES, LABELS, dim)


@pytest.mark.parametrize("width", [7, 9])
def test_a_probe_reads_the_width_its_coordinates_were_chosen_from(width: int) -> None:
    sentence = (
        "Features must be as wide as those fitted. "
        f"Received: width {width}, fitted on 8. Embed with the same backbone."
    )
    probe = random_probe(FEATURES, LABELS, 2)
    for ask in (probe.predict, probe.embed):
        with pytest.raises(ValueError, match=exactly(sentence)):
            ask(np.ones((3, width)))
