"""A causal Transformer under a nested head, its next token, and the best tokens by a funnel."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from keras_mrl import (
    MatryoshkaClassifier,
    MatryoshkaHead,
    MatryoshkaLoss,
    causal_transformer,
    funnel_top_k,
    next_token,
)
from keras_mrl_serving import ExactIndex, FunnelSchedule
from tests.helpers import small_models as small
from tests.helpers.language_models import (
    DIMS,
    LENGTH,
    NEXT,
    READ,
    TOKENS,
    WIDTH,
    embedding,
    language_model,
    perplexity_by_dim,
    randomised,
)
from tests.helpers.laws import exactly
from tests.helpers.small_models import X, as_numpy, compiled, cross_entropy

pytestmark = pytest.mark.backend

either = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def test_a_later_token_never_changes_earlier_features() -> None:
    backbone = randomised(language_model()).backbone
    features = as_numpy(backbone(READ))
    assert features.shape == (len(READ), LENGTH, WIDTH)
    for position in range(1, LENGTH):
        changed = READ.copy()
        changed[:, position:] = (changed[:, position:] + 1) % TOKENS
        seen = as_numpy(backbone(changed))
        np.testing.assert_allclose(seen[:, :position], features[:, :position], atol=1e-5)
        assert (np.abs(seen[:, position:] - features[:, position:]).max(axis=(1, 2)) > 1e-3).all()


def test_features_see_every_token_up_to_theirs() -> None:
    backbone = randomised(language_model()).backbone
    last = as_numpy(backbone(READ))[:, -1]
    for position in range(LENGTH):
        changed = READ.copy()
        changed[:, position] = (changed[:, position] + 1) % TOKENS
        assert (np.abs(as_numpy(backbone(changed))[:, -1] - last).max(axis=1) > 1e-4).all()


def test_positions_are_told_apart() -> None:
    features = as_numpy(randomised(language_model()).backbone(np.ones_like(READ)))[0]
    for position in range(1, LENGTH):
        assert np.abs(features[position] - features[position - 1]).max() > 1e-3


def test_what_fills_a_row_up_changes_nothing_before_it() -> None:
    model = randomised(language_model())
    short = as_numpy(model(READ[:, :4]))
    filled = np.where(np.arange(LENGTH) < 4, READ, 0)
    np.testing.assert_allclose(as_numpy(model(filled))[:, :4], short, rtol=1e-4, atol=1e-5)


def test_ignored_labels_cost_and_teach_nothing() -> None:
    """A step on rows filled up, their labels ignored, is the step on the rows alone."""
    scores, weights = [], []
    for length in (4, LENGTH):
        model = compiled(
            language_model(tied=True),
            loss=MatryoshkaLoss(cross_entropy(ignore_class=-1)),
            metrics=[perplexity_by_dim(ignore_class=-1)],
        )
        randomised(model)
        within = np.arange(length) < 4
        read, labels = np.where(within, READ[:, :length], 0), np.where(within, NEXT[:, :length], -1)
        log = model.fit(read, labels, batch_size=len(READ), verbose=0).history
        scores.append([log[name][0] for name in ("loss", *(f"perplexity_{dim}" for dim in DIMS))])
        weights.append([as_numpy(weight) for weight in model.trainable_weights])
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-5)
    for alone, filled in zip(*weights, strict=True):
        np.testing.assert_allclose(filled, alone, rtol=1e-4, atol=1e-5)


def test_a_tied_head_is_the_embedding_transposed() -> None:
    model = randomised(language_model(tied=True))
    table = as_numpy(model.backbone.get_layer("tokens_embedding").embeddings)
    features = as_numpy(model.backbone(READ)).astype("float64")
    bias = as_numpy(model.head.weights[0])
    assert bias.shape == (TOKENS,)
    logits = as_numpy(model(READ))
    for index, dim in enumerate(DIMS):
        kernel, own = model.head.weights_at(dim)
        np.testing.assert_array_equal(as_numpy(kernel), table[:, :dim].T)
        np.testing.assert_array_equal(as_numpy(own), bias)
        expected = features[..., :dim] @ table[:, :dim].T + bias
        np.testing.assert_allclose(logits[:, :, index], expected, rtol=1e-4, atol=1e-4)


def test_tying_spares_every_kernel() -> None:
    counts = [randomised(language_model(tied)).count_params() for tied in (False, True)]
    assert counts[0] - counts[1] == TOKENS * (sum(DIMS) + len(DIMS) - 1)


def test_a_table_wider_than_the_dims_is_read_by_its_first_columns() -> None:
    table = embedding(tokens=TOKENS, width=12)
    head = MatryoshkaHead(TOKENS, (2, 8), tied=True, embedding=table, use_bias=False)
    features = np.random.default_rng(0).normal(size=(3, 12)).astype("float32")
    expected = features[:, :8] @ as_numpy(table.embeddings)[:, :8].T
    np.testing.assert_allclose(as_numpy(head(features))[:, 1], expected, rtol=1e-4, atol=1e-5)


def is_shared(model: Any) -> bool:
    return model.head.embedding is model.backbone.get_layer("tokens_embedding")


def test_the_two_ends_share_one_variable_after_loading(tmp_path: Path) -> None:
    model = compiled(randomised(language_model(tied=True)))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert is_shared(loaded)
    assert len(loaded.weights) == len(model.weights)
    loaded.backbone.get_layer("tokens_embedding").embeddings.assign(np.zeros((TOKENS, WIDTH)))
    assert as_numpy(loaded.head.weights_at(8)[0]).max() == 0
    before = as_numpy(model(READ))
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(as_numpy(loaded(READ)), before, rtol=1e-6)
    loaded.fit(READ, NEXT, verbose=0)
    moved = as_numpy(loaded.backbone.get_layer("tokens_embedding").embeddings)
    np.testing.assert_array_equal(as_numpy(loaded.head.weights_at(8)[0]), moved.T)
    assert (moved != as_numpy(model.backbone.get_layer("tokens_embedding").embeddings)).any()


def test_the_two_ends_are_one_in_a_functional_model_and_in_a_model_made_of_its_config(
    tmp_path: Path,
) -> None:
    model = randomised(language_model(tied=True))
    functional = keras.Model(model.backbone.input, model.head(model.backbone.output))
    functional.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.layers[-1].embedding is loaded.get_layer("tokens_embedding")
    np.testing.assert_allclose(as_numpy(loaded(READ)), as_numpy(model(READ)), rtol=1e-6)
    assert is_shared(MatryoshkaClassifier.from_config(model.get_config()))
    assert is_shared(keras.models.clone_model(model))


def test_a_cut_language_model_is_a_model_of_one_dim(tmp_path: Path) -> None:
    model = randomised(language_model(tied=True))
    plain = model.at(4)
    expected = as_numpy(model(READ))[:, :, 1]
    np.testing.assert_allclose(as_numpy(plain(READ)), expected, rtol=1e-4, atol=1e-5)
    plain.save(tmp_path / "small.keras")
    loaded = keras.saving.load_model(tmp_path / "small.keras")
    np.testing.assert_allclose(as_numpy(loaded(READ)), expected, rtol=1e-4, atol=1e-5)


@either
def test_the_next_token_is_that_of_the_last_position(tied: bool, tmp_path: Path) -> None:
    model = randomised(language_model(tied))
    view = next_token(model)
    expected = as_numpy(model(READ))[:, -1]
    np.testing.assert_allclose(as_numpy(view(READ)), expected, rtol=1e-5)
    assert view.head is model.head
    assert view.backbone.input.name == "tokens"
    assert len(view.weights) == len(model.weights)
    view.save(tmp_path / "view.keras")
    loaded = keras.saving.load_model(tmp_path / "view.keras")
    np.testing.assert_allclose(as_numpy(loaded(READ)), expected, rtol=1e-5)
    assert not tied or is_shared(loaded)


def test_padding_at_the_end_of_a_row_is_passed_over() -> None:
    model = randomised(language_model())
    rows, lengths = np.maximum(READ, 1), np.array([1, 4, LENGTH, 0] * 3)
    padded = np.where(np.arange(LENGTH) < lengths[:, None], rows, 0)
    answered = as_numpy(next_token(model, padding=0)(padded))
    for length in (1, 4, LENGTH):
        alone = as_numpy(model(rows[:, :length]))[:, -1]
        of_length = lengths == length
        np.testing.assert_allclose(answered[of_length], alone[of_length], rtol=1e-4, atol=1e-5)
    empty, first = lengths == 0, as_numpy(model(padded))[:, 0]
    np.testing.assert_allclose(answered[empty], first[empty], rtol=1e-4, atol=1e-5)


def test_a_model_without_positions_has_no_next_token() -> None:
    model = MatryoshkaClassifier(small.backbone(), MatryoshkaHead(3, (2, 8)), name="digits")
    model(X)
    sentence = (
        "A language model makes features (batch, time, width) and ends in a MatryoshkaHead. "
        "Received: MatryoshkaClassifier 'digits', whose features are (None, 8). "
        "Join causal_transformer(...) and a head in a MatryoshkaClassifier."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        next_token(model)


def test_heads_must_divide_the_width() -> None:
    sentence = (
        "Every head of the attention reads an equal share of the width. "
        "Received: heads=3 for width=8. Choose heads that divide the width."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        causal_transformer(TOKENS, WIDTH, LENGTH, heads=3)


def test_a_text_is_learned_at_every_dim() -> None:
    """Tokens that count upwards: a circle has room in two dims, eight know what comes next."""
    text = (np.arange(LENGTH + 1) + np.arange(44)[:, None]) % TOKENS
    model = compiled(
        language_model(tied=True),
        optimizer=keras.optimizers.Adam(0.02),
        loss=MatryoshkaLoss(cross_entropy()),
        metrics=[perplexity_by_dim()],
    )
    log = model.fit(text[:, :-1], text[:, 1:], epochs=40, batch_size=44, verbose=0).history
    assert min(log[f"perplexity_{dim}"][0] for dim in DIMS) > 8
    last = [log[f"perplexity_{dim}"][-1] for dim in DIMS]
    assert last == sorted(last, reverse=True)
    assert last[0] < 5
    assert last[-1] < 1.5


CLASSES, FUNNEL_WIDTH, FUNNEL_DIMS = 300, 16, (4, 8, 16)
FEATURES = np.random.default_rng(0).normal(size=(9, FUNNEL_WIDTH)).astype("float32")
HEADS = {
    "untied": lambda: MatryoshkaHead(CLASSES, FUNNEL_DIMS),
    "tied": lambda: MatryoshkaHead(CLASSES, FUNNEL_DIMS, tied=True),
    "without bias": lambda: MatryoshkaHead(CLASSES, FUNNEL_DIMS, tied=True, use_bias=False),
}


def head_of(kind: str) -> MatryoshkaHead:
    head = HEADS[kind]()
    head.build((None, FUNNEL_WIDTH))
    random = np.random.default_rng(1)
    head.set_weights([random.normal(size=w.shape) for w in head.weights])
    return head


def funnel(head: MatryoshkaHead, schedule: FunnelSchedule) -> tuple[np.ndarray, np.ndarray]:
    ids, scores = funnel_top_k(head, keras.ops.convert_to_tensor(FEATURES), schedule)
    return as_numpy(ids), as_numpy(scores)


@pytest.mark.parametrize("kind", HEADS)
def test_a_funnel_with_every_class_on_the_shortlist_is_exact(kind: str) -> None:
    head = head_of(kind)
    ids, scores = funnel(head, FunnelSchedule((4, 16), (CLASSES,), k=5))
    logits = as_numpy(head(FEATURES))[:, -1]
    expected = np.argsort(-logits, axis=1)[:, :5]
    np.testing.assert_array_equal(ids, expected)
    np.testing.assert_allclose(scores, np.take_along_axis(logits, expected, 1), rtol=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_each_stage_picks_from_the_one_before_it_by_its_own_logits(kind: str) -> None:
    head = head_of(kind)
    logits = as_numpy(head(FEATURES))
    ids, scores = funnel(head, FunnelSchedule((4, 8, 16), (40, 12), k=3))
    for row in range(len(FEATURES)):
        best = np.argsort(-logits[row, 0])[:40]
        best = best[np.argsort(-logits[row, 1, best])[:12]]
        best = best[np.argsort(-logits[row, 2, best])[:3]]
        np.testing.assert_array_equal(ids[row], best)
        np.testing.assert_allclose(scores[row], logits[row, 2, best], rtol=1e-4, atol=1e-4)


def test_one_stage_is_top_k_of_its_dim() -> None:
    head = head_of("untied")
    ids, _ = funnel(head, FunnelSchedule((8,), (), k=4))
    np.testing.assert_array_equal(ids, np.argsort(-as_numpy(head(FEATURES))[:, 1])[:, :4])


def test_a_tied_head_is_a_gallery_of_its_classes() -> None:
    """The same funnel over the transposed kernel, as an index counts it."""
    head = head_of("without bias")
    schedule = FunnelSchedule((4, 8, 16), (40, 12), k=3)
    index = ExactIndex.build(as_numpy(head.weights_at(16)[0]).T, schedule, metric="dot")
    np.testing.assert_array_equal(funnel(head, schedule)[0], index.search(FEATURES).ids)


def test_a_shortlist_of_more_classes_than_there_are_is_refused() -> None:
    sentence = (
        "A shortlist must not hold more classes than there are. "
        "Received: 301 of 300 classes. Shorten it to at most 300."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        funnel(head_of("tied"), FunnelSchedule((4, 16), (301,), k=3))


def test_only_dims_of_the_head_make_stages() -> None:
    sentence = (
        "dim must be one of the dims of the head. "
        "Received: dim=6 for dims=(4, 8, 16). Choose one of those."
    )
    with pytest.raises(ValueError, match=exactly(sentence)):
        funnel(head_of("tied"), FunnelSchedule((6, 16), (30,), k=3))
