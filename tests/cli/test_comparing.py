"""Nets of a comparison: the images they see, and training that goes on where it stopped."""

import doctest
import json
import shutil
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import keras
import numpy as np
import pytest
from PIL import Image

from keras_mrl.comparison import nets, plan, report, training
from keras_mrl.comparison.data import ComparisonError, Images, read, split_classes
from keras_mrl.comparison.nets import Batches, Net, moved, nets_for
from keras_mrl.comparison.training import Recipe, is_trained, train

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 16, 16, 3)).astype(np.uint8)
PART = Images(PIXELS, np.arange(12) % 3, ("ant", "bee", "cat"))


@pytest.mark.parametrize("module", [nets, plan, report])
def test_the_examples_run(module: ModuleType) -> None:
    failed, tried = doctest.testmod(module)
    assert tried
    assert not failed


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
        with pytest.raises(ComparisonError, match=r"Received: .*\. "):
            read([str(place)], None)


def test_an_image_in_no_folder_has_no_class(tmp_path: Path) -> None:
    file = zip_of(tmp_path / "pictures")
    with zipfile.ZipFile(file, "a") as archive:
        archive.write(next((tmp_path / "pictures").glob("*/*")), "cover.png")
    assert read([str(file)], None).names == PART.names


def test_files_that_no_person_made_are_passed_over(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "pictures")
    (folder / "ant" / "._00.png").write_bytes(b"not an image")
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "00.png").write_bytes(b"not an image")
    assert read([str(folder)], None).names == PART.names
    file = zip_of(tmp_path / "packed")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("__MACOSX/ant/._00.png", b"not an image")
    assert len(read([str(file)], None).labels) == 12


def test_a_zip_may_have_a_folder_around_and_another_systems_separators(tmp_path: Path) -> None:
    around = tmp_path / "around.zip"
    with zipfile.ZipFile(around, "w") as archive:
        for image in sorted(folder_of(tmp_path / "pictures").glob("*/*")):
            archive.write(image, f"birds/{image.parent.name}/{image.name}")
    assert read([str(around)], None).names == PART.names
    with zipfile.ZipFile(around, "a") as archive:
        archive.write(image, "birds/test/ant/00.png")
    with pytest.raises(ComparisonError, match=r"with classes in birds, birds/test\. "):
        read([str(around)], None)
    windows = tmp_path / "windows.zip"
    with zipfile.ZipFile(windows, "w") as archive:
        for image in sorted((tmp_path / "pictures").glob("*/*")):
            info = zipfile.ZipInfo("x")
            info.filename = f"{image.parent.name}\\{image.name}"
            archive.writestr(info, image.read_bytes())
    assert read([str(windows)], None).names == PART.names


def packed(folder: Path) -> Path:
    file = folder.with_suffix(".zip")
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):  # folders, too, as other programs pack them
            archive.write(path, path.relative_to(folder).as_posix())
    return file


@pytest.mark.parametrize("as_given", [Path, packed])
def test_a_folder_is_read_as_the_zip_of_it(as_given: Any, tmp_path: Path) -> None:
    deep = tmp_path / "deep"
    folder_of(deep / "one" / "birds")
    (deep / "one" / "birds" / "ant.png").mkdir()
    found = read([str(as_given(deep))], None)
    assert (found.names, len(found.labels)) == (PART.names, 12)
    mixed = tmp_path / "mixed"
    folder_of(mixed)
    folder_of(mixed / "more")
    with pytest.raises(ComparisonError, match=r"side by side\..* with classes in \., more\. Give"):
        read([str(as_given(mixed))], None)
    below = tmp_path / "below"
    for name in PART.names:  # a folder more between a class and its images
        folder_of(below / "x")
        (below / name).mkdir()
        (below / "x" / name).rename(below / name / "first")
    shutil.rmtree(below / "x")
    with pytest.raises(ComparisonError, match=r"with classes in ant, bee, cat\. "):
        read([str(as_given(below))], None)


def test_links_lead_to_classes_and_not_in_circles(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "pictures")
    (folder / "ant").rename(tmp_path / "elsewhere")
    (folder / "ant").symlink_to(tmp_path / "elsewhere")
    (folder / "bee" / "up").symlink_to(folder)
    found = read([str(folder)], None)
    assert (found.names, len(found.labels)) == (PART.names, 12)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_images_stand_upright_as_their_exif_says(suffix: str, tmp_path: Path) -> None:
    seen = np.zeros((16, 16, 3), np.uint8)
    seen[:8] = 255  # white above
    stored = Image.fromarray(np.rot90(seen).copy())  # white on the left, as a turned camera has it
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    (tmp_path / "ant").mkdir()
    stored.save(tmp_path / "ant" / f"0.{suffix}", exif=exif)
    stored.save(tmp_path / "ant" / f"1.{suffix}")
    stored.save(tmp_path / "ant" / f"2.{suffix}", exif=b"Exif\0\0no tags")
    turned, plain, damaged = read([str(tmp_path)], None).pixels.astype(int)
    np.testing.assert_allclose(turned, seen, atol=2)
    np.testing.assert_allclose(plain, np.rot90(seen), atol=2)
    np.testing.assert_array_equal(damaged, plain)


