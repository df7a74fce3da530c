"""Scores of a text at every dim, and the policy of least expected dim learned of them."""

from typing import Any

import numpy as np
import pytest

from keras_mrl.evaluation import TokenScores, learn_decoding_policy, score_tokens
from keras_mrl_serving import CascadePolicy, Stage
from tests.helpers.language_models import DIMS, LENGTH, NEXT, READ, language_model, randomised
from tests.helpers.laws import exactly
from tests.helpers.small_models import as_numpy


@pytest.fixture(scope="module")
def model() -> Any:
    return randomised(language_model(tied=True))


def rows(scores: TokenScores) -> np.ndarray:
    return np.concatenate([scores.losses, scores.confidences, scores.right], axis=1)


def text(tokens: int = 4000) -> TokenScores:
    """Three dims, each better than the last; confidence says how much is lost by stopping."""
    random = np.random.default_rng(0)
    easy = random.uniform(size=(tokens, 1))
    losses = 1 - easy + np.array([2.0, 1.0, 0.0]) * (1 - easy) * random.uniform(size=(tokens, 3))
    confidences = np.clip(easy + random.normal(0, 0.1, size=(tokens, 3)), 0.01, 0.99)
    right = random.uniform(size=(tokens, 3)) < easy
    return TokenScores(DIMS, losses.astype("float32"), confidences.astype("float32"), right)


