"""WordPiece by operations of TensorFlow alone, for graphs that are made without tensorflow-text.

Each character is replaced by what keras-hub's Python code makes of it, words that are tokens are
looked up, and the others are cut by greedy longest match. The tokens are those of tensorflow-text
but for characters that only become one together with their neighbour, such as Hangul in parts or
the two halves of a vowel sign of Bengali, which stay apart here; and for characters of Unicode 15
and later, which Python knows and tensorflow-text 2.21 does not.
"""

from __future__ import annotations

import functools
from typing import Any

import tensorflow as tf

_ABSENT, _BLANK_IN_WORD = "\1", "\2"
_BYTES = 100  # a longer word is unknown, as to tensorflow-text
# Beyond these no character is changed by lowering and by dropping accents: private use, and
# Chinese ones, which a regular expression finds.
_CHANGED = (
    *((0, 0x3400), (0xA000, 0xD800), (0xF900, 0x20000)),
    *((0x2F800, 0x2FA20), (0xE0000, 0xE1000)),
)


def runs_in_core(preprocessor: Any) -> bool:
    """Whether `CoreWordPiece` makes the tokens of a preprocessor: one text, in the way of BERT."""
    from keras_hub import models, tokenizers

    own = getattr(preprocessor, "tokenizer", None)
    kinds = (models.TextEmbedderPreprocessor, models.TextClassifierPreprocessor)
    return (
        isinstance(preprocessor, kinds)
        and isinstance(own, tokenizers.WordPieceTokenizer)
        and own.split
        and not own.special_tokens_in_strings
        # A letter and its accent, which lowering makes one character, are two in a table.
        and (own.strip_accents or not own.lowercase)
    )


class CoreWordPiece(tf.Module):
    """A preprocessor of keras-hub as a function of texts `(batch,)` to the inputs of a model.

    Args:
        preprocessor: One of which `runs_in_core`.
    """

    def __init__(self, preprocessor: Any) -> None:
        super().__init__()

        def table(keys: Any, values: Any, default: Any) -> Any:
            initializer = tf.lookup.KeyValueTensorInitializer(keys, values)
            return tf.lookup.StaticHashTable(initializer, default)

        own = preprocessor.tokenizer
        tokens, self._suffix = own.get_vocabulary(), own.suffix_indicator
        replaced = _characters(own.lowercase, own.strip_accents, own.split_on_cjk)
        self._characters = table(
            tf.constant([*replaced], tf.int32), tf.constant([*replaced.values()]), _ABSENT
        )
        self._vocabulary = table(tokens, tf.range(len(tokens)), -1)
        self._longest = max(len(token.encode()) for token in tokens)
        self._unknown = tokens.index(own.oov_token)
        self._ends = (own.start_token_id, own.end_token_id)
        self._padding, self._length = own.pad_token_id, preprocessor.sequence_length
        self._splits_on_cjk = own.split_on_cjk

    def __call__(self, texts: Any) -> Any:
        """Return the inputs of a model for texts in UTF-8."""
        room = self._length - 2
        words = self._words(texts)[:, :room]  # a word has one token or more
        unique, places = tf.unique(words.flat_values)
        own = tf.gather(self._tokens(unique), places)
        rows = words.with_flat_values(own).merge_dims(1, 2)[:, :room]
        first, last = (tf.fill([tf.shape(texts)[0], 1], token) for token in self._ends)
        packed = tf.concat([first, rows, last], axis=1)
        ids = packed.to_tensor(self._padding, shape=[None, self._length])
        mask = tf.not_equal(ids, self._padding)
        return {"token_ids": ids, "padding_mask": mask, "segment_ids": tf.zeros_like(ids)}

    def _words(self, texts: Any) -> Any:
        """Return the words of each text, lowered and without accents as the tokenizer has it."""
        if self._splits_on_cjk:
            from keras_hub.src.tokenizers.word_piece_tokenizer import CJK_REGEX

            texts = tf.strings.regex_replace(texts, CJK_REGEX, r" \0 ")
        codes = tf.strings.unicode_decode(texts, "UTF-8")
        flat = codes.flat_values
        made = self._characters.lookup(flat)
        same = tf.strings.unicode_encode(flat[:, None], "UTF-8")
        made = codes.with_flat_values(tf.where(made == _ABSENT, same, made))
        words = tf.strings.split(tf.strings.reduce_join(made, axis=1), " ")
        return tf.ragged.boolean_mask(words, words != "")

    def _tokens(self, words: Any) -> Any:
        """Return the tokens of words `(words,)`, ragged: the longest first, as WordPiece cuts."""
        sizes, count = tf.strings.length(words), tf.size(words)
        spans = tf.range(1, self._longest + 1)

        def step(rows: Any, starts: Any, is_unknown: Any, made: Any) -> Any:
            """Cut one token off the words `rows`, each from its place in `starts`."""
            at, size = tf.gather(starts, rows)[:, None], tf.gather(sizes, rows)[:, None]
            grid = [tf.size(rows), self._longest]
            parts = tf.strings.substr(
                *(
                    tf.broadcast_to(own, grid)
                    for own in (tf.gather(words, rows)[:, None], at, spans[None])
                )
            )
            ids = self._vocabulary.lookup(tf.where(at > 0, self._suffix + parts, parts))
            longest = tf.reduce_max(tf.where(ids >= 0, spans, 0), axis=1)
            token = tf.gather(ids, tf.maximum(longest - 1, 0), batch_dims=1)
            token, at, place = tf.where(longest > 0, token, -1), at[:, 0] + longest, rows[:, None]
            starts = tf.tensor_scatter_nd_update(starts, place, at)
            is_unknown = tf.tensor_scatter_nd_update(is_unknown, place, longest == 0)
            column = tf.tensor_scatter_nd_update(tf.fill([count], -1), place, token)
            is_open = (longest > 0) & (at < size[:, 0])
            made = tf.concat([made, column[:, None]], axis=1)
            return tf.boolean_mask(rows, is_open), starts, is_unknown, made

        is_unknown = sizes > _BYTES
        rows, starts = tf.where(~is_unknown)[:, 0], tf.zeros([count], tf.int32)
        shapes = ([None], [None], [None], [None, None])
        _, _, is_unknown, made = tf.while_loop(
            lambda rows, *_: tf.size(rows) > 0,
            step,
            [rows, starts, is_unknown, tf.zeros([count, 0], tf.int32)],
            shape_invariants=[tf.TensorShape(own) for own in shapes],
        )
        made = tf.pad(made, [[0, 0], [0, 1]], constant_values=-1)
        one = tf.where(tf.range(tf.shape(made)[1]) == 0, self._unknown, -1)
        made = tf.where(is_unknown[:, None], one, made)
        return tf.ragged.boolean_mask(made, made >= 0)


@functools.cache
def _characters(lowercase: bool, strip_accents: bool, split_on_cjk: bool) -> dict[int, str]:
    """Return what stands for each character that is changed, blanks around it where it divides."""
    from keras_hub.src.tokenizers.word_piece_tokenizer import pretokenize_python

    table = {}
    for code in (code for start, end in _CHANGED for code in range(start, end)):
        words = pretokenize_python(
            f"a{chr(code)}a", lowercase, strip_accents, split_on_cjk=split_on_cjk
        )
        made = " ".join(word.replace(" ", _BLANK_IN_WORD) for word in words)[1:-1]
        if made != chr(code):
            table[code] = made
    return table
