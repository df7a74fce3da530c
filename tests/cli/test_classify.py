"""`keras-mrl classify`: classes of files, by the model's own policy, another, or one dim."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from keras_mrl_serving import CascadePolicy
from keras_mrl_serving.calls import Arrays
from keras_mrl_serving.calls import Call as WireCall
from keras_mrl_serving.cascade.policy import Stage
from keras_mrl_serving.contract import Manifest
from tests.helpers.cli import GREEN, RED, Call, Ended, lines, paint
from tests.helpers.faulty_server import FaultyServer, rows

Ask = Callable[..., Ended]


def test_a_table_of_classes_by_the_model_s_own_policy(ask: Ask) -> None:
    paint("red.png", RED)
    paint("a green one.PNG", GREEN)
    assert ask("classify", "pixels", "red.png", "a green one.PNG") == (
        0,
        "FILE                ROW  DIM  PROBABILITY  LABEL\n"
        "red.png               0    1       0.9880  red\n"
        "a green one.PNG       0    3       0.9880  grün\n",
        "",
    )


def test_more_than_one_class_has_ranks(ask: Ask) -> None:
    np.save("two.npy", np.array([[0, 50, 0], [0, 50, 100]], np.float32))
    assert ask("classify", "rows", "two.npy", "--top", "2") == (
        0,
        "FILE        ROW  DIM  RANK  PROBABILITY  CLASS\n"
        "two.npy       0    3     1       0.5761  1\n"
        "two.npy       0    3     2       0.2119  0\n"
        "two.npy       1    3     1       0.6652  2\n"
        "two.npy       1    3     2       0.2447  1\n",
        "",
    )


def test_json_lines_of_classes(ask: Ask) -> None:
    paint("red.png", RED)
    status, out, err = ask("classify", "pixels", "red.png", "--dim", "3", "--top=2", "--json")
    assert (status, err) == (0, "")
    (row,) = lines(out)
    assert (row["file"], row["row"], row["dim"]) == ("red.png", 0, 3)
    first, second = row["classes"]
    assert (first["class_id"], first["label"]) == (0, "red")
    assert first["probability"] == row["confidence"] == pytest.approx(0.988, abs=1e-3)
    assert second["probability"] == pytest.approx(0.006, abs=1e-3)


def test_without_a_policy_the_full_dim_is_asked(ask: Ask) -> None:
    np.savez("one.npz", np.array([[0.0, 100, 0]]))
    row = lines(ask("classify", "rows", "one.npz", "--json")[1])[0]
    assert row["dim"] == 3
    assert row["classes"] == [{"class_id": 1, "probability": pytest.approx(0.7870, abs=1e-4)}]


def test_a_policy_of_a_file(ask: Ask) -> None:
    paint("red.png", RED)
    Path("policy.json").write_text(json.dumps(CascadePolicy((Stage(3, None),)).to_json()))
    out = ask("classify", "pixels", "red.png", "--policy", "policy.json", "--json")[1]
    assert lines(out)[0]["dim"] == 3


def test_a_server_may_still_be_the_first_word(call: Call, target: str, folder: Path) -> None:
    del folder
    np.save("x.npy", np.zeros((1, 3), np.float32))
    new = call("classify", "x.npy", "--target", target, "--model", "rows")
    assert new.status == 0
    assert call("classify", target, "x.npy", "--model", "rows") == new


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "Received: neither."),
        (["x.npy"], "Received: x.npy alone."),
        (["--target", "t:1"], "Received: t:1 alone."),
    ],
)
def test_a_server_and_a_file_are_needed(call: Call, words: list[str], text: str) -> None:
    for command in ("classify", "regress", "embed"):
        assert call.refused(command, *words, status=2) == (
            f"A server is asked about files. {text} "
            "Give both, for example --target localhost:8500 photo.jpg."
        )


def test_one_connection_one_description_one_answer(call: Call, folder: Path) -> None:
    del folder
    np.save("x.npy", rows(3))
    peers = set()
    with FaultyServer(before=lambda _, context: peers.add(context.peer())) as server:
        ended = call("classify", "--target", server.target, "x.npy", "--json")
    assert ended.status == 0
    assert [row["row"] for row in lines(ended.out)] == [0, 1, 2]
    assert [request.signature for request in server.requests] == ["describe", "classify_adaptive"]
    assert len(peers) == 1


def test_flags_that_do_not_fit(call: Call) -> None:
    command = call.of("classify", "--target", "t:1", "x.npy")
    assert command.refused("--dim", "1", "--policy", "p", status=2) == (
        "Only one of --dim, --policy can be given. Received: --dim with --policy. Leave out one."
    )
    assert command.refused("--top", "0", status=2) == (
        "--top must be at least 1. Received: 0. Try 3."
    )


def test_of_several_classes_a_row_all_above_a_half_are_printed(ask: Ask) -> None:
    np.save("two.npy", np.array([[100, -100, 20], [-50, -50, -100]], np.float32))
    assert ask("classify", "tags", "two.npy") == (
        0,
        "FILE        ROW  DIM  RANK  PROBABILITY  LABEL\n"
        "two.npy       0    3     1       0.8808  red\n"
        "two.npy       0    3     2       0.5987  blue\n"
        "two.npy       1    3     -            -  -\n",
        "",
    )
    rows = lines(ask("classify", "tags", "two.npy", "--json", "--above", "0.2", "--dim", "1")[1])
    assert [[entry["label"] for entry in row["classes"]] for row in rows] == [
        ["red", "grün", "blue"],
        ["grün", "blue", "red"],
    ]
    rows = lines(ask("classify", "tags", "two.npy", "--json", "--top", "1")[1])
    assert [[entry["label"] for entry in row["classes"]] for row in rows] == [["red"], ["red"]]
    rows = lines(ask("classify", "rows", "two.npy", "--json", "--above", "0.9")[1])
    assert [row["classes"] for row in rows] == [[], []]


def test_classes_of_values_are_refused(ask: Ask) -> None:
    np.save("x.npy", np.zeros((1, 3), np.float32))
    status, out, err = ask("classify", "prices", "x.npy")
    assert (status, out) == (1, "")
    assert "Only a model with classes can classify. Received: a request to classify" in err
    assert err.endswith("values, 2 a row. Ask for them: keras-mrl regress.\n")


@pytest.mark.parametrize("value", ["1.5", "-0.1", "nan", "half"])
def test_above_is_a_probability(call: Call, value: str) -> None:
    text = call.misused("classify", "--target", "t:1", "x.npy", f"--above={value}")
    assert text.endswith(f"must lie in 0..1. Received: {value!r}. Give for example 0.5.")


def of_exits(call: WireCall) -> Arrays:
    """A model whose even rows leave at its early exit; at one exit and dim, it names both."""
    count = len(next(iter(call.inputs.values())))
    if call.signature == "describe":
        return {"manifest": np.array([EXITS.to_json().encode()] * count, object)}
    place = np.arange(count, dtype=np.int32) % 2
    answer: dict[str, Any] = {
        "class_ids": np.full((count, 1), "classify_early_2" == call.signature, np.int64),
        "probabilities": np.ones((count, 1), np.float32),
        "confidence": np.ones(count, np.float32),
    }
    return answer | ({"exit": place, "dim": 2 + 2 * place} if "adaptive" in call.signature else {})


EXITS = Manifest(
    name="deep",
    kind="classifier",
    activation="softmax",
    fingerprint="5e1f",
    dims=(2, 4),
    width=4,
    inputs={"x": {"dtype": "float32", "shape": [None, 4]}},
    made_with={},
    num_classes=2,
    top_k=1,
    exits=({"name": "early", "multiply_adds": 1}, {"name": "last", "multiply_adds": 4}),
    exit_cascade=CascadePolicy((Stage(2, 0.5, exit="early"), Stage(4, None))).to_json(),
)


def test_exits_are_shown_and_asked(call: Call, folder: Path) -> None:
    del folder
    np.save("rows.npy", rows(2))
    with FaultyServer({1: of_exits}) as server:
        ask = call.of("classify", "--target", server.target, "rows.npy")
        assert ask() == (
            0,
            "FILE         ROW  EXIT   DIM  PROBABILITY  CLASS\n"
            "rows.npy       0  early    2       1.0000  0\n"
            "rows.npy       1  last     4       1.0000  0\n",
            "",
        )
        first, second = lines(ask("--json")[1])
        assert (first["exit"], first["relative_cost"]) == ("early", 0.25)
        assert (second["exit"], second["relative_cost"]) == ("last", 1.0)
        early = lines(ask("--dim=2", "--exit=early", "--json")[1])
        assert [row["classes"][0]["class_id"] for row in early] == [1, 1]
        assert ask.refused("--exit=early") == (
            "An exit is asked at one dim. Received: --exit early without --dim. Add --dim 4, or "
            "leave --exit out."
        )
        assert "Choose one of early, last." in ask.refused("--dim=2", "--exit=late")