@pytest.mark.backend
def test_scores_are_those_of_all_logits_at_once(model: Any) -> None:
    logits = as_numpy(model(READ)).astype("float64").reshape(-1, 3, 11)
    log = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    truth = NEXT.reshape(-1)
    scores = score_tokens(model, READ, NEXT)
    assert len(scores) == READ.size
    assert scores.dims == DIMS
    of_label = log[np.arange(len(truth)), :, truth]
    np.testing.assert_allclose(scores.losses, -of_label, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(scores.confidences, np.exp(log.max(axis=-1)), rtol=1e-4)
    np.testing.assert_array_equal(scores.right, logits.argmax(axis=-1) == truth[:, None])
    for index, dim in enumerate(DIMS):
        expected = np.exp(-of_label[:, index].mean())
        assert scores.perplexity()[dim] == pytest.approx(expected, rel=1e-4)


@pytest.mark.backend
@pytest.mark.parametrize(("batch_size", "chunk"), [(5, 7), (100, 1000)])
def test_parts_do_not_change_the_scores(model: Any, batch_size: int, chunk: int) -> None:
    whole = score_tokens(model, READ[:6], NEXT[:6])
    parts = score_tokens(model, READ[:6], NEXT[:6], batch_size=batch_size, chunk=chunk)
    np.testing.assert_allclose(rows(parts), rows(whole), rtol=1e-4, atol=1e-5)


@pytest.mark.backend
def test_no_more_than_a_chunk_of_logits_is_held(model: Any, monkeypatch: Any) -> None:
    seen = []
    logits_at = type(model.head).logits_at

    def watched(head: Any, prefix: Any, dim: int) -> Any:
        seen.append(prefix.shape[0])
        return logits_at(head, prefix, dim)

    monkeypatch.setattr(type(model.head), "logits_at", watched)
    score_tokens(model, READ, NEXT, chunk=10)
    assert seen == [10] * -(-READ.size // 10) * len(DIMS)


@pytest.mark.backend
def test_ignored_labels_are_left_out(model: Any) -> None:
    labels = NEXT.copy()
    labels[0], labels[1:, 4:] = -1, -1
    kept = score_tokens(model, READ, labels, ignore_class=-1)
    expected = score_tokens(model, READ[1:, :4], NEXT[1:, :4])
    np.testing.assert_allclose(rows(kept), rows(expected), rtol=1e-3, atol=1e-4)


def test_the_adaptive_perplexity_is_that_of_the_dims_stopped_at() -> None:
    scores = text()
    policy = CascadePolicy((Stage(2, 0.8), Stage(8, None)))  # a policy may leave dims out
    first = scores.confidences[:, 0] > np.float32(0.8)
    losses = np.where(first, scores.losses[:, 0], scores.losses[:, 2]).astype("float64")
    assert scores.adaptive_perplexity(policy) == pytest.approx(np.exp(losses.mean()))
    report = scores.evaluate(policy)
    assert report.exit_fractions == pytest.approx((first.mean(), 1 - first.mean()))
    assert report.expected_dim == pytest.approx(2 * first.mean() + 8 * (1 - first.mean()))
    assert report.cumulative_dim == pytest.approx(2 * first.mean() + 10 * (1 - first.mean()))
    assert report.full_accuracy == pytest.approx(scores.right[:, 2].mean())
    right = np.where(first, scores.right[:, 0], scores.right[:, 2])
    assert report.accuracy == pytest.approx(right.mean())
    assert report.size == 4000


@pytest.mark.backend
def test_it_stops_where_the_policy_routes_the_logits(model: Any) -> None:
    policy = CascadePolicy((Stage(2, 0.4), Stage(4, 0.5), Stage(8, None)))
    logits = as_numpy(model(READ)).reshape(-1, 3, 11)
    scores = score_tokens(model, READ, NEXT)
    expected = policy.evaluate(logits, NEXT.reshape(-1))
    received = scores.evaluate(policy)
    assert received.exit_fractions == pytest.approx(expected.exit_fractions)
    assert received.accuracy == pytest.approx(expected.accuracy)


@pytest.mark.parametrize("budget", [0.0, 0.02, 0.2])
def test_a_policy_keeps_its_budget_and_spends_it(budget: float) -> None:
    scores = text()
    policy = learn_decoding_policy(scores, budget)
    full = scores.perplexity()[8]
    excess = scores.adaptive_perplexity(policy) / full - 1
    assert excess <= budget + 1e-9
    assert excess >= budget - 0.01
    assert policy.holdout == scores.evaluate(policy)
    assert policy.dims == DIMS


def test_a_larger_budget_buys_a_smaller_dim() -> None:
    scores = text()
    expected = [
        learn_decoding_policy(scores, budget).holdout.expected_dim  # type: ignore[union-attr]
        for budget in (0.0, 0.01, 0.1, 1.0, 100.0)
    ]
    assert expected == sorted(expected, reverse=True)
    assert expected[-1] == DIMS[0]
    assert expected[0] > 6


def test_a_policy_is_no_worse_than_one_threshold_for_all_dims() -> None:
    scores = text()
    learned = learn_decoding_policy(scores, 0.05).holdout
    limit = scores.perplexity()[8] * 1.05
    plain = [
        CascadePolicy((Stage(2, t), Stage(4, t), Stage(8, None))) for t in np.linspace(0, 1, 101)
    ]
    allowed = [p for p in plain if scores.adaptive_perplexity(p) <= limit]
    assert learned is not None
    # A price reaches the convex hull of what thresholds can do, hence one percent.
    assert learned.expected_dim <= 1.01 * min(scores.evaluate(p).expected_dim for p in allowed)


def test_equal_confidences_stay_together() -> None:
    """Half of the tokens look alike: no threshold parts them, and the budget is kept."""
    scores = text(400)
    tied = TokenScores(
        DIMS, scores.losses, np.round(scores.confidences * 4).astype("float32") / 5, scores.right
    )
    policy = learn_decoding_policy(tied, 0.02)
    assert tied.adaptive_perplexity(policy) <= tied.perplexity()[8] * 1.02


def test_what_is_no_policy_of_these_scores_is_refused() -> None:
    for stage in (Stage(3, None), Stage(8, None, 0.5)):
        sentence = (
            "A policy for these scores asks scored dims, at temperature 1. "
            f"Received: {(Stage(stage.dim, None, stage.temperature),)} for dims=(2, 4, 8). "
            "Learn one of the scores: learn_decoding_policy(scores)."
        )
        with pytest.raises(ValueError, match=exactly(sentence)):
            text(10).evaluate(CascadePolicy((stage,)))


def test_a_budget_is_no_less_than_nothing() -> None:
    sentence = (
        "budget must be a share of at least 0. Received: budget=-0.1. "
        "Give 0.02 for 2% above the last dim's perplexity."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        learn_decoding_policy(text(10), -0.1)


@pytest.mark.parametrize(
    ("labels", "ignored", "received"),
    [
        (NEXT[:, 1:], None, "labels of shape (12, 5), 60 that count"),
        (np.zeros_like(NEXT), 0, "labels of shape (12, 6), 0 that count"),
    ],
)
def test_a_text_that_cannot_be_scored(
    model: Any, labels: Any, ignored: int | None, received: str
) -> None:
    sentence = (
        "A text is scored by a model with a MatryoshkaHead, on tokens (rows, time) and the "
        "labels of each, not all ignored. "
        f"Received: MatryoshkaClassifier {model.name!r}, tokens of shape {(12, LENGTH)}, "
        f"{received}. Write score_tokens(model, ids[:, :-1], ids[:, 1:])."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        score_tokens(model, READ, labels, ignored)


@pytest.mark.parametrize(
    ("labels", "ignored", "wrong", "count", "left"),
    [
        (np.full_like(NEXT, -1), None, -1, 72, 72),
        (np.where(np.arange(LENGTH) == 1, 11, NEXT), None, 11, 12, 72),
        (np.where(np.arange(LENGTH) < 2, [-100, -1, 0, 0, 0, 0], NEXT), -1, -100, 12, 60),
    ],
)
def test_labels_that_name_no_token_are_refused(
    model: Any, labels: Any, ignored: int | None, wrong: int, count: int, left: int
) -> None:
    sentence = (
        f"Labels must name a token of the head's 11. Received: {wrong} in {count} of {left}. "
        f"Give ignore_class={wrong} if it stands for padding."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        score_tokens(model, READ, labels, ignored)


@pytest.mark.parametrize(("batch_size", "chunk"), [(0, 7), (5, 0), (-1, -1)])
def test_parts_hold_something(model: Any, batch_size: int, chunk: int) -> None:
    sentence = (
        "batch_size and chunk must be at least 1. "
        f"Received: batch_size={batch_size}, chunk={chunk}. "
        "Give the rows and the positions that fit in memory at once."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        score_tokens(model, READ, NEXT, batch_size=batch_size, chunk=chunk)


def test_scores_print_no_arrays() -> None:
    assert repr(text(10)) == "TokenScores(dims=(2, 4, 8))"
