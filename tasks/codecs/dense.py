"""Dense: every number as it is. Also the form of checkpoints, and the yardstick of the other codecs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from storage.errors import Damaged
from tasks.codecs.base import Codec, Coded, Facts, Leaf, Parts, decoder


@dataclass(frozen=True)
class Dense(Codec):
    """One part, `tensor`. A tensor of zeros has no part at all: frozen layers of an update cost nothing."""

    source: ClassVar[str] = "safetensors"

    name: Literal["dense"] = "dense"
    version: Literal[1] = 1

    def encode(self, leaf: Leaf, facts: Facts) -> Coded:
        return Coded(dense_parts(leaf.delta), decoder(self))

    @staticmethod
    def decode(parts: Parts, shape: tuple[int, ...]) -> Tensor:
        if not parts:
            return torch.zeros(shape)
        try:
            return parts["tensor"].reshape(shape)
        except (KeyError, RuntimeError) as error:
            raise Damaged(f"not a dense tensor of shape {list(shape)}: {error}") from error


def dense_parts(tensor: Tensor) -> Parts:
    """The parts of `tensor` as `dense@1` has them."""
    return {"tensor": tensor} if tensor.any() or not tensor.numel() else {}
