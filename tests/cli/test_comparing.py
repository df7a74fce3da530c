"""Nets of a comparison: the images they see, and training that goes on where it stopped."""

import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from PIL import Image

from keras_mrl_cli.asking import RefusalError
from keras_mrl_cli.comparing import training
from keras_mrl_cli.comparing.batches import Batches, moved
from keras_mrl_cli.comparing.images import Images, read, split_classes
from keras_mrl_cli.comparing.nets import Net, nets_for
from keras_mrl_cli.comparing.training import Recipe, is_trained, train

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 16, 16, 3)).astype(np.uint8)
PART = Images(PIXELS, np.arange(12) % 3, ("ant", "bee", "cat"))


def folder_of(where: Path) -> Path:
    for row, (pixels, label) in enumerate(zip(PART.pixels, PART.labels, strict=True)):
        file = where / PART.names[label] / f"{row:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
    return where


def zip_of(where: Path) -> Path:
    file = where.with_suffix(".zip")
    with zipfile.ZipFile(file, "w") as archive:
        for image in sorted(folder_of(where).glob("*/*")):
            archive.write(image, f"{image.parent.name}/{image.name}")
    return file


def arrays_of(where: Path) -> Path:
    order = np.argsort(PART.labels, kind="stable")
    names = np.array(PART.names)[PART.labels[order]]
    np.savez(where.with_suffix(".npz"), x_train=PART.pixels[order], y_train=names)
    return where.with_suffix(".npz")


@pytest.mark.parametrize("write", [folder_of, zip_of, arrays_of])
def test_images_are_read_from_everywhere(write: Any, tmp_path: Path) -> None:
    found = read([str(write(tmp_path / "pictures"))], None)
    order = np.argsort(PART.labels, kind="stable")
    np.testing.assert_array_equal(found.pixels, PART.pixels[order])
    np.testing.assert_array_equal(found.labels, PART.labels[order])
    assert found.names == PART.names


def test_class_numbers_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=PIXELS, y_train=np.arange(12))
    assert read([str(tmp_path / "a.npz")], None).names == tuple(map(str, range(12)))


def test_places_without_images_are_refused(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(RefusalError, match=r"Received: .*\. "):
            read([str(place)], None)


def test_an_image_in_no_folder_has_no_class(tmp_path: Path) -> None:
    file = zip_of(tmp_path / "pictures")
    with zipfile.ZipFile(file, "a") as archive:
        archive.write(next((tmp_path / "pictures").glob("*/*")), "cover.png")
    assert read([str(file)], None).names == PART.names


def test_unseen_classes_stand_apart() -> None:
    seen, unseen = split_classes(PART, [1])
    assert seen.names == ("ant", "cat")
    assert unseen.names == ("bee",)
    assert set(seen.labels.tolist()) == {0, 1}
    np.testing.assert_array_equal(unseen.pixels, PIXELS[PART.labels == 1])


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
    found = np.argwhere(moved(marked, RNG, flip=False)[..., 0])
    assert len(found) == 200
    assert set(found[:, 1].tolist()) == set(found[:, 2].tolist()) == set(range(6, 11))


def test_nets_have_names_of_their_own() -> None:
    nets = nets_for((8, 16, 32), seeds=3, seeded=(8, 32), unseen=True)
    names = [net.name for net in nets]
    assert len(set(names)) == len(names) == 15
    assert names[:3] == ["mrl-0", "ff_32-0", "mrl_e-0"]


@pytest.mark.backend
@pytest.mark.parametrize("method", ["mrl", "slimmable"])
def test_training_goes_on_after_the_last_whole_epoch(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, recipe = Net(method, (4, 8)), Recipe(epochs=2, filters=8, flip=True)
    lines: list[str] = []
    epochs: list[int] = []

    def noted(part: Images, seed: int, epoch: int, flip: bool) -> Batches:
        epochs.append(epoch)
        return Batches(part, seed, epoch, flip)

    monkeypatch.setattr(training, "Batches", noted)
    train(net, tmp_path / "whole", (PART, PART), recipe, lines.append)
    assert len(lines) == 2
    keep = training._keep

    def stop_after(*given: Any) -> Path:
        keep(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "_keep", stop_after)
        with pytest.raises(KeyboardInterrupt):
            train(net, tmp_path / "cut", (PART, PART), recipe, lines.append)
    assert not is_trained(tmp_path / "cut")
    train(net, tmp_path / "cut", (PART, PART), recipe, lines.append)
    assert len(lines) == 3
    assert epochs == [0, 1] * 2  # without and with an interruption
    for name in ("whole", "cut"):
        assert is_trained(tmp_path / name)
    files = {file.name for file in (tmp_path / "whole").iterdir()}
    assert files == {file.name for file in (tmp_path / "cut").iterdir()}
    whole, cut = (np.load(tmp_path / n / "test_logits.npy") for n in ("whole", "cut"))
    assert whole.shape == (12, 2, 3)
    np.testing.assert_allclose(cut, whole, rtol=2e-3, atol=2e-3)
    keras.saving.load_model(tmp_path / "cut" / "model.keras")
