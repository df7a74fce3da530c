"""Small text encoders of keras-hub on random weights, one for each kind of tokenizer."""

import io
from collections.abc import Sequence
from functools import cache
from typing import Any

import keras
import numpy as np
import numpy.typing as npt

from tests.helpers.vision_backbones import imported

LENGTH = 12
TEXTS = (
    "a cat sat on the mat",
    "the dog sat, and the cat ran!",
    "",
    "naïve café",
    "unknowable",
    "a " * 40,
    "Cats 12345",
)
KINDS = ("wordpiece", "bytepair", "sentencepiece")
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_WORDS = "a and cat dog mat naive on ran sat the ##s ##t c ##a k ##n ##o ##w , !".split()
_DIMS = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 8, "dropout": 0.0}


def hub() -> Any:
    return imported("keras_hub")


def wordpiece(length: int = LENGTH, **settings: Any) -> Any:
    tokenizer = hub().models.BertTokenizer(_SPECIAL + _WORDS, lowercase=True, **settings)
    return hub().models.BertTextEmbedderPreprocessor(tokenizer, sequence_length=length)


def bytepair(length: int = LENGTH) -> Any:
    merges = ["c a", "ca t", "t h", "th e", "Ġ c", "Ġc a", "Ġca t", "o n", "Ġ t", "Ġt h", "Ġth e"]
    letters = [*map(chr, range(33, 127)), *map(chr, range(0xA1, 0x144)), *"Ġ"]
    tokens = ["<s>", "<pad>", "</s>", "<mask>", *letters, *(m.replace(" ", "") for m in merges)]
    vocabulary = {token: place for place, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = hub().models.RobertaTokenizer(vocabulary, merges)
    return hub().models.RobertaTextClassifierPreprocessor(tokenizer, sequence_length=length)


@cache
def _sentencepiece_model() -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS, "the mat", "a dog and a cat"] * 4),
        model_writer=model,
        vocab_size=40,
        model_type="unigram",
        pad_id=0,
        unk_id=1,
        bos_id=2,
        eos_id=3,
        pad_piece="<pad>",
        unk_piece="<unk>",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        user_defined_symbols="[MASK]",
        minloglevel=2,
    )
    return model.getvalue()


def sentencepiece(length: int = LENGTH) -> Any:
    tokenizer = hub().models.AlbertTokenizer(_sentencepiece_model())
    return hub().models.AlbertTextClassifierPreprocessor(tokenizer, sequence_length=length)


def preprocessor(kind: str, length: int = LENGTH) -> Any:
    return {"wordpiece": wordpiece, "bytepair": bytepair, "sentencepiece": sentencepiece}[kind](
        length
    )


def encoder(kind: str, length: int = LENGTH) -> keras.Model:
    """The mean of what a small backbone gives for each token: (batch, 8)."""
    own, models = preprocessor(kind, length), hub().models
    keras.utils.set_random_seed(0)
    more: dict[str, Any] = {"vocabulary_size": own.tokenizer.vocabulary_size(), **_DIMS}
    if kind == "sentencepiece":
        more |= {"embedding_dim": 8, "num_groups": 1, "num_inner_repetitions": 1}
    backbone = {
        "wordpiece": models.BertBackbone,
        "bytepair": models.RobertaBackbone,
        "sentencepiece": models.AlbertBackbone,
    }[kind](max_sequence_length=length, **more)
    outputs = backbone.output
    if isinstance(outputs, dict):
        outputs = outputs["sequence_output"]
    mask = keras.ops.cast(backbone.input["padding_mask"], "bool")
    pooled = keras.layers.GlobalAveragePooling1D()(outputs, mask=mask)
    return keras.Model(backbone.input, pooled, name=f"of_{kind}")


def trained() -> Any:
    """A Matryoshka encoder whose file holds its tokenizer."""
    from keras_mrl import MatryoshkaEncoder

    tower = encoder("wordpiece")
    return MatryoshkaEncoder(tower, preprocessor=preprocessor("wordpiece"), name="sentences")


def column(texts: Sequence[str | bytes]) -> npt.NDArray[Any]:
    """Texts as clients send them."""
    rows = np.empty(len(texts), dtype=object)
    rows[:] = [text.encode() if isinstance(text, str) else text for text in texts]
    return rows
