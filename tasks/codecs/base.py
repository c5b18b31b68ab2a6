"""What a codec is: two functions that undo each other, and a look at the whole update beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from tasks.select import Stream

Parts = dict[str, Tensor]
Facts = Mapping[str, float]


class Codec(Protocol):
    """A codec writes tensors of floats as parts (a dict of tensors) and reads them back.

    `survey` sees every tensor of the update before the first is encoded, for codecs whose threshold or scale belongs
    to the whole update; what it returns is handed to `encode` and kept as facts of the update. `decode` needs only
    the parts and the shape: a stored tensor can be read without the update around it.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    def survey(self, deltas: Stream) -> Facts: ...

    def encode(self, delta: Tensor, facts: Facts) -> Parts: ...

    @staticmethod
    def decode(parts: Parts, shape: tuple[int, ...]) -> Tensor: ...


def decoder(codec: Codec | type[Codec]) -> str:
    """How manifests name a codec: `ternary@1`."""
    return f"{codec.name}@{codec.version}"
