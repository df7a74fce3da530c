"""Images and their classes, read from everywhere."""

import io
import os
import re
import shutil
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from PIL import Image

from keras_mrl.comparison.data import ComparisonError, Part, has_test, read, split_classes
from keras_mrl_serving import read_image
from tests.helpers.comparisons import random_images
from tests.helpers.hostile_files import (
    Member,
    archives,
    bomb,
    npy,
    raw_zip,
)
from tests.helpers.image_files import files
from tests.helpers.laws import exactly

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 16, 16, 3)).astype(np.uint8)
PART = Part(PIXELS, np.arange(12) % 3, ("ant", "bee", "cat"))


def folder_of(where: Path) -> Path:
    for row, (pixels, label) in enumerate(zip(PART.inputs, PART.labels, strict=True)):
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
    np.savez(where.with_suffix(".npz"), x_train=PART.inputs[order], y_train=names)
    return where.with_suffix(".npz")


@pytest.mark.parametrize("write", [folder_of, zip_of, arrays_of])
def test_images_are_read_from_everywhere(write: Any, tmp_path: Path) -> None:
    images = read([str(write(tmp_path / "pictures"))], None)
    order = np.argsort(PART.labels, kind="stable")
    np.testing.assert_array_equal(images.inputs, PART.inputs[order])
    np.testing.assert_array_equal(images.labels, PART.labels[order])
    assert images.names == PART.names


def test_several_places_are_taken_together(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=PIXELS[:2], y_train=["cat", "dog"])
    places = [str(folder_of(tmp_path / "pictures")), str(tmp_path / "a.npz")]
    images = read(places, None)
    assert images.names == ("ant", "bee", "cat", "dog")
    assert np.bincount(images.labels).tolist() == [4, 4, 5, 1]


def test_class_numbers_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=PIXELS, y_train=np.arange(12))
    assert read([str(tmp_path / "a.npz")], None).names == tuple(map(str, range(12)))


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


@pytest.mark.parametrize("as_stored", [Path, packed])
def test_a_folder_is_read_as_the_zip_of_it(as_stored: Any, tmp_path: Path) -> None:
    deep = tmp_path / "deep"
    folder_of(deep / "one" / "birds")
    (deep / "one" / "birds" / "ant.png").mkdir()
    images = read([str(as_stored(deep))], None)
    assert (images.names, len(images.labels)) == (PART.names, 12)
    mixed = tmp_path / "mixed"
    folder_of(mixed)
    folder_of(mixed / "more")
    with pytest.raises(ComparisonError, match=r"side by side\..* with classes in \., more\. Give"):
        read([str(as_stored(mixed))], None)
    below = tmp_path / "below"
    for name in PART.names:  # a folder more between a class and its images
        folder_of(below / "x")
        (below / name).mkdir()
        (below / "x" / name).rename(below / name / "first")
    shutil.rmtree(below / "x")
    with pytest.raises(ComparisonError, match=r"with classes in ant, bee, cat\. "):
        read([str(as_stored(below))], None)


def test_links_lead_to_classes_and_not_in_circles(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "pictures")
    (folder / "ant").rename(tmp_path / "elsewhere")
    (folder / "ant").symlink_to(tmp_path / "elsewhere")
    (folder / "bee" / "up").symlink_to(folder)
    images = read([str(folder)], None)
    assert (images.names, len(images.labels)) == (PART.names, 12)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_images_stand_upright_as_their_exif_says(suffix: str, tmp_path: Path) -> None:
    upright = np.zeros((16, 16, 3), np.uint8)
    upright[:8] = 255  # white above
    stored = Image.fromarray(np.rot90(upright).copy())  # white on the left: the camera was turned
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    (tmp_path / "ant").mkdir()
    stored.save(tmp_path / "ant" / f"0.{suffix}", exif=exif)
    stored.save(tmp_path / "ant" / f"1.{suffix}")
    stored.save(tmp_path / "ant" / f"2.{suffix}", exif=b"Exif\0\0no tags")
    turned, plain, damaged = read([str(tmp_path)], None).inputs.astype(int)
    np.testing.assert_allclose(turned, upright, atol=2)
    np.testing.assert_allclose(plain, np.rot90(upright), atol=2)
    np.testing.assert_array_equal(damaged, plain)


def one_image(where: Path, image: Image.Image) -> Any:
    (where / "ant").mkdir(parents=True)
    image.save(where / "ant" / "a.png")
    return read([str(where)], None).inputs[0]


