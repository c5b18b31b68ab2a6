"""Experts: a layer's matrices in one tensor are merged as if each were a tensor of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tasks.kinds import is_expert_stack
from tasks.mergers import IsoC, IsoCts, Opcm, Target, TsvM
from tests.contracts.test_mergers import Update, delta, fold, through_store

STACK = "layers.0.mlp.experts.gate_up_proj"
EXPERTS, SHAPE = 3, (20, 12)
VARIANTS: tuple[Any, ...] = ("fixed", "reference", "paper")
DIAGONALS: tuple[Any, ...] = ("remove", "leave")
PROJECTS: tuple[Any, ...] = ("matrices", "linear")


def updates(count: int) -> list[Update]:
    """Of a layer whose first expert no update has touched, and whose second only the last one has."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        stack = torch.randn(EXPERTS, *SHAPE, generator=generator, dtype=torch.float64) * 1e-3
        stack[0] = 0
        if number < count - 1:
            stack[1] = 0
        found.append({STACK: stack})
    return found


def role(name: str, tensor: Tensor) -> str:
    return "bare" if name == STACK else "linear.weight"


def apart(update: Update) -> Update:
    """Every expert as a tensor of its own, as files have them."""
    return {f"layers.0.mlp.{expert}.weight": tau for expert, tau in enumerate(update[STACK])}


@pytest.mark.parametrize(
    "merger",
    [
        *(Opcm(variant=v, diagonal=d) for v in VARIANTS for d in DIAGONALS),
        *(kind(project=which) for kind in (IsoC, TsvM) for which in PROJECTS),
    ],
    ids=str,
)
def test_every_expert_is_a_matrix(merger: Any) -> None:
    """After every update, read back from a store: what each expert would come to if it were a tensor of its own."""
    stacked = single = None
    for update in updates(4):
        stacked = through_store(fold(merger, stacked, update, role))
        single = through_store(fold(merger, single, apart(update), role))
        found, expected = delta(merger, stacked, role)[STACK], delta(merger, single, role).values()
        torch.testing.assert_close(found, torch.stack(list(expected)), rtol=0, atol=1e-9)


@pytest.mark.parametrize("project", PROJECTS)
def test_every_expert_is_a_matrix_of_a_joint_merger_too(project: Any) -> None:
    merger, several = IsoCts(project=project), updates(3)
    deltas, ones = [update[STACK] for update in several], [1.0] * 3
    found = merger.combine(torch.zeros_like(deltas[0]), deltas, ones, Target(STACK, "bare"))
    for expert in range(EXPERTS):
        matrices = [one[expert] for one in deltas]
        alone = merger.combine(torch.zeros_like(matrices[0]), matrices, ones, Target("layer.weight", "linear.weight"))
        assert torch.equal(found[expert], alone)


@pytest.mark.parametrize(
    ("name", "role", "dimensions", "expected"),
    [
        ("layers.3.mlp.experts.gate_up_proj", "bare", 3, True),
        ("layers.3.block_sparse_moe.experts.down_proj", "mixtralexperts.down_proj", 3, True),
        ("layers.3.block_sparse_moe.input_linear.weight", "granitemoeparallelexperts.weight", 3, True),
        ("layers.3.mlp.experts.gate_up_proj_bias", "bare", 2, False),
        ("layers.3.mlp.experts.3.w1.weight", "linear.weight", 2, False),
        ("conv1.weight", "conv.weight", 3, False),
    ],
)
def test_what_a_stack_of_experts_is(name: str, role: str, dimensions: int, expected: bool) -> None:
    assert is_expert_stack(name, role, dimensions) == expected
