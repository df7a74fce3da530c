"""The parts of the benchmark of exits on texts, on generated texts; its page, on its numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers.vision_backbones import imported

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = (ROOT / "docs/benchmarks" / name for name in ("exits.md", "exits.json"))
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "pay", "bill", "##s", "play", "song", "call", "home"]
RANDOM = np.random.default_rng(0)
LABELS = np.arange(60) % 3
# A row of class c holds the tokens 4 + c, 7 + c and any others.
ROWS = [
    np.array([2, 4 + label, *RANDOM.integers(4, 11, size), 7 + label, 3], np.int32)
    for label, size in zip(LABELS, RANDOM.integers(0, 5, 60), strict=True)
]


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def encoder() -> Any:
    from exits_texts import frozen

    backbone = imported("keras_hub").models.BertBackbone(
        vocabulary_size=len(WORDS),
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=8,
        max_sequence_length=16,
    )
    return frozen(backbone)


def test_the_classifier_over_ngrams_is_the_machine_that_was_learned() -> None:
    from exits_front import Ngrams
    from exits_texts import padded

    ngrams = Ngrams.learn(ROWS, LABELS, WORDS)
    features = np.asarray(ngrams.model(8).predict(padded(ROWS), verbose=0))
    scores = features @ ngrams.kernel(8)
    assert np.mean(scores.argmax(axis=-1) == LABELS) > 0.95
    for i in (0, 7):  # by hand, and without padding
        ids = ROWS[i]
        pairs = (ids * 7919 + np.append(ids[1:], 0) * 31) % len(ngrams.pairs)
        total = ngrams.tokens[ids].sum(axis=0) + ngrams.pairs[pairs].sum(axis=0)
        expected = total[:-1] / np.sqrt(total[-1]) + ngrams.bias
        np.testing.assert_allclose(scores[i], expected, rtol=1e-4, atol=1e-5)


def test_the_net_that_is_served_is_the_one_that_was_trained_on_means() -> None:
    from exits_front import Ngrams
    from exits_texts import Intents, means_of_layers, padded

    body = encoder()
    layers = ("embeddings_dropout", "transformer_layer_0")
    net = Intents(body, Ngrams.learn(ROWS, LABELS, WORDS), layers, layers, 3)
    features = means_of_layers(body, ROWS, layers)
    net.fit(features, LABELS, epochs=1, seed=0)
    trained = net.logits(features, ROWS)
    served = net.served.all_exits().predict(padded(ROWS), verbose=0)
    assert list(trained) == list(served) == ["ngrams", *layers, "last"]
    for name, logits in served.items():
        np.testing.assert_allclose(logits, trained[name], rtol=1e-4, atol=1e-5)


def test_three_lengths_tell_the_work_of_all() -> None:
    from exits_front import Ngrams
    from exits_judge import Work
    from exits_texts import Intents, padded

    from keras_mrl import measure_costs

    layers = ("transformer_layer_0",)
    net = Intents(encoder(), Ngrams.learn(ROWS, LABELS, WORDS), layers, layers, 3)
    stages = [("ngrams", 256), ("transformer_layer_0", 256), (None, 256)]
    lengths = np.array([5, 16])
    work = Work(net.served, (4, 8, 12)).of(stages, lengths)
    for length, costs in zip(lengths, work.T, strict=True):
        sample = padded([np.ones(length, np.int32)])
        np.testing.assert_allclose(costs, measure_costs(net.served, (), sample).of(stages))


def test_a_policy_is_judged_on_rows_that_did_not_choose_it() -> None:
    from exits_front import Ngrams
    from exits_judge import Part, Work, aims
    from exits_texts import Intents

    net = Intents(encoder(), Ngrams.learn(ROWS, LABELS, WORDS), ("transformer_layer_0",), (), 3)
    work = Work(net.served, (4, 8, 12))
    whole = np.eye(3, dtype=np.float32)[LABELS] * 9
    early = whole.copy()
    half = np.random.default_rng(0).permutation(60)[:30]  # the first half is drawn so
    early[half] = np.roll(early[half], 1, axis=-1)
    stages: Any = {("ngrams", 256): early, (None, 256): whole}
    val = Part(stages, LABELS, np.full(60, 8))
    share = work.of([("ngrams", 256), (None, 256)], 8)
    for aim in aims([val, val], ("ngrams",), work, (0.0, 0.001)):
        # That half asks the whole encoder, and the other, where n-grams are always right, does not.
        assert aim.loss == 0.5
        assert aim.error == pytest.approx(0.5 / 60**0.5)
        assert aim.work == pytest.approx((1 + share[0] / share[1]) / 2, rel=0.01)
        assert aim.most_lost(0.05) == pytest.approx(0.5 + 1.645 * aim.error, rel=1e-3)


def test_a_policy_may_have_to_gain() -> None:
    from exits_judge import cheapest

    from keras_mrl_serving import search_cascades

    # Two rows that the last stage has wrong, the earlier one right, and is less sure of than of
    # the rows that it has wrong.
    labels = np.zeros(100, int)
    last, early = (np.tile(np.array([4, 0], np.float32), (100, 1)) for _ in range(2))
    last[:2] = early[2:10] = [0, 4]
    early[:2] = [9, 0]
    early[10:40] = [8, 0]
    found = search_cascades({("e", 8): early, (None, 8): last}, labels, costs=[1.0, 4.0])
    policies = [cheapest(found, loss) for loss in (0.08, 0.0, -0.02)]
    accuracy = [policy.holdout.accuracy for policy in policies if policy.holdout]
    assert accuracy[0] < accuracy[1] == accuracy[2] == 1.0
    assert cheapest(found, -0.5) == found.policies[-1]


def test_a_rival_is_compared_at_equal_accuracy() -> None:
    from exits_rivals import Curve, cost_at_equal_accuracy

    labels = np.zeros(400, int)
    sure = np.tile([4.0, 0.0], (400, 1))
    first = np.where(np.arange(400)[:, None] < 300, sure, [[0.0, 0.1]])  # right in 300 of 400
    rival = Curve.two_stages(first, sure, labels, np.full(400, 0.1), np.ones(400))
    costs, accuracy = np.transpose(rival.points())
    assert costs[0] == pytest.approx(0.1)
    assert accuracy[0] == pytest.approx(0.75)
    assert (costs[-1], accuracy[-1]) == (pytest.approx(0.35, abs=0.01), 1.0)
    own = Curve(np.ones((1, 400), bool), np.full((1, 400), 0.175))
    bad = Curve(np.zeros((1, 400), bool), np.full((1, 400), 0.01))
    results = cost_at_equal_accuracy(own, {"rival": rival, "bad": bad}, draws=50)
    assert results["rival"]["share"] == pytest.approx(0.5, abs=0.02)
    assert results["rival"]["low"] < results["rival"]["share"] < results["rival"]["high"]
    assert results["bad"] == {"share": None, "low": 0.0, "high": 0.0, "as_accurate_in": 0.0}


def test_the_page_says_what_the_results_say() -> None:
    from exits import promises_table, table
    from exits_index import index_table
    from exits_judge import summary

    results, page = json.loads(RESULTS.read_text()), PAGE.read_text().splitlines()
    assert summary(results["by_seed"]) == results["summary"]
    tables = (
        *table(results),
        *promises_table(results["promises"]),
        *index_table(results["one_index"]),
    )
    assert [line for line in tables if line not in page] == []
    for own in results["one_index"]["exits"].values():  # a server answers as the rule says
        assert own["served"] == {name: own["by_intents"][name] for name in ("stops", "right")}
    chosen = json.loads((PAGE.parent / "exits_configuration.json").read_text())
    assert results["configuration"] == chosen


KEYS = {
    *("full_accuracy", "adaptive_accuracy", "relative_flops", "certified_accuracy"),
    *("certified_relative_flops", "harm", "fixed_exits", "embedding_exit", "two_model_cascade"),
    *("dims_only_relative_flops", "oracle_relative_flops", "oos_relative_flops"),
    *("cpu_share_batch1", "cpu_share_batch8", "cpu_share_batch32"),
    *("wall_share_batch1", "overhead_no_exit"),
}


def run(*arguments: object) -> list[str]:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "exits.py", *map(str, arguments)],
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def small_encoder(folder: Path) -> Path:
    """A BERT that was never trained, as keras-hub keeps it, with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    encoder().backbone.save_to_preset(str(folder))
    words = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.soak
