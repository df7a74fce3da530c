"""Models with exits: the graph routes each row as the policy does in NumPy, on every backend."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl_export import export_saved_model
from keras_mrl_serving._session import SavedModelSession
from keras_mrl_serving.cascade.policy import CascadePolicy
from keras_mrl_serving.contract import Manifest
from tests.helpers import exit_models as models
from tests.helpers.exit_models import DIMS, ROWS, Array, Arrays, Key
from tests.helpers.export_models import (
    assert_equal_rows,
    probabilities,
    read_manifest,
    warmup_records,
    written_signatures,
)

backend = pytest.mark.backend

SAMPLED = 16  # the export sees the first rows alone
ALL, NOBODY = -1.0, 1.0  # every margin is above the one, none above the other


@dataclass(frozen=True, eq=False)
class Version:
    """A published version of a model with exits, and what its policy looks up."""

    model: Any
    rows: Any
    logits: dict[Key, Array]
    policy: CascadePolicy
    path: Path
    manifest: Manifest
    session: SavedModelSession

    def ask(self, signature: str, part: Any = slice(None)) -> Arrays:
        rows = self.rows if isinstance(self.rows, dict) else {"x": self.rows}
        names = self.manifest.inputs
        return self.session.run(
            signature, {name: own[part] for name, own in zip(names, rows.values(), strict=True)}
        )

    def expected(self, part: Any = slice(None)) -> Arrays:
        """What `classify_adaptive` answers, as NumPy says."""
        logits = {key: own[part] for key, own in self.logits.items()}
        _, stage_of = self.policy.route(logits)
        keys = self.policy.keys
        rows = np.arange(len(stage_of))
        stacked = np.stack([logits[key] for key in keys])[stage_of, rows]
        temperatures = np.array([own.temperature for own in self.policy.stages])[stage_of]
        shares = probabilities(stacked / temperatures[:, None], 1.0)
        ids = np.argsort(-shares, axis=-1, kind="stable")
        best = np.take_along_axis(shares, ids, axis=-1)
        places = [self.manifest.exit_names.index(exit or "last") for exit, _ in keys]
        return {
            "class_ids": ids,
            "probabilities": best,
            "confidence": best[:, 0] - best[:, 1],
            "dim": np.array([dim for _, dim in keys])[stage_of],
            "exit": np.array(places)[stage_of],
            "model_id": np.full(len(rows), self.manifest.model_id),
        }


@contextmanager
def version_of(
    model: Any, rows: Any, base_path: Path, policy: CascadePolicy, **arguments: Any
) -> Iterator[Version]:
    sample = {k: own[:SAMPLED] for k, own in rows.items()} if isinstance(rows, dict) else None
    path = export_saved_model(
        model, base_path, rows[:SAMPLED] if sample is None else sample, policy=policy, **arguments
    )
    with SavedModelSession(path) as session:
        logits = models.all_logits(model, rows)
        yield Version(model, rows, logits, policy, path, read_manifest(path), session)


STAGES: dict[str, list[Key]] = {
    "images": [("thumbnail", 2), ("block1_norm", 2), ("block1_norm", 8), (None, 8)],
    "texts": [("embeddings_dropout", 8), ("transformer_layer_0", 8), (None, 8)],
}
MADE: dict[str, tuple[Callable[[], Any], Any]] = {
    "images": (models.images, models.IMAGES),
    "texts": (models.texts, models.TEXTS),
}


@pytest.fixture(scope="module", params=MADE)
def version(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Version]:
    make, rows = MADE[request.param]
    model = make()
    policy = models.halving(models.all_logits(model, rows), STAGES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    with version_of(model, rows, folder, policy, top_k=models.NUM_CLASSES) as exported:
        yield exported


def assert_answers(answer: Arrays, expected: Arrays) -> None:
    assert set(answer) == set(expected)
    integers = {"class_ids": np.int64, "dim": np.int32, "exit": np.int32, "model_id": np.int32}
    for name, array in answer.items():
        assert array.dtype == integers.get(name, np.float32), name
        if name == "confidence":  # a difference of two probabilities
            np.testing.assert_allclose(array, expected[name], atol=1e-5)
        else:
            assert_equal_rows(array, expected[name])


@backend
def test_every_row_leaves_where_the_policy_lets_it(version: Version) -> None:
    assert_answers(version.ask("classify_adaptive"), version.expected())
    _, stage_of = version.policy.route(version.logits)
    assert (np.bincount(stage_of, minlength=len(version.policy.stages)) > 10).all()


@backend
def test_many_rows_at_once_are_as_many_single_rows(version: Version) -> None:
    together = version.ask("classify_adaptive")
    alone = [version.ask("classify_adaptive", slice(row, row + 1)) for row in range(ROWS)]
    backwards = version.ask("classify_adaptive", slice(None, None, -1))
    for name, array in together.items():
        single = np.concatenate([answer[name] for answer in alone])
        for others in (single, backwards[name][::-1]):
            if name == "confidence":
                np.testing.assert_allclose(others, array, atol=1e-5)
            else:
                assert_equal_rows(others, array)


@backend
def test_no_rows_have_no_answers(version: Version) -> None:
    for name in written_signatures(version.session) - {"describe"}:
        if not name.startswith("head_"):
            answer = version.ask(name, slice(0, 0))
            widths = {output: array.shape[1:] for output, array in version.ask(name).items()}
            assert {o: array.shape for o, array in answer.items()} == {
                output: (0, *width) for output, width in widths.items()
            }


@backend
def test_the_manifest_lists_the_exits(version: Version) -> None:
    manifest, model = version.manifest, version.model
    assert manifest.exits is not None
    assert manifest.exit_names == (*model.exits, "last")
    for own in manifest.exits[:-1]:
        assert own["layer"] == (None if own["name"] == "thumbnail" else own["name"])
    dim = DIMS[-1]
    if "thumbnail" in model.exits:
        cut = {name: model.at(dim, exit=name).count_params() for name in model.exits}
        assert {own["name"]: own["parameters"] for own in manifest.exits[:-1]} == cut
    work = [own["multiply_adds"] for own in manifest.exits]
    assert work == sorted(work)
    assert 0 < work[0] < work[-1]
    assert manifest.cascade is None
    assert manifest.exit_cascade is not None
    assert CascadePolicy.from_json(manifest.exit_cascade) == version.policy
    costs = [own["relative_cost"] for own in manifest.exit_cascade["exit_stages"]]
    assert costs == sorted(costs)
    assert 0 < costs[0] < 1 < costs[-1] < 2
    assert manifest.made_with["trained_on"] == keras.backend.backend()


@backend
def test_a_server_is_warm_down_to_the_last_exit(version: Version) -> None:
    [rows] = [own for name, own in warmup_records(version.path) if name == "classify_adaptive"]
    answer = version.session.run("classify_adaptive", rows)
    assert answer["exit"].tolist() == [len(version.manifest.exit_names) - 1]