def test_sixteen_bits_become_eight_and_transparency_white(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16)
    sixteen = one_image(tmp_path / "sixteen", Image.fromarray(ramp * 256 + 17))
    np.testing.assert_array_equal(sixteen, np.repeat(ramp[..., None], 3, axis=-1))
    drawn = np.zeros((16, 16, 4), np.uint8)
    drawn[:8, :, 3] = 255
    opaque = one_image(tmp_path / "clear", Image.fromarray(drawn))
    assert (opaque[:8] == 0).all()
    assert (opaque[8:] == 255).all()


def test_files_have_the_pixels_that_every_room_reads(tmp_path: Path) -> None:
    bytes_by_name = files()
    (tmp_path / "ant").mkdir()
    for name, data in bytes_by_name.items():
        (tmp_path / "ant" / name).write_bytes(data)
    unreadable: list[str] = []
    images = read([str(tmp_path)], None, unreadable=unreadable)
    refused = ("float-called.png", "tiff-called.png", "transparent-sixteen.png")
    assert [sentence.partition(" (")[0] for sentence in unreadable] == [
        f"ant/{name}" for name in refused
    ]
    readable = sorted(set(bytes_by_name) - set(refused))
    for name, pixels in zip(readable, images.inputs, strict=True):
        np.testing.assert_array_equal(pixels, read_image(bytes_by_name[name]), name)


@pytest.mark.parametrize("as_stored", [Path, packed])
def test_all_files_that_cannot_be_read_are_named_at_once(as_stored: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "pictures")
    (folder / "ant" / "00.png").write_bytes(b"not an image")
    whole = (folder / "cat" / "02.png").read_bytes()
    (folder / "cat" / "02.png").write_bytes(whole[:300])
    place = str(as_stored(folder))
    named = "ant/00.png (it is none), cat/02.png (image file is truncated)"
    with pytest.raises(ComparisonError, match=rf"Received: 2 .*: {re.escape(named)}\. Save"):
        read([place], None)
    unreadable: list[str] = []
    images = read([place], None, unreadable=unreadable)
    assert ", ".join(unreadable) == named
    assert np.bincount(images.labels).tolist() == [3, 4, 3]


def test_a_file_that_may_not_be_opened_is_one_of_them(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "pictures")
    (folder / "ant" / "aa.png").symlink_to(tmp_path / "nowhere.png")
    unreadable: list[str] = []
    assert len(read([str(folder)], None, unreadable=unreadable).labels) == 12
    assert unreadable == ["ant/aa.png (No such file or directory)"]


def test_without_pillow_there_are_no_image_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = str(folder_of(tmp_path / "pictures"))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ComparisonError, match=r"Install it: pip install 'keras-mrl\[images\]'\."):
        read([place], None)


def test_large_files_become_small_without_a_size(tmp_path: Path) -> None:
    (tmp_path / "a" / "ant").mkdir(parents=True)
    Image.fromarray(np.zeros((300, 400, 3), np.uint8)).save(tmp_path / "a" / "ant" / "0.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a" / "ant" / "1.png")
    assert read([str(tmp_path / "a")], None).inputs.shape == (2, 64, 64, 3)
    assert read([str(tmp_path / "a")], 100).inputs.shape == (2, 100, 100, 3)


def test_arrays_are_resized_to_a_size(tmp_path: Path) -> None:
    file = str(arrays_of(tmp_path / "pictures"))
    assert read([file], None).inputs.shape == (12, 16, 16, 3)
    small = read([file], 8).inputs
    assert small.shape == (12, 8, 8, 3)
    whole = read([file], None).inputs
    np.testing.assert_allclose(small.mean(axis=(1, 2)), whole.mean(axis=(1, 2)), atol=12)


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


def damaged(where: Path) -> Path:
    (folder_of(where) / "ant" / "00.png").write_bytes(b"not an image")
    return where


def of_half_the_height(where: Path) -> Path:
    np.savez(where.with_suffix(".npz"), x_train=PIXELS[:, :8], y_train=PART.labels)
    return where.with_suffix(".npz")


def stored(**arrays: Any) -> Any:
    """A function that writes these arrays."""

    def write(where: Path) -> Path:
        np.savez(where.with_suffix(".npz"), **arrays)
        return where.with_suffix(".npz")

    return write


def nameless(where: Path) -> Path:
    with where.with_suffix(".npz").open("wb") as file:
        np.save(file, PIXELS)
    return where.with_suffix(".npz")


def empty(where: Path) -> Path:
    where.mkdir()
    return where


