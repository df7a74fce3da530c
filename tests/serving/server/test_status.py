"""Errors with codes of TensorFlow, and their texts cut for a header."""

import grpc

from keras_mrl_serving.server.status import StatusError, from_number, truncated


def test_codes_have_the_numbers_of_tensorflow() -> None:
    for code in grpc.StatusCode:
        error = from_number(code.value[0], "text")
        assert (error.code, error.number, error.message) == (code, code.value[0], "text")
    assert StatusError(grpc.StatusCode.NOT_FOUND, "text").number == 5


def test_a_cut_text_has_no_half_character() -> None:
    assert truncated("s" * 1024) == "s" * 1024
    assert truncated("s" + "€" * 500) == "s" + "€" * 341 + "...TRUNCATED"
    assert truncated("ss" + "€" * 500) == "ss" + "€" * 340 + "...TRUNCATED"
