"""Codecs in the words of a command line."""

from __future__ import annotations

import pytest

from configs.chain import load_chain
from configs.codec_words import codec_from_words, with_codec
from storage.errors import InvalidInput
from tasks.codecs import Ternary
from tasks.codecs.rtn import Rtn


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


def test_a_chain_with_another_codec_has_lines_of_its_own() -> None:
    plain = load_chain("smoke")
    other = with_codec(plain, "rtn bits=2")
    assert other.codec == Rtn(bits=2)
    assert [line.name for line in other.lines] == [f"{line.name}-rtn-bits-2" for line in plain.lines]
    assert (other.base, other.tasks) == (plain.base, plain.tasks)
    with pytest.raises(InvalidInput, match="did you mean ternary"):
        with_codec(plain, "ternry density=0.1")
    with pytest.raises(InvalidInput):
        with_codec(plain, " ")
