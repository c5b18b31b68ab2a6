"""The benchmark of packed arithmetic compares like with like."""

from __future__ import annotations

import pytest
import torch

from tasks.codecs import Leaf, Ternary
from tasks.packed import planes_of
from tests.benchmarks.packed import WORK, figures


@pytest.mark.parametrize("what", WORK)
def test_both_ways_give_the_same(what: str) -> None:
    codec, deltas = Ternary(density=0.3), torch.randn(2, 10_001, generator=torch.Generator().manual_seed(0))
    parts = [codec.encode(Leaf("w", "bare", delta), codec.survey(lambda d=delta: [d])).parts for delta in deltas]
    packed, dense = WORK[what]
    found = packed(*(planes_of(one, (10_001,)) for one in parts))
    wanted = dense(*(Ternary.decode(one, (10_001,)) for one in parts))
    torch.testing.assert_close(torch.as_tensor(found).double(), torch.as_tensor(wanted).double(), rtol=1e-5, atol=1e-4)


def test_planes_take_a_sixteenth() -> None:
    memory = {way: figures(way, 64_000)["memory of both"] for way in ("planes", "dense")}
    assert memory["dense"] == 16 * memory["planes"]
