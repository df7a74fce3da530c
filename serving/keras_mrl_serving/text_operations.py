"""The operations of tensorflow-text that TensorFlow Serving has, with the first version that does.

`tensorflow_serving/model_servers/BUILD` links `tensorflow_text:ops_lib` into the stock server, and
`tensorflow_serving/workspace.bzl` names the version of tensorflow-text, that of the server: 2.20.0
in 2.20. What `ops_lib` has is in `tensorflow_text/BUILD`. The versions here were read from the
operations in the packages of tensorflow-text 2.12.1, 2.14.0, 2.15.0, 2.16.1, 2.20.1 and 2.21.1.
"""

from __future__ import annotations

from types import MappingProxyType

_SINCE_2_12 = """
    CaseFoldUTF8 ConstrainedSequence FastBertNormalize FastWordpieceTokenizeWithOffsets
    FindSourceOffsets MaxSpanningTree NormalizeUTF8 NormalizeUTF8WithOffsetsMap PhraseTokenize
    RegexSplitWithOffsets RougeL SentenceFragments SentenceFragmentsV2 SentencepieceDetokenizeOp
    SentencepieceIdToStringOp SentencepieceOp SentencepieceStringToIdOp SentencepieceTokenizeOp
    SentencepieceTokenizeWithOffsetsOp SentencepieceVocabSizeOp SplitMergeTokenizeWithOffsets
    TFText>BoiseTagsToOffsets TFText>ByteSplitByOffsets TFText>ByteSplitWithOffsets
    TFText>FastSentencepieceDetokenize TFText>FastSentencepieceTokenize
    TFText>FastWordpieceDetokenize TFText>NgramsStringJoin TFText>OffsetsToBoiseTags
    TFText>PhraseDetokenize TFText>WhitespaceTokenizeWithOffsetsV2 TokenizerFromLogits
    UnicodeScriptTokenizeWithOffsets WhitespaceTokenizeWithOffsets WordpieceTokenizeWithOffsets
""".split()
_SINCE_2_14 = "TFText>RoundRobinGenerateMasks TFText>RoundRobinTrim TFText>Utf8Binarize".split()

# Name of the operation to the first TensorFlow Serving that has it, of those that were looked at.
TEXT_OPERATIONS = MappingProxyType(
    {**dict.fromkeys(_SINCE_2_12, "2.12"), **dict.fromkeys(_SINCE_2_14, "2.14")}
)
