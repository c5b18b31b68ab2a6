"""Codecs: how the numbers of an update are written. `AnyCodec` is the list of choices; one file each.

A new codec is added to the union in `plain.py`, to storage/CODECS.md and to the golden stores, which tests ask for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

from torch import Tensor

from storage.errors import Damaged
from tasks.choice import BY_NAME, choices
from tasks.codecs.auto import Auto
from tasks.codecs.base import Codec, Coded, Facts, Leaf, Option, Parts, Trial, decoder
from tasks.codecs.dense import Dense, dense_parts
from tasks.codecs.exact import Exact
from tasks.codecs.plain import Plain
from tasks.codecs.ternary import Ternary
from tasks.codecs.ternary_1 import decode_ternary_1

AnyCodec = Annotated[Plain | Auto, BY_NAME]

CODECS: dict[str, type[Codec]] = choices(AnyCodec)
Reader = TypeVar("Reader", bound=Callable[..., Tensor])

# `auto` and `low_rank` write in the form of others
_DECODERS = {decoder(codec): codec.decode for codec in CODECS.values() if codec.decode is not Codec.decode}
_DECODERS |= {"ternary@1": decode_ternary_1}
_RESTORERS = {decoder(codec): codec.restore for codec in CODECS.values() if codec.lossless}
READABLE = (*_DECODERS, *_RESTORERS)  # every codec that this version reads, `name@version`

__all__ = [
    "CODECS",
    "READABLE",
    "AnyCodec",
    "Auto",
    "Codec",
    "Coded",
    "Dense",
    "Exact",
    "Facts",
    "Leaf",
    "Option",
    "Parts",
    "Ternary",
    "Trial",
    "decode_parts",
    "decoder",
    "dense_parts",
    "is_lossless",
    "restore_parts",
]


def decode_parts(codec: str, parts: Parts, shape: tuple[int, ...]) -> Tensor:
    """The tensor that `parts`, written by `codec` (`name@version`), stand for."""
    return _known(_DECODERS, codec)(parts, shape)


def restore_parts(codec: str, parts: Parts, shape: tuple[int, ...], base: Tensor) -> Tensor:
    """The tuned tensor that `parts`, written by a lossless codec, make of the base's."""
    return _known(_RESTORERS, codec)(parts, shape, base)


def is_lossless(codec: str) -> bool:
    """Whether what `codec` wrote is restored from the base's tensor, and not decoded to a delta."""
    return codec in _RESTORERS


def _known(readers: dict[str, Reader], codec: str) -> Reader:
    try:
        return readers[codec]
    except KeyError:
        raise Damaged(
            f"tensor coded by {codec!r}, this version reads {', '.join(READABLE)}",
            remedy="Read it with the version of Deltaworks that wrote it",
        ) from None
