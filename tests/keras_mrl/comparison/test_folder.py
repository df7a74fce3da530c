"""The folder of a comparison."""

from pathlib import Path

import pytest

from keras_mrl.comparison.data import ComparisonError
from keras_mrl.comparison.folder import claim, replacing
from tests.helpers.laws import exactly


def test_one_process_has_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sentence = (
        "One process compares in a folder at a time. "
        f"Received: {out}, where another is at work. Wait for it, or name another --out."
    )
    with claim(out, []):
        with pytest.raises(ComparisonError, match=exactly(sentence)), claim(out, []):
            pass
    with claim(out, []):
        pass


@pytest.mark.parametrize(
    "names", [["plan.json", "report.html"], ["splits.npz"], [".partial-splits.npz", ".lock"]]
)
def test_a_folder_of_a_comparison_is_taken(names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    with claim(tmp_path, []):
        pass


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "report.html").touch()
    sentence = (
        "--out must be a new folder, an empty one, or one of a comparison. "
        f"Received: {tmp_path} with report.html. Name another."
    )
    with pytest.raises(ComparisonError, match=exactly(sentence)), claim(tmp_path, []):
        pass


def test_a_folder_in_the_images_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    sentence = (
        "--out must not lie in the images, where its figures would be a class. "
        f"Received: {out} in {tmp_path}. Name a folder elsewhere."
    )
    with pytest.raises(ComparisonError, match=exactly(sentence)), claim(out, [str(tmp_path)]):
        pass
    assert not out.exists()


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "results.json"

    def stop_while_writing() -> None:
        with replacing(path) as partial:
            partial.write_text("{")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_while_writing()
    assert not path.exists()
    with replacing(path) as partial:
        partial.write_text("{}")
    assert path.read_text() == "{}"
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """The names of what is being written can be guessed, and the folder may be shared."""
    (tmp_path / "mine").write_text("mine")
    for name in (".lock", ".partial-plan.json"):
        (tmp_path / name).symlink_to("mine")
    with replacing(tmp_path / "plan.json") as partial:
        partial.write_text("a plan")
    assert (tmp_path / "plan.json").read_text() == "a plan"
    with claim(tmp_path, []):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