SHAPES = (
    "Images must be uint8 (rows, height, width, channels), and embeddings a table of floats "
    "(rows, width). Received: float64 (3, 16, 16, 3) in {place}. "
    "Scale pixels to 0..255; pool embeddings of tokens to one row per text."
)
LABELS = "Every image or embedding must have one label. Received: (3, 16, 16, 3) and labels "
ONE = " in {place}. Give class ids or names, not one-hot rows."
TABLE = (
    "Embeddings must be a table of floats (rows, width). Received: int64 (3, 4) in {place}. "
    "Give images their height and width; give quantised embeddings as floats."
)
EMBEDDINGS = np.random.default_rng(0).normal(size=(12, 4))
NO_CLASS = (
    "Labels must be class ids or names. Received: float64 in {place}. Give integers or strings."
)
NO_IMAGES = "An .npz of images or embeddings must hold x_train and y_train. Received: {place} "
NONE = (
    "--data must hold images in one sub-folder per class. Received: {place}, without any. "
    "Name the folder above those of the classes."
)


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (empty, NONE),
        (stored(x_train=PIXELS[:0], y_train=np.arange(0)), NONE),
        (
            Path,
            "Images come from a folder, a zip, an .npz or a Keras dataset. "
            "Received: {place} (No such file or directory). "
            "Correct the path, or name cifar10, cifar100, fashion_mnist or mnist.",
        ),
        (
            damaged,
            "Every image file must be a whole JPEG, PNG, GIF, BMP or WebP. Received: 1 that cannot "
            "be read: ant/00.png (it is none). Save them anew as 8-bit PNG or JPEG, or go on "
            "without them: --skip-unreadable, skip_unreadable=True.",
        ),
        (stored(x_train=PIXELS[:3], y_train=np.array([1.0, np.nan, 2.0])), NO_CLASS),
        (stored(x_train=PIXELS[:3], y_train=np.array([0.5, 1, 2])), NO_CLASS),
        (
            stored(x_train=PIXELS[:3], y_train=np.array(3)),
            LABELS + "()" + ONE,
        ),
        (
            stored(x_train=PIXELS[:3] / 255, y_train=np.arange(3)),
            SHAPES,
        ),
        (
            stored(x_train=PIXELS[:3], y_train=np.eye(3)),
            LABELS + "(3, 3)" + ONE,
        ),
        (stored(x_train=np.ones((3, 4), np.int64), y_train=np.arange(3)), TABLE),
        (
            stored(x_train=np.where(np.eye(12, 4), 1e300, EMBEDDINGS), y_train=np.arange(12)),
            "Embeddings must be finite float32 numbers. Received: 4 of 12 rows with NaN or "
            "infinity in {place}, the first is row 0. Leave those rows out, or embed them again.",
        ),
        (
            stored(x_train=np.ones((12, 4)), y_train=np.arange(12)),
            "Embeddings must differ. Received: 12 equal rows in {place}. "
            "Correct how they are made.",
        ),
        (
            nameless,
            NO_IMAGES + "(no zip, or not a whole one (File is not a zip file)). "
            "Write it with np.savez_compressed.",
        ),
        (
            stored(x=PIXELS, y=np.arange(12)),
            NO_IMAGES + "(only x, y). Write it with np.savez_compressed.",
        ),
    ],
)
def test_places_that_hold_no_images_of_classes_are_refused(
    write: Any, sentence: str, tmp_path: Path
) -> None:
    place = write(tmp_path / "pictures")
    pattern = exactly(sentence.format(place=place)).replace(re.escape("..."), ".*")
    with pytest.raises(ComparisonError, match=pattern):
        read([str(place)], None)


def test_images_of_half_the_height_are_refused(tmp_path: Path) -> None:
    places = [str(arrays_of(tmp_path / "large")), str(of_half_the_height(tmp_path / "small"))]
    sentence = (
        "All images must have one size and as many channels, all embeddings one width. "
        "Received: (8, 16, 3), (16, 16, 3). Give --size for images, or leave some out."
    )
    with pytest.raises(ComparisonError, match=exactly(sentence)):
        read(places, None)
    assert read(places, 8).inputs.shape == (24, 8, 8, 3)


def test_a_dataset_of_keras_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    parts = (PIXELS, PART.labels[:, None]), (PIXELS[:3], PART.labels[:3])
    monkeypatch.setattr(keras.datasets.cifar10, "load_data", lambda: parts)
    assert has_test("cifar10")
    assert len(read(["cifar10"], None).labels) == 12
    assert len(read(["cifar10"], None, test=True).labels) == 3

    def fail() -> Any:
        raise OSError("no network")

    monkeypatch.setattr(keras.datasets.cifar10, "load_data", fail)
    sentence = (
        "A Keras dataset is downloaded the first time. Received: cifar10 (no network). "
        "Connect to the network, or give a folder, zip or .npz."
    )
    with pytest.raises(ComparisonError, match=exactly(sentence)):
        read(["cifar10"], None)


