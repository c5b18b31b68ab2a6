"""Benchmark: ternary updates as files, by the share of entries kept, beside simpler layouts of the same entries.

Two updates of equal size: one tensor of independent draws, and forty whose scales differ by tensor, row and column, as
those of trained models do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from storage import blobs
from tasks.codecs import Leaf, Parts, Ternary, decode_parts
from tests.benchmarks.coding import Case, Measured, Way, answer, measure
from tests.benchmarks.peers import layouts

DENSITIES = (0.05, 0.1, 0.2, 0.5)
KINDS = ("i.i.d.", "structured")
_TENSORS, _ROWS = 40, 500
_NAME = "linear.weight"


def rows(elements: int) -> list[Measured]:
    cases = [(kind, density) for kind in KINDS for density in DENSITIES]
    return [row for kind, density in cases for row in measure(__name__, kind, density, elements)]


def entropy(density: float) -> float:
    """Bits per parameter of independent ternary entries: H2(k) + k."""
    return -density * math.log2(density) - (1 - density) * math.log2(1 - density) + density


def update(kind: str, elements: int) -> list[Tensor]:
    """Student-t draws with three degrees of freedom times 1e-4, for `structured` times log-normal scales."""
    generator = np.random.default_rng(0)
    if kind == "i.i.d.":
        return [torch.from_numpy(generator.standard_t(3, elements).astype(np.float32) * np.float32(1e-4))]
    found, shape = [], (_ROWS, elements // _TENSORS // _ROWS)
    for _ in range(_TENSORS):
        draws = generator.standard_t(3, shape) * 1e-4 * generator.lognormal(0, 0.5)
        draws *= generator.lognormal(0, 0.35, (shape[0], 1)) * generator.lognormal(0, 0.35, (1, shape[1]))
        found.append(torch.from_numpy(draws.astype(np.float32)))
    return found


def case(kind: str, density: float, elements: int) -> Case:
    tensors = update(kind, elements)
    codec = Ternary(density=density)
    facts = codec.survey(lambda: tensors)
    threshold, scale = facts["threshold"], float(np.float32(facts["magnitude"]))

    def encode(number: int) -> bytes:
        return blobs.encode_parts(codec.encode(Leaf(_NAME, _NAME, tensors[number]), facts).parts)

    def decode(data: bytearray, number: int) -> Tensor:
        return decode_parts(f"{codec.name}@{codec.version}", parts_of(data), tuple(tensors[number].shape))

    def right(found: Any, number: int) -> bool:
        delta = tensors[number]
        wanted = torch.where(delta.abs() >= threshold, delta.sign() * scale, 0.0)
        return torch.equal(torch.as_tensor(found).reshape(delta.shape), wanted)

    ways = [Way("ternary", encode, decode, right, lambda: codec.survey(lambda: tensors), ours=True)]
    for name, layout in layouts.TERNARY.items():
        ways.append(Way(name, *_peer(layout, tensors, threshold, scale), right))
    return Case(len(tensors), sum(one.numel() for one in tensors), entropy(density), ways)


def parts_of(data: bytearray) -> Parts:
    return blobs.decode_parts(memoryview(data), what="a file of the benchmark")


def _peer(
    layout: layouts.Ternary, tensors: list[Tensor], threshold: float, scale: float
) -> tuple[Callable[[int], bytes], Callable[[Any, int], Any]]:
    return (
        lambda number: layout.encode(tensors[number].reshape(-1).numpy(), threshold),
        lambda data, number: layout.decode(data, tensors[number].numel(), scale),
    )


if __name__ == "__main__":
    answer(case)