@pytest.mark.skipif("not os.environ.get('KERAS_MRL_SOAK')", reason="two runs and a server")
def test_the_benchmark_runs_whole_on_a_small_net(tmp_path: Path) -> None:
    def texts(size: int) -> list[list[str]]:
        rows = []
        for label in RANDOM.integers(0, 3, size):
            words = [WORDS[4 + label], *RANDOM.choice(WORDS[4:], 3), WORDS[7 + label]]
            rows.append([" ".join(words), f"intent {label}"])
        return rows

    sizes = {"train": 300, "val": 700, "test": 100, "oos_test": 20}
    data = tmp_path / "data.json"
    data.write_text(json.dumps({name: texts(size) for name, size in sizes.items()}))
    out = tmp_path / "out"
    common = ("--encoder", small_encoder(tmp_path / "encoder"), "--data", data, "--out", out)
    run(*common, "--choose", "--epochs", 1, "--seeds", 1)
    chosen = ("--configuration", out / "configuration.json")
    last = run(*common, *chosen, "--seeds", 1, "--laps", 1, "--rows-per-lap", 1024)[-1]
    assert json.loads(last).keys() >= KEYS
    few = (*common, *chosen, "--seeds", 1, "--laps", 1, "--rows-per-lap", 256)
    assert json.loads(run(*few, "--only", "overhead")[-1])["overhead_no_exit"] > 0
    exits = json.loads(run(*few, "--only", "one_index")[-1])["exits"]
    assert {*exits} == {"embeddings_dropout", "transformer_layer_0"}
    for own in exits.values():
        assert own["served"] == {name: own["by_intents"][name] for name in ("stops", "right")}
    assert (out / "exits.svg").exists()


@pytest.mark.soak
@pytest.mark.skipif(
    "not os.environ.get('KERAS_MRL_MINILM') or not os.environ.get('KERAS_MRL_CLINC150')",
    reason="needs the folder of all-MiniLM-L6-v2 and the file of CLINC150",
)
def test_the_numbers_of_the_page_come_again(tmp_path: Path) -> None:
    given = (
        "--encoder",
        os.environ["KERAS_MRL_MINILM"],
        "--data",
        os.environ["KERAS_MRL_CLINC150"],
    )
    last = json.loads(run(*given, "--out", tmp_path, "--seeds", 1, "--laps", 0)[-1])
    expected = json.loads(RESULTS.read_text())["summary"]
    for name in ("full_accuracy", "adaptive_accuracy", "certified_accuracy"):
        assert last[name] == pytest.approx(expected[name], abs=0.005)
    for name in ("relative_flops", "certified_relative_flops"):
        assert last[name] == pytest.approx(expected[name], abs=0.05)
