"""Training of a net that goes on where it stopped."""

import json
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest

from keras_mrl.comparison.data import Part
from keras_mrl.comparison.nets import Net
from keras_mrl.comparison.training import Batches, Recipe, count_epochs, is_trained, shift, train

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 16, 16, 3)).astype(np.uint8)
PART = Part(PIXELS, np.arange(12) % 3, ("ant", "bee", "cat"))


def test_an_epoch_is_the_same_whenever_it_is_asked_for() -> None:
    first, again, other = (Batches(PART, seed=3, epoch=e, flip=True) for e in (1, 1, 2))
    assert len(first) == 1
    for mine, its in zip(first[0], again[0], strict=True):
        np.testing.assert_array_equal(mine, its)
    assert not np.array_equal(first[0][0], other[0][0])
    assert sorted(first[0][1].tolist()) == sorted(PART.labels.tolist())


def test_images_move_by_an_eighth_at_most() -> None:
    marked = np.zeros((200, 16, 16, 1), np.uint8)
    marked[:, 8, 8] = 1
    places = np.argwhere(shift(marked, RNG, flip=False)[..., 0])
    assert len(places) == 200
    assert set(places[:, 1].tolist()) == set(places[:, 2].tolist()) == set(range(6, 11))


@pytest.mark.backend
@pytest.mark.parametrize("method", ["mrl", "slimmable"])
def test_training_goes_on_after_the_last_whole_epoch(method: str, tmp_path: Path) -> None:
    net, recipe = Net(method, (4, 8)), Recipe(epochs=2, filters=8, flip=True)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir()
    (whole / "epoch-1.keras").write_bytes(b"PK cut")
    (whole / "history.json").write_text('[{"loss": 1.0, "seconds": 1.0}]')
    lines: list[str] = []

    def copy_after_the_first_epoch(line: str) -> None:
        lines.append(line.partition(",")[0].partition(" (")[0])
        if lines[-1].endswith("epoch 1/2"):
            shutil.copytree(whole, cut)  # what a killed process would leave

    train(net, whole, (PART, PART), recipe, copy_after_the_first_epoch)
    assert not is_trained(cut)
    assert count_epochs(cut) == 1
    train(net, cut, (PART, PART), recipe, copy_after_the_first_epoch)
    damaged, *epochs = (line.removeprefix(f"{method}-0: ") for line in lines)
    assert damaged == "epoch-1.keras is damaged"
    assert epochs == ["epoch 1/2", "epoch 2/2", "epoch 2/2"]
    assert is_trained(whole)
    assert is_trained(cut)
    assert {file.name for file in whole.iterdir()} == {file.name for file in cut.iterdir()}
    expected, logits = (np.load(folder / "test_logits.npy") for folder in (whole, cut))
    assert expected.shape == (12, 2, 3)
    np.testing.assert_allclose(logits, expected, rtol=2e-3, atol=2e-3)
    keras.saving.load_model(cut / "model.keras")


def test_a_net_that_has_its_last_name_is_not_trained_again(tmp_path: Path) -> None:
    """Stopped between the last renaming and the note that the net is trained."""
    net, recipe = Net("ff", (4,)), Recipe(epochs=2, filters=8, flip=False)
    net.make((16, 16, 3), 3, recipe.filters).save(tmp_path / "model.keras")
    history = json.dumps([{"loss": 1.0, "seconds": 1.0}] * 2)
    (tmp_path / "history.json").write_text(history)
    assert not is_trained(tmp_path)
    lines: list[str] = []
    train(net, tmp_path, (PART, PART), recipe, lines.append)
    assert lines == []
    assert is_trained(tmp_path)
    assert np.load(tmp_path / "test_4.npy").shape == (12, 4)
    (tmp_path / "net.json").write_text('{"history": [')
    assert not is_trained(tmp_path)
