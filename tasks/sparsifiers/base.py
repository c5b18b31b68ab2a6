"""What a sparsifier is: a thinning of one tensor of one update, before any merger sees it.

Random masks come from a counter-based generator keyed by (seed, update, tensor): neither the order of merging, nor
the device, nor the number of threads changes which entries are dropped.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tasks.choice import Choice

_PER_BLOCK = 8  # numbers of 32 bits for one step of Philox's counter


@dataclass(frozen=True)
class Sparsifier(Choice):
    """The common root. `source` says where the method comes from."""

    source: ClassVar[str]

    name: str
    version: int

    @property
    def entrywise(self) -> bool:
        """Whether what becomes of an entry depends on that entry and its place alone, so that pieces may be thinned."""
        return False

    def thin(self, delta: Tensor, update: str, tensor: str, start: int = 0) -> Tensor:
        """`delta` with entries dropped and the rest rescaled: a tensor of its shape, dtype and device.

        `update` is the update's ref, `tensor` the name; with the settings they are all that decides what is dropped.
        `start`: the place of the first entry, where `delta` is a piece of the flattened tensor.
        """
        raise NotImplementedError


def uniform(delta: Tensor, seed: int, update: str, tensor: str, start: int = 0) -> Tensor:
    """One number in [0, 1) for every entry of `delta`, float32, on its device, of the tensor's shape.

    Philox (Salmon et al. 2011), drawn on the CPU. Its raw output is used, which numpy keeps for ever, and not numpy's
    distributions, which may change: each 64-bit word gives two numbers of 24 bits, the lower half first.
    """
    halves = _halves(delta.numel(), seed, update, tensor, start)
    drawn = torch.from_numpy((halves >> np.uint32(8)).astype(np.float32)) * 2**-24
    return drawn.reshape(delta.shape).to(delta.device)


def chosen(delta: Tensor, density: float, seed: int, update: str, tensor: str, start: int = 0) -> Tensor:
    """`uniform(...) < density`, as booleans, compared as integers."""
    bound = math.ceil(float(np.float32(density)) * 2**24) << 8
    if bound >= 1 << 32:
        return torch.ones_like(delta, dtype=torch.bool)
    found = _halves(delta.numel(), seed, update, tensor, start) < np.uint32(bound)
    return torch.from_numpy(found).reshape(delta.shape).to(delta.device)


def _halves(count: int, seed: int, update: str, tensor: str, start: int) -> NDArray[np.uint32]:
    """The numbers `start` to `start` + `count` of the stream that belongs to this seed, update and tensor."""
    key = hashlib.sha256("\0".join((str(seed), update, tensor)).encode()).digest()[:16]
    blocks, skipped = divmod(start, _PER_BLOCK)
    generator = np.random.Philox(key=int.from_bytes(key, "little"))
    generator.advance(blocks)
    words = generator.random_raw((skipped + count + 1) // 2)
    return words.astype("<u8", copy=False).view("<u4")[skipped : skipped + count]


def with_l1_of(delta: Tensor, thinned: Tensor) -> Tensor:
    """`thinned` scaled so that its L1 norm is that of `delta`; as it is if nothing was left."""
    before, after = (one.abs().sum(dtype=torch.float64) for one in (delta, thinned))
    return thinned * float(before / after) if after > 0 else thinned
