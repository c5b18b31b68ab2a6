"""Codecs in the words of a command line."""

from __future__ import annotations

import pytest

from configs.codec_words import codec_from_words
from storage.errors import InvalidInput
from tasks.codecs import Ternary


def test_a_name_and_settings_make_a_codec() -> None:
    assert codec_from_words("ternary") == Ternary()
    assert codec_from_words("ternary", ["density=0.05", "alpha=norm"]) == Ternary(density=0.05, alpha="norm")
    assert codec_from_words("ternary", ["alpha=2"]) == Ternary(alpha=2.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ternry"], "did you mean ternary"),
        (["ternary", "densty=0.1"], "did you mean density"),
        (["ternary", "density=1.5"], "density must be between 0 and 1"),
        (["ternary", "density"], "Write it like density=0.1"),
        (["ternary", "density=[0.1"], "cannot be read"),
        (["dense", "density=0.1"], "no such field"),
    ],
)
def test_what_is_wrong_is_named(words: list[str], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        codec_from_words(words[0], words[1:])
