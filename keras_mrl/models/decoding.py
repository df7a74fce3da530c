"""Text, token by token, each decided at the first dim that is sure enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from keras_mrl_serving.cascade.confidence import softmax
from keras_mrl_serving.cascade.policy import CascadePolicy

from .cut import split

Ids = npt.NDArray[np.int64]
# From logits (rows, classes) to one id per row.
Choose = Callable[[npt.NDArray[np.float32]], Ids]
# From tokens (rows, time) to the next id of each row, and the dim that decided it.
Decide = Callable[[npt.NDArray[np.int32]], tuple[npt.ArrayLike, npt.ArrayLike]]


def most_likely(logits: npt.NDArray[np.float32]) -> Ids:
    """Return the best id of each row of `logits (rows, classes)`: greedy decoding.

    Args:
        logits: `(rows, classes)`.

    Examples:
        >>> most_likely(np.float32([[0, 2, 1]])).tolist()
        [1]
    """
    return np.argmax(logits, axis=-1)


def sampler(temperature: float = 1.0, top_k: int = 40, seed: int | None = None) -> Choose:
    """Return a choice at random among the best ids, by their probabilities.

    Args:
        temperature: Divides the logits; below 1 the likely become likelier.
        top_k: How many of the best ids may be chosen.
        seed: Of the random numbers; None draws other ones every time.

    Raises:
        ValueError: If `temperature` or `top_k` is not positive.

    Examples:
        >>> choose = sampler(top_k=1)  # the best alone
        >>> choose(np.float32([[0, 2, 1]])).tolist()
        [1]
    """
    if not temperature > 0 or top_k < 1:
        raise ValueError(
            "temperature must be above 0 and top_k at least 1. "
            f"Received: temperature={temperature}, top_k={top_k}. "
            "Use most_likely for the best token alone."
        )
    random = np.random.default_rng(seed)

    def choose(logits: npt.NDArray[np.float32]) -> Ids:
        best = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
        shares = softmax(np.take_along_axis(logits, best, axis=-1), temperature)
        sums = np.cumsum(shares, axis=-1, dtype=np.float64)
        drawn = random.random((len(logits), 1)) * sums[:, -1:]
        place = np.minimum((sums <= drawn).sum(axis=-1), best.shape[-1] - 1)
        return np.take_along_axis(best, place[:, None], axis=-1)[:, 0]

    return choose


class AdaptiveDecoder:
    """The next token of each row, and the dim it was decided at.

    The backbone runs once on a fixed number of positions; then each wider head is multiplied for
    the rows alone that no smaller dim was sure of. It holds a copy of the head's weights: make it
    anew after training.

    Args:
        model: A built language model: `causal_transformer` and a head, or any whose features
            `(batch, time, width)` see no later token.
        policy: Thresholds per dim, as `learn_decoding_policy` finds them.
        context: How many of the last tokens the model reads.
        choose: Picks an id from the logits of the dim that decides: `most_likely`, or a
            `sampler(...)`.

    Raises:
        ValueError: If the model has no nested head or no positions, the policy other dims, or
            `context` is not a positive integer.

    Examples:
        >>> from keras_mrl_serving import CascadePolicy, Stage
        >>> backbone = causal_transformer(vocabulary_size=50, width=16, length=8)
        >>> model = MatryoshkaClassifier(backbone, MatryoshkaHead(50, dims=(4, 16)))
        >>> _ = model(keras.ops.ones((1, 8), dtype="int32"))
        >>> policy = CascadePolicy((Stage(4, 0.0), Stage(16, None)))  # a threshold all exceed
        >>> ids, dims = AdaptiveDecoder(model, policy, context=8)(np.ones((3, 5), np.int32))
        >>> ids.shape, dims.tolist()
        ((3,), [4, 4, 4])
    """

    def __init__(
        self,
        model: keras.Model,
        policy: CascadePolicy,
        context: int,
        choose: Choose = most_likely,
    ) -> None:
        _check_context(context)
        self.model = model
        self.policy = policy
        self.context = context
        self.choose = choose
        self._backbone, head = split(model)
        if head is None or not head.built:
            raise ValueError(
                "A decoder needs a built language model that ends in a MatryoshkaHead. "
                f"Received: {type(model).__name__} {model.name!r}. Train it, or call it on a batch."
            )
        self._heads = [_as_numpy(*head.weights_at(dim)) for dim in policy.dims]

    def __call__(self, tokens: npt.NDArray[np.int32]) -> tuple[Ids, Ids]:
        """Return the next ids and the dims that decided them, both `(rows,)`."""
        features = self._features_of_the_last(np.asarray(tokens)[:, -self.context :])
        ids = np.zeros(len(features), np.int64)
        dims = np.zeros(len(features), np.int64)
        unsure = np.arange(len(features))
        stages = zip(self.policy.stages, self._heads, strict=True)
        for index, (stage, (kernel, bias)) in enumerate(stages):
            logits = features[unsure, : stage.dim] @ kernel + bias
            sure = self.policy.is_sure(index, logits)
            decided = unsure[sure]
            if len(decided):
                ids[decided], dims[decided] = self.choose(logits[sure]), stage.dim
            unsure = unsure[~sure]
            if not len(unsure):
                break
        return ids, dims

    def _features_of_the_last(self, tokens: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Rows are filled up behind the last token, which does not see it: one shape, compiled."""
        rows, known = tokens.shape
        filled = np.zeros((rows, self.context), np.int32)
        filled[:, :known] = tokens
        features = np.asarray(self._backbone.predict_on_batch(filled), np.float32)
        if features.ndim != 3:
            raise ValueError(
                "A decoder reads the features of every position, (batch, time, width). "
                f"Received: features of shape {features.shape}. "
                "Give the model that was trained, not its next_token(...)."
            )
        return features[:, known - 1]


