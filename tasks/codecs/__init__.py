"""Codecs: how the numbers of an update are written. `AnyCodec` is the list of choices; one file each."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from storage.errors import Damaged
from tasks.choice import BY_NAME, choices
from tasks.codecs.base import Codec, Parts, decoder
from tasks.codecs.dense import Dense
from tasks.codecs.ternary import Ternary

AnyCodec = Annotated[Dense | Ternary, BY_NAME]

CODECS: dict[str, type[Codec]] = choices(AnyCodec)
_DECODERS = {decoder(codec): codec.decode for codec in CODECS.values()}

__all__ = ["CODECS", "AnyCodec", "Codec", "Dense", "Parts", "Ternary", "decode_parts", "decoder"]


def decode_parts(codec: str, parts: Parts, shape: tuple[int, ...]) -> Tensor:
    """The tensor that `parts`, written by `codec` (`name@version`), stand for."""
    if codec not in _DECODERS:
        raise Damaged(
            f"tensor coded by {codec!r}, this version reads {', '.join(_DECODERS)}",
            remedy="Read it with the version of Deltaworks that wrote it",
        )
    return _DECODERS[codec](parts, shape)
