"""What a sparsifier is: a random or deterministic thinning of one tensor of one update, before any merger sees it.

Random masks come from a counter-based generator keyed by (seed, update, tensor): neither the order of merging, nor
the device, nor the number of threads changes which entries are dropped.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Sparsifier(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    def thin(self, delta: Tensor, update: str, tensor: str) -> Tensor:
        """`delta` with entries dropped and the rest rescaled. `update` is the update's ref, `tensor` the name."""
        ...


def uniform(delta: Tensor, seed: int, update: str, tensor: str) -> Tensor:
    """One number in [0, 1) for every entry of `delta`, float32, on its device, of the tensor's shape.

    Philox (Salmon et al. 2011), whose stream for a key is the same on every machine; drawn on the CPU.
    """
    key = hashlib.sha256(f"{seed}/{update}/{tensor}".encode()).digest()[:16]
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
    drawn = torch.from_numpy(generator.random(delta.numel(), dtype=np.float32))
    return drawn.reshape(delta.shape).to(delta.device)