def one_image(where: Path, image: Image.Image) -> Any:
    (where / "ant").mkdir(parents=True)
    image.save(where / "ant" / "a.png")
    return read([str(where)], None).pixels[0]


def test_sixteen_bits_become_eight_and_transparency_white(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    sixteen = one_image(tmp_path / "sixteen", Image.fromarray(ramp * 256 + 17))
    np.testing.assert_array_equal(sixteen, np.repeat(ramp[..., None], 3, axis=-1))
    drawn = np.zeros((16, 16, 4), np.uint8)
    drawn[:8, :, 3] = 255
    seen = one_image(tmp_path / "clear", Image.fromarray(drawn))
    assert (seen[:8] == 0).all()
    assert (seen[8:] == 255).all()


def test_large_images_are_read_small_unless_asked_otherwise(tmp_path: Path) -> None:
    (tmp_path / "a" / "ant").mkdir(parents=True)
    Image.fromarray(np.zeros((300, 400, 3), np.uint8)).save(tmp_path / "a" / "ant" / "0.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a" / "ant" / "1.png")
    assert read([str(tmp_path / "a")], None).pixels.shape == (2, 64, 64, 3)
    assert read([str(tmp_path / "a")], 100).pixels.shape == (2, 100, 100, 3)


def test_arrays_are_resized_where_a_size_is_asked_for(tmp_path: Path) -> None:
    file = str(arrays_of(tmp_path / "pictures"))
    assert read([file], None).pixels.shape == (12, 16, 16, 3)
    found = read([file], 8).pixels
    assert found.shape == (12, 8, 8, 3)
    whole = read([file], None).pixels
    np.testing.assert_allclose(found.mean(axis=(1, 2)), whole.mean(axis=(1, 2)), atol=12)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (np.array([1.0, 2.0, 10.0]), ("1", "2", "10")),
        (np.array([b"bee", b"ant", b"cat"]), ("ant", "bee", "cat")),
        (np.array([[3], [4], [5]]), ("3", "4", "5")),
    ],
)
def test_labels_name_classes(labels: Any, names: tuple[str, ...], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=PIXELS[:3], y_train=labels)
    assert read([str(tmp_path / "a.npz")], None).names == names


@pytest.mark.parametrize(
    "labels", [np.array([1.0, np.nan, 2.0]), np.array([0.5, 1, 2]), np.array(3), np.eye(3)]
)
def test_labels_that_name_no_class_are_refused(labels: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=PIXELS[:3], y_train=labels)
    with pytest.raises(ComparisonError, match=r"Received: .*a\.npz\. "):
        read([str(tmp_path / "a.npz")], None)


def test_files_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "plain.npy", PIXELS)
    (tmp_path / "plain.npy").rename(tmp_path / "plain.npz")
    np.savez(tmp_path / "none.npz", x_train=PIXELS[:0], y_train=np.arange(0))
    np.savez(tmp_path / "named.npz", x=PIXELS, y=np.arange(12))
    for name in ("plain.npz", "none.npz", "named.npz"):
        with pytest.raises(ComparisonError, match=rf"Received: .*{name}.*\. "):
            read([str(tmp_path / name)], None)


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
    assert len(set(names)) == len(names) == 17
    assert names[:3] == ["mrl-0", "ff_32-0", "mrl_e-0"]
    assert names[7:9] == ["mrl_seen-0", "ff_32_seen-0"]
    # Last, so that comparisons begun before these were trained keep their order.
    assert names[-2:] == ["ff_8_seen-0", "ff_16_seen-0"]


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
    # Stopped between its last name and the note that it is whole: nothing is trained again.
    (tmp_path / "cut" / "net.json").rename(tmp_path / "cut" / "history.json")
    noted = json.loads((tmp_path / "whole" / "net.json").read_text())["history"]
    (tmp_path / "cut" / "history.json").write_text(json.dumps(noted))
    train(net, tmp_path / "cut", (PART, PART), recipe, lines.append)
    assert is_trained(tmp_path / "cut")
    assert len(lines) == 3


@pytest.mark.backend
def test_a_damaged_net_is_trained_anew(tmp_path: Path) -> None:
    net, recipe = Net("ff", (4,)), Recipe(epochs=1, filters=8, flip=False)
    (tmp_path / "epoch-1.keras").write_bytes(b"PK cut")
    (tmp_path / "history.json").write_text('[{"loss": 1.0, "seconds": 1.0}]')
    lines: list[str] = []
    train(net, tmp_path, (PART, PART), recipe, lines.append)
    assert "epoch-1.keras is damaged" in lines[0]
    assert is_trained(tmp_path)
    (tmp_path / "net.json").write_text('{"history": [')
    assert not is_trained(tmp_path)