def test_unseen_classes_stand_apart() -> None:
    seen, unseen = split_classes(PART, [1])
    assert seen.names == ("ant", "cat")
    assert unseen.names == ("bee",)
    assert set(seen.labels.tolist()) == {0, 1}
    np.testing.assert_array_equal(unseen.inputs, PIXELS[PART.labels == 1])


def test_unseen_classes_have_one_number_in_every_part() -> None:
    training, test = random_images(12, 4), random_images(12, 4, seed=1)
    lacking = test.take(test.labels != 1)  # a class that the test has no images of
    for part in (training, lacking):
        seen, unseen = split_classes(part, [1, 3])
        assert (seen.names, unseen.names) == (("0", "2"), ("1", "3"))
        for side in (seen, unseen):
            for pixels, label in zip(side.inputs, side.labels, strict=True):
                (row,) = np.flatnonzero((part.inputs == pixels).all(axis=(1, 2, 3)))
                assert part.names[part.labels[row]] == side.names[label]


def test_hostile_archives_are_refused_in_little_memory(tmp_path: Path) -> None:
    png = io.BytesIO()
    Image.new("RGB", (8, 8)).save(png, "png")
    image = png.getvalue()
    zips = {
        "a/pipe.txt": raw_zip(Member(b"a/1.txt", image)),
        "encrypted": raw_zip(Member(b"a/1.png", image, flags=1)),
        "upwards": raw_zip(Member(b"a/../../1.png", image)),
        "absolute": raw_zip(Member(b"/a/1.png", image)),
        "twice": raw_zip(Member(b"a/1.png", image), Member(b"a\\1.png", image)),
        "other bytes": raw_zip(Member(b"a/1.png", image, crc=1)),
        "a bomb": raw_zip(bomb(b"a/1.png", 3 * 2**30, image)),
        "bzip2": raw_zip(Member(b"a/1.png", image, zipfile.ZIP_BZIP2)),
        "a zip": raw_zip(Member(b"a/1.png", raw_zip(Member(b"b/1.png", image)))),
    }
    paths = [tmp_path / f"{number}.zip" for number in range(len(zips))]
    for path, data in zip(paths, zips.values(), strict=True):
        path.write_bytes(data)
    archives_of_arrays = {**archives(), "x": raw_zip(bomb(b"x_train.npy", 3 * 2**30, npy()))}
    arrays_of_images = [tmp_path / f"{number}.npz" for number in range(len(archives_of_arrays))]
    for path, data in zip(arrays_of_images, archives_of_arrays.values(), strict=True):
        path.write_bytes(data)
    for name in ("folder", "pipe"):
        (tmp_path / name / "a").mkdir(parents=True)
    os.mkfifo(tmp_path / "pipe.zip")
    os.mkfifo(tmp_path / "pipe" / "a" / "1.png")
    (tmp_path / "folder" / "a" / "1.png").symlink_to("/dev/zero")
    special = [tmp_path / "pipe.zip", tmp_path / "pipe", tmp_path / "folder", Path("/dev/zero")]
    tracemalloc.start()
    try:
        for path in (*paths, *arrays_of_images, *special):
            with pytest.raises(ComparisonError):
                read([str(path)], None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 64 * 2**20


def test_arrays_are_read_as_the_npz_of_them(tmp_path: Path) -> None:
    labels = np.arange(12) % 3
    place = stored(x_train=EMBEDDINGS, y_train=labels)(tmp_path / "e")
    for given in (str(place), {"x_train": EMBEDDINGS, "y_train": labels}):
        part = read([given], None)
        assert (part.kind, part.inputs.dtype, part.names) == (
            "embeddings",
            np.dtype(np.float32),
            ("0", "1", "2"),
        )
        np.testing.assert_array_equal(part.inputs, EMBEDDINGS.astype(np.float32))
    with pytest.raises(ComparisonError, match=r"Received: x, y_train\. Give \{"):
        read([{"x": EMBEDDINGS, "y_train": labels}], None)


def test_embeddings_have_no_size() -> None:
    with pytest.raises(ComparisonError, match=r"--size is that of images\. Received: embeddings"):
        read([{"x_train": EMBEDDINGS, "y_train": np.arange(12) % 3}], 8)
