"""Benchmark: lossless updates of bfloat16 checkpoints as files, by the share of numbers that training changed.

The base is normal with scales that differ by tensor and row. The tuned one is the base plus Student-t noise with four
degrees of freedom, of the size at which this share of the numbers changes when the sum is rounded to bfloat16. Tables
and headers weigh more on small tensors, so there are two cases of equal size in all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage import blobs
from tasks.codecs import CODECS, Leaf, restore_parts
from tests.benchmarks.coding import Case, Measured, Way, answer, measure
from tests.benchmarks.peers import layouts
from tests.benchmarks.ternary_sizes import parts_of

SHARES = (0.01, 0.05, 0.2, 0.48, 0.9)
KINDS = {"4 tensors": 4, "40 tensors": 40}
_ROWS = 500
_NAME = "linear.weight"


def rows(elements: int) -> list[Measured]:
    cases = [(kind, share) for kind in KINDS for share in SHARES]
    return [row for kind, share in cases for row in measure(__name__, kind, share, elements)]


def checkpoints(tensors: int, share: float, elements: int) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of the base and the tuned model."""
    generator = np.random.default_rng(0)
    shape = (_ROWS, elements // tensors // _ROWS)
    bases, noises = [], []
    for _ in range(tensors):
        sigma = 0.02 * generator.lognormal(0, 0.5) * generator.lognormal(0, 0.35, (shape[0], 1))
        bases.append(torch.from_numpy(generator.standard_normal(shape) * sigma).bfloat16())
        noises.append(torch.from_numpy(generator.standard_t(4, shape).astype(np.float32)))
    size = _size([base[::10] for base in bases], [noise[::10] for noise in noises], share)
    return bases, [_tuned(base, noise, size) for base, noise in zip(bases, noises, strict=True)]


def _tuned(base: Tensor, noise: Tensor, size: float) -> Tensor:
    return (base.float() + size * noise).bfloat16()


def _size(bases: list[Tensor], noises: list[Tensor], share: float) -> float:
    """The size of the noise that changes this share of the numbers: bisected on a sample of rows."""
    low, high = 1e-9, 1.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        changed = [
            (_tuned(base, noise, middle) != base).float().mean() for base, noise in zip(bases, noises, strict=True)
        ]
        low, high = (middle, high) if float(torch.stack(changed).mean()) < share else (low, middle)
    return low


def entropy(bases: list[Tensor], tuneds: list[Tensor]) -> float:
    """Bits per parameter of the difference in steps of bfloat16, given the exponent of the base's number."""
    bits = 0.0
    exponents = np.concatenate([(patterns(one) >> 7) & 255 for one in bases])
    steps = np.concatenate([_ordered(tuned) - _ordered(base) for base, tuned in zip(bases, tuneds, strict=True)])
    for exponent in np.unique(exponents):
        counts = np.unique(steps[exponents == exponent], return_counts=True)[1]
        bits -= float((counts * np.log2(counts / counts.sum())).sum())
    return bits / steps.size


def patterns(tensor: Tensor) -> NDArray[np.uint16]:
    return tensor.reshape(-1).view(torch.int16).numpy().view(np.uint16)


def _ordered(tensor: Tensor) -> NDArray[np.int32]:
    """Integers in the order of the numbers, one apart for neighbours."""
    found = patterns(tensor).astype(np.int32)
    return np.where(found < 0x8000, found, 0x8000 - found)


def case(kind: str, share: float, elements: int) -> Case:
    bases, tuneds = checkpoints(KINDS[kind], share, elements)

    def right(found: Any, number: int) -> bool:
        bits = patterns(found) if isinstance(found, Tensor) else found
        return np.array_equal(bits, patterns(tuneds[number]))

    found = {name: _peer(layout, bases, tuneds) for name, layout in layouts.lossless().items() if layout}
    missing = [name for name, layout in layouts.lossless().items() if layout is None]
    ways = [Way(name, *both, right) for name, both in found.items()]
    if "exact" in CODECS:
        ways.insert(0, Way("exact", *_ours(bases, tuneds), right, ours=True))
    return Case(len(bases), sum(base.numel() for base in bases), entropy(bases, tuneds), ways, missing)


def _ours(
    bases: list[Tensor], tuneds: list[Tensor]
) -> tuple[Callable[[int], bytes], Callable[[bytearray, int], Tensor]]:
    codec = CODECS["exact"]()
    deltas = [tuned.float() - base.float() for base, tuned in zip(bases, tuneds, strict=True)]

    def encode(number: int) -> bytes:
        leaf = Leaf(_NAME, _NAME, deltas[number], sides=lambda: (bases[number], tuneds[number]))
        return blobs.encode_parts(codec.encode(leaf, {}).parts)

    def decode(data: bytearray, number: int) -> Tensor:
        name = f"{codec.name}@{codec.version}"
        return restore_parts(name, parts_of(data), tuple(bases[number].shape), bases[number])

    return encode, decode


def _peer(
    layout: layouts.Lossless, bases: list[Tensor], tuneds: list[Tensor]
) -> tuple[Callable[[int], bytes], Callable[[Any, int], Any]]:
    return (
        lambda number: layout.encode(patterns(bases[number]), patterns(tuneds[number])),
        lambda data, number: layout.decode(patterns(bases[number]), data),
    )


if __name__ == "__main__":
    answer(case)
