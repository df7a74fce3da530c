"""A projection of frozen embeddings: what it keeps, what it refuses, where it lies."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving import ExactIndex, FunnelSchedule, Projection
from keras_mrl_serving.client import Client
from keras_mrl_serving.contract import Manifest
from keras_mrl_serving.errors import DamagedIndexError, EncoderMismatchError, ManifestError
from keras_mrl_serving.projection import principal_directions, unit_rows
from keras_mrl_serving.testing import InMemoryServer

RNG = np.random.default_rng(0)
ROWS = (RNG.normal(size=(400, 12)) * np.linspace(3, 0.2, 12)).astype(np.float32)
TURN = np.linalg.qr(RNG.normal(size=(12, 12)))[0]


def cosines(rows: Any) -> Any:
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return units @ units.T


def test_a_rotation_changes_no_cosine_at_full_width() -> None:
    turned = Projection(TURN, (4, 12)).transform(ROWS)
    assert turned.dtype == np.float32
    np.testing.assert_allclose(turned, ROWS.astype(np.float64) @ TURN.T, atol=2e-5)
    assert (
        np.abs(cosines(turned.astype(np.float64)) - cosines(ROWS.astype(np.float64))).max() < 1e-6
    )


def test_a_prefix_is_that_of_the_whole() -> None:
    projection = Projection(TURN[:6], (2, 6))
    assert (projection.width, projection.is_rotation) == (12, False)
    np.testing.assert_allclose(
        projection.transform(ROWS, 2), projection.transform(ROWS)[:, :2], rtol=1e-4, atol=1e-5
    )
    assert projection.transform(ROWS[0], 2).shape == (2,)


def test_what_is_no_projection_is_refused() -> None:
    with pytest.raises(ValueError, match="orthonormal rows, at most as many as they are wide"):
        Projection(np.ones((2, 3)), (2,))
    with pytest.raises(ValueError, match=r"Received: shape \(4, 3\)\. Take numpy"):
        Projection(np.eye(4, 3), (2,))
    with pytest.raises(ValueError, match=r"dims=\(8,\) for 6 directions"):
        Projection(TURN[:6], (8,))
    projection = Projection(TURN[:6], (2, 6))
    with pytest.raises(ValueError, match=r"dim=7 for 6. Ask for fewer coordinates"):
        projection.transform(ROWS, 7)
    with pytest.raises(ValueError, match=r"Received: shape \(400, 11\) for a width of 12"):
        projection.transform(ROWS[:, 1:])
    with pytest.raises(ValueError, match="must be finite"):
        projection.transform(np.full((1, 12), np.nan))
    with pytest.raises(ValueError, match="read-only"):
        projection.components[0] = 0


def test_principal_directions_are_the_singular_vectors_of_scaled_rows() -> None:
    units = ROWS.astype(np.float64) / np.linalg.norm(ROWS, axis=1, keepdims=True)
    right = np.linalg.svd(units)[2]
    directions = principal_directions(ROWS)
    np.testing.assert_allclose(np.abs(directions @ right.T), np.eye(12), atol=1e-4)
    assert (directions.max(axis=1) > -directions.min(axis=1)).all()
    np.testing.assert_allclose(principal_directions(ROWS, 3), directions[:3])


def test_directions_after_others_are_the_principal_ones_of_what_is_left() -> None:
    first = TURN[:3]
    directions = principal_directions(ROWS, 7, after=first)
    np.testing.assert_allclose(directions[:3], first)
    np.testing.assert_allclose(directions @ directions.T, np.eye(7), atol=1e-12)
    np.testing.assert_allclose(principal_directions(ROWS, 2, after=first), first[:2])
    left = unit_rows(ROWS).astype(np.float64) @ (np.eye(12) - first.T @ first)
    right = np.linalg.svd(left)[2][:4]
    np.testing.assert_allclose(np.abs(directions[3:] @ right.T), np.eye(4), atol=1e-3)


@pytest.mark.parametrize("rows", [ROWS[:0], ROWS[0], ROWS[:, :0], np.array([["a"]])])
def test_what_is_no_table_has_no_directions(rows: Any) -> None:
    with pytest.raises(ValueError, match=r"Embeddings must be numbers \(rows, width\)"):
        principal_directions(rows)


# The folder.


def test_a_folder_gives_back_what_was_saved(tmp_path: Path) -> None:
    projection = Projection(TURN[:6], (2, 6), "listwise", "5e1f")
    projection.save(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    Projection(TURN, (12,)).save(tmp_path)
    projection.save(tmp_path)
    loaded = Projection.load(tmp_path)
    np.testing.assert_array_equal(loaded.components, projection.components)
    assert (loaded.dims, loaded.method, loaded.encoder_fingerprint) == ((2, 6), "listwise", "5e1f")
    assert loaded.fingerprint == projection.fingerprint
    assert len(list(tmp_path.iterdir())) == 3  # none of the projection that was replaced


def test_the_fingerprint_is_of_directions_and_encoder() -> None:
    prints = {
        Projection(TURN, (2,)).fingerprint,
        Projection(TURN[::-1], (2,)).fingerprint,
        Projection(TURN[:5], (2,)).fingerprint,
        Projection(TURN, (2,), encoder_fingerprint="5e1f").fingerprint,
    }
    assert len(prints) == 4
    assert Projection(TURN, (2, 3)).fingerprint in prints  # the same embeddings


def test_a_damaged_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a folder with a file projection\.json"):
        Projection.load(tmp_path)
    Projection(TURN, (2, 12)).save(tmp_path)
    (file,) = tmp_path.glob("components-*.npy")
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + bytes([whole[-4] ^ 1]) + whole[-3:])  # too little to turn it
    with pytest.raises(DamagedIndexError, match="A projection is read as it was written"):
        Projection.load(tmp_path)
    file.write_bytes(whole[:-4])
    with pytest.raises(DamagedIndexError, match="Copy it again from where it is whole"):
        Projection.load(tmp_path)
    file.unlink()
    with pytest.raises(DamagedIndexError, match="no directions beside it"):
        Projection.load(tmp_path)
    for text in ("[]", "{", '{"format": 1}', '{"format": 1, "fingerprint": "../../etc/passwd"}'):
        (tmp_path / "projection.json").write_text(text)
        with pytest.raises(DamagedIndexError, match="Received: "):
            Projection.load(tmp_path)
    (tmp_path / "projection.json").write_text('{"format": 2}')
    with pytest.raises(ManifestError, match="of format 2"):
        Projection.load(tmp_path)


# Files of rows.


def test_a_file_that_was_begun_is_gone_on_with(tmp_path: Path) -> None:
    rows = RNG.normal(size=(20_000, 12))
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    projection = Projection(TURN, (2, 12))
    path = tmp_path / "projected.npy"
    seen: list[int] = []

    def interrupt(done: int, total: int) -> None:
        seen.append(done)
        assert total == 20_000
        if len(seen) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        projection.transform_to_file(mapped, path, progress=interrupt)
    assert not path.exists()
    with pytest.raises(EncoderMismatchError):
        Projection(TURN[::-1], (12,)).transform_to_file(mapped, path)
    with pytest.raises(ValueError, match="Received: "):
        projection.transform_to_file(mapped[::-1], path)
    with pytest.raises(ValueError, match="Received: "):
        projection.transform_to_file(mapped, path, 2)
    projected = projection.transform_to_file(mapped, path, progress=interrupt)
    assert seen == [8192, 16384, 20_000]  # the first window was not computed again
    at_once = projection.transform_to_file(mapped, tmp_path / "at_once.npy")
    np.testing.assert_array_equal(projected, at_once)
    # A product of other rows at once may round its last bit otherwise.
    np.testing.assert_allclose(projected, projection.transform(rows), rtol=1e-5, atol=1e-6)
    with pytest.raises(FileExistsError):
        projection.transform_to_file(mapped, path)


# Indexes.


def test_projected_queries_and_an_unprojected_index_are_refused() -> None:
    projection = Projection(TURN, (4, 12))
    schedule = FunnelSchedule((4, 12), (40,), 5)
    for fingerprint in (None, "5e1f"):
        index = ExactIndex.build(ROWS, schedule, encoder_fingerprint=fingerprint)
        with pytest.raises(
            EncoderMismatchError, match="of embeddings that the same projection made"
        ):
            projection.bind(index)


@pytest.mark.parametrize("other", [Client("localhost:8500"), ROWS, "folder"])
def test_what_is_no_index_is_refused_by_its_name(other: Any) -> None:
    with pytest.raises(TypeError, match=f"in this process. Received: {type(other).__name__}. Open"):
        Projection(TURN, (4, 12)).bind(other)


def test_a_bound_index_takes_embeddings_as_they_are() -> None:
    projection = Projection(TURN, (4, 12))
    schedule = FunnelSchedule((4, 12), (len(ROWS),), 5)
    index = ExactIndex.build(
        projection.transform(ROWS), schedule, encoder_fingerprint=projection.fingerprint
    )
    bound = projection.bind(index)
    exact = ExactIndex.build(ROWS, FunnelSchedule((12,), (), 5)).search(ROWS[:9])
    np.testing.assert_array_equal(bound.search(ROWS[:9]).ids, exact.ids)
    assert set(bound.search(ROWS[:9], 2, among=[3, 5]).ids.ravel()) == {3, 5}
    assert (bound.width, len(bound), bound.metric) == (12, 400, "cosine")
    assert (bound.schedule, bound.encoder_fingerprint) == (schedule, None)


def test_a_client_searches_a_bound_index(
    toys: Mapping[str, Any], manifests: Mapping[str, Manifest]
) -> None:
    server = InMemoryServer(manifests["classifier"], toys["classifier"])
    manifest = manifests["classifier"]
    turn = np.linalg.qr(RNG.normal(size=(manifest.width, manifest.width)))[0]
    rows = RNG.normal(size=(30, 4)).astype(np.float32)
    client = Client(server)
    gallery = client.embed(rows, manifest.width)
    plain = ExactIndex.build(gallery, FunnelSchedule((manifest.width,), (), 3))
    for encoder in (manifest.fingerprint, "another"):
        projection = Projection(turn, (manifest.width,), encoder_fingerprint=encoder)
        index = ExactIndex.build(
            projection.transform(gallery),
            plain.schedule,
            encoder_fingerprint=projection.fingerprint,
        )
        with pytest.raises(EncoderMismatchError):  # embeddings that nobody projects
            client.retrieve(rows[:4], index)
        bound = projection.bind(index)
        if encoder == "another":
            with pytest.raises(EncoderMismatchError):
                client.retrieve(rows[:4], bound)
        else:
            expected = client.retrieve(rows[:4], plain).ids
            np.testing.assert_array_equal(client.retrieve(rows[:4], bound).ids, expected)


def test_the_card_is_json_that_others_read(tmp_path: Path) -> None:
    Projection(TURN[:6], (2, 6), "listwise").save(tmp_path)
    card = json.loads((tmp_path / "projection.json").read_text())
    directions = np.load(next(tmp_path.glob("components-*.npy")))
    assert (card["method"], card["dims"], directions.shape) == ("listwise", [2, 6], (6, 12))
