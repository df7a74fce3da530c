"""Text generation, each token decided at the first dim that is confident enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from keras_mrl_serving.cascade.confidence import softmax
from keras_mrl_serving.cascade.policy import CascadePolicy, check_no_exits
from keras_mrl_serving.integers import check_positive_integer

from .._arrays import head_arrays
from .cut import split

Ids = npt.NDArray[np.int64]
# A function from logits (rows, classes) to one id per row.
Choose = Callable[[npt.NDArray[np.float32]], Ids]
# A function from tokens (rows, time) to the next id of each row, and the dim that decided it.
Decide = Callable[[npt.NDArray[np.int32]], tuple[npt.ArrayLike, npt.ArrayLike]]


def most_likely(logits: npt.NDArray[np.float32]) -> Ids:
    """Return the best id of each row of `logits (rows, classes)`: greedy decoding.

    Args:
        logits: `(rows, classes)`.

    Raises:
        ValueError: If a logit is NaN.

    Examples:
        >>> most_likely(np.float32([[0, 2, 1]])).tolist()
        [1]
    """
    return np.argmax(_check_logits(logits), axis=-1)


def _check_logits(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the logits; of NaN, `argmax` and `argsort` would make id 0 the best."""
    is_bad = np.isnan(logits).any(axis=-1)
    if is_bad.any():
        raise ValueError(
            "A token is chosen by logits that are numbers. "
            f"Received: NaN in {int(is_bad.sum())} of {len(logits)} rows. "
            "Train the model to a finite loss."
        )
    return logits


def sampler(temperature: float = 1.0, top_k: int = 40, seed: int | None = None) -> Choose:
    """Return a function that draws one of the best ids, by their probabilities.

    Args:
        temperature: Divides the logits; below 1, likely ids become likelier.
        top_k: How many of the best ids may be drawn.
        seed: Seed of the random numbers; None draws different ones every time.

    Raises:
        ValueError: If `temperature` or `top_k` is not positive, or a logit that the function is
            given is NaN.

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
        best = np.argsort(-_check_logits(logits), axis=-1, kind="stable")[:, :top_k]
        probabilities = softmax(np.take_along_axis(logits, best, axis=-1), temperature)
        sums = np.cumsum(probabilities, axis=-1, dtype=np.float64)
        draws = random.random((len(logits), 1)) * sums[:, -1:]
        position = np.minimum((sums <= draws).sum(axis=-1), best.shape[-1] - 1)
        return np.take_along_axis(best, position[:, None], axis=-1)[:, 0]

    return choose


class AdaptiveDecoder:
    """A function from tokens to the next token of each row, and the dim that decided it.

    The backbone runs once on a fixed number of positions. Each wider dim is multiplied only for the
    rows that no narrower dim was confident about. The decoder holds a copy of the head's weights:
    make a new one after training.

    Args:
        model: A built language model: `causal_transformer` and a head, or any whose features
            `(batch, time, width)` see no later token.
        policy: Thresholds per dim, as `learn_decoding_policy` returns them.
        context: How many of the last tokens the model reads.
        choose: Picks an id from the logits of the dim that decides: `most_likely`, or a
            `sampler(...)`.

    Raises:
        ValueError: If the model has no nested head or no positions, the policy has a dim that the
            head has not, or `context` is not a positive integer.

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
        self.model = model
        self.policy = policy
        self.context = _check_context(context)
        self.choose = choose
        self._backbone, head = split(model)
        if head is None or not head.built:
            raise ValueError(
                "A decoder needs a built language model that ends in a MatryoshkaHead. "
                f"Received: {type(model).__name__} {model.name!r}. Train it, or call it on a batch."
            )
        check_no_exits(policy, "A decoder", "Learn one: learn_decoding_policy(scores).")
        self._heads = [head_arrays(head, dim) for dim in policy.dims]

    def __call__(self, tokens: npt.NDArray[np.int32]) -> tuple[Ids, Ids]:
        """Return the next ids and the dims that decided them, both `(rows,)`."""
        features = self._last_features(np.asarray(tokens)[:, -self.context :])
        ids = np.zeros(len(features), np.int64)
        dims = np.zeros(len(features), np.int64)
        open_rows = np.arange(len(features))
        stages = zip(self.policy.stages, self._heads, strict=True)
        for index, (stage, (kernel, bias)) in enumerate(stages):
            logits = features[open_rows, : stage.dim] @ kernel + bias
            is_sure = self.policy.is_sure(index, logits)
            decided_rows = open_rows[is_sure]
            if len(decided_rows):
                ids[decided_rows], dims[decided_rows] = self.choose(logits[is_sure]), stage.dim
            open_rows = open_rows[~is_sure]
            if not len(open_rows):
                break
        return ids, dims

    def _last_features(self, tokens: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Return the features `(rows, width)` of the last token of each row.

        Rows are padded to one shape, so that one is compiled; no token sees the padding after it.
        """
        rows, time = tokens.shape
        padded = np.zeros((rows, self.context), np.int32)
        padded[:, :time] = tokens
        features = np.asarray(self._backbone.predict_on_batch(padded), np.float32)
        if features.ndim != 3:
            raise ValueError(
                "A decoder reads the features of every position, (batch, time, width). "
                f"Received: features of shape {features.shape}. "
                "Give the model that was trained, not its next_token(...)."
            )
        return features[:, time - 1]


def _check_context(context: int) -> int:
    remedy = "Give the number of tokens the model was trained on."
    return check_positive_integer("context", context, remedy)


def generate(decide: Decide, prompts: npt.ArrayLike, steps: int, context: int) -> tuple[Ids, Ids]:
    """Return the tokens that follow each prompt, and the dim that decided each.

    Args:
        decide: An `AdaptiveDecoder`, or any function from tokens `(rows, time)` to the next ids
            and their dims, both `(rows,)`, for example one that asks a served model.
        prompts: Token ids, at least one per row, as many in every row.
        steps: How many tokens to add.
        context: How many of the last tokens `decide` reads; that of an `AdaptiveDecoder`.

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
    context = _check_context(context)
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
    ids = np.asarray(prompts)
    if ids.ndim != 2 or not ids.shape[1] or ids.dtype.kind not in "iu":
        raise ValueError(
            "prompts must be token ids (rows, time), at least one in a row. "
            f"Received: {ids.dtype} of shape {ids.shape}. Give [tokenizer.encode(text).ids]."
        )
    rows, time = ids.shape
    dims = np.zeros((rows, steps), np.int64)
    ids = np.concatenate([ids, np.zeros((rows, steps), ids.dtype)], axis=1)
    for step in range(steps):
        stop = time + step
        read = ids[:, max(0, stop - context) : stop]
        ids[:, stop], dims[:, step] = decide(read.astype(np.int32))
    return ids[:, time:].astype(np.int64), dims