def _check_context(context: int) -> None:
    if not isinstance(context, int) or context < 1:
        raise ValueError(
            "context must be a positive integer. "
            f"Received: context={context!r}. Give the number of tokens the model was trained on."
        )


def _as_numpy(kernel: Any, bias: Any) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """A dim's kernel and bias in float32; a bias of zeros where there is none."""
    held = np.asarray(keras.ops.convert_to_numpy(kernel), np.float32)
    if bias is None:
        return held, np.zeros(held.shape[1], np.float32)
    return held, np.asarray(keras.ops.convert_to_numpy(bias), np.float32)


def generate(decide: Decide, prompts: npt.ArrayLike, steps: int, context: int) -> tuple[Ids, Ids]:
    """Return the tokens that follow each prompt, and the dim each was decided at.

    Args:
        decide: An `AdaptiveDecoder`, or any function from tokens `(rows, time)` to the next ids
            and their dims, both `(rows,)`: a served model's, for example.
        prompts: Token ids, all rows of one length, at least one.
        steps: How many tokens to add.
        context: How many of the last tokens `decide` is given; an `AdaptiveDecoder`'s own.

    Shapes:
        prompts: `(rows, time)`. Result: two of `(rows, steps)`.

    Raises:
        ValueError: If `prompts` are not token ids `(rows, time)`, `steps` is not a non-negative
            integer, or `context` is not a positive integer or not that of the decoder.

    Examples:
        >>> count = lambda tokens: (tokens[:, -1] + 1, np.full(len(tokens), 8))
        >>> ids, dims = generate(count, [[1, 2]], steps=3, context=2)
        >>> ids.tolist(), dims.tolist()
        ([[3, 4, 5]], [[8, 8, 8]])
    """
    _check_context(context)
    if isinstance(decide, AdaptiveDecoder) and decide.context != context:
        raise ValueError(
            "context must be that of the decoder. "
            f"Received: context={context} for a decoder of context={decide.context}. "
            "Write context=decide.context."
        )
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(
            "steps must be a non-negative integer. "
            f"Received: steps={steps!r}. Give the number of tokens to add."
        )
    text = np.asarray(prompts)
    if text.ndim != 2 or not text.shape[1] or text.dtype.kind not in "iu":
        raise ValueError(
            "prompts must be token ids (rows, time), at least one in a row. "
            f"Received: {text.dtype} of shape {text.shape}. Give [tokenizer.encode(text).ids]."
        )
    first, dims = text.shape[1], np.zeros((len(text), steps), np.int64)
    text = np.concatenate([text, np.zeros((len(text), steps), text.dtype)], axis=1)
    for step in range(steps):
        seen = text[:, max(0, first + step - context) : first + step]
        text[:, first + step], dims[:, step] = decide(seen.astype(np.int32))
    return text[:, first:].astype(np.int64), dims
