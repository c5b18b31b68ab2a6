"""Updates with known answers: what the tests of inspections begin with."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from storage.artifacts import ArtifactStore
from storage.refs import CheckpointRef, UpdateRef
from tasks.extract import Extract, extract_update
from tests.builders import checkpoint_of

LAYERS = 3
Tensors = dict[str, Tensor]


class Case(NamedTuple):
    base: CheckpointRef
    tuned: CheckpointRef
    update: UpdateRef


def weights(dtype: torch.dtype = torch.float32, side: int = 64) -> Tensors:
    """An embedding and three layers, each with an attention matrix, one of the MLP, and a norm."""
    generator = torch.Generator().manual_seed(0)
    found = {"embed_tokens.weight": torch.randn(80, side, generator=generator) * 0.02}
    for layer in range(LAYERS):
        found[f"layers.{layer}.self_attn.q_proj.weight"] = torch.randn(side, side, generator=generator) * 0.02
        found[f"layers.{layer}.mlp.up.weight"] = torch.randn(2 * side, side, generator=generator) * 0.02
        found[f"layers.{layer}.norm.weight"] = torch.ones(side)
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def noise(tensors: Tensors, size: float = 0.002) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return {name: one + torch.randn(one.shape, generator=generator) * size for name, one in tensors.items()}


def small_steps(tensors: Tensors, share: float) -> tuple[Tensors, int]:
    """As reinforcement learning does it: a share of every bfloat16 matrix one float further from zero, norms as they
    were. Also how many numbers changed."""
    generator = torch.Generator().manual_seed(1)
    found, changed = dict(tensors), 0
    for name, one in tensors.items():
        if one.ndim == 2:
            moved = torch.rand(one.shape, generator=generator) < share
            found[name] = (one.view(torch.int16) + moved.to(torch.int16)).view(torch.bfloat16)
            changed += int(moved.sum())
    return found, changed


def case(base: Tensors, tuned: Tensors, store: ArtifactStore) -> Case:
    before, after = checkpoint_of(base, store), checkpoint_of(tuned, store)
    return Case(before, after, extract_update(before, after, Extract(), store))


def rl_case(store: ArtifactStore, share: float = 0.1) -> tuple[Case, int]:
    base = weights(torch.bfloat16)
    tuned, changed = small_steps(base, share)
    return case(base, tuned, store), changed
