"""Which names under a base path are versions: one rule, of the server, the export and inspect."""

from pathlib import Path

import pytest

from keras_mrl_serving.saved_model import list_versions, version_number


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("1", 1),
        ("00000123", 123),
        ("+7", 7),
        ("-7", -7),
        (" 7\t", 7),
        ("9223372036854775807", 2**63 - 1),
        ("9223372036854775808", None),
        ("-9223372036854775809", None),
        ("", None),
        ("1.0", None),
        ("1_000", None),
        ("0x10", None),
        ("1 2", None),
        ("- 1", None),
        ("v1", None),
        ("1.tmp", None),
        ("٣", None),
    ],
)
def test_which_names_are_versions(name: str, number: int | None) -> None:
    assert version_number(name) == number


def test_of_one_number_twice_the_later_name_counts_and_files_count_too(tmp_path: Path) -> None:
    for name in ("7", "007", "10", "copying-11"):
        (tmp_path / name).mkdir()
    (tmp_path / "9").touch()
    found = {7: str(tmp_path / "7"), 9: str(tmp_path / "9"), 10: str(tmp_path / "10")}
    assert list_versions(str(tmp_path)) == found
    assert list(list_versions(str(tmp_path))) == [7, 9, 10]
