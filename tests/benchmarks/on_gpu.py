"""Benchmark: merging on a GPU beside all cores of the CPU in the same machine.

python -m tests.benchmarks.on_gpu      where torch sees a GPU

A second update is merged and the merged weights are made, from memory into memory: the host's for the CPU and the
device's for the GPU, as large models stay where they are used. A tower is CLIP ViT-B/32's; the large matrices are those
of a model with 7 billion parameters.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from storage.artifacts import ArtifactStore
from storage.objects import MemoryObjects
from tasks.mergers import IsoC, Opcm, Sequential, Ties, TsvM
from tasks.mergers.base import Target
from tasks.parallel import Budget, in_order
from tasks.tensors import read_tensor
from tests.benchmarks.opcm_step import tower
from tests.benchmarks.rows import Row, times

_MERGERS: Mapping[str, Sequential] = {
    "OPCM, exact": Opcm(),
    "OPCM, diagonal left in": Opcm(diagonal="leave"),
    "TSV-M": TsvM(),
    "Iso-C": IsoC(),
    "TIES": Ties(trim="tensor"),
}
_LARGE = {"layers.0.q_proj.weight": (4096, 4096), "layers.0.up_proj.weight": (11008, 4096)}
_REPEATS = 2

Weights = Mapping[str, Tensor]


def rows() -> Iterator[Row]:
    gpu, cores = torch.cuda.get_device_name(), Budget().workers
    for what, roles, held, mergers in (
        ("a tower of ViT-B/32", *_tower(), list(_MERGERS)),
        ("a 4096 x 4096 and an 11008 x 4096 matrix", *_matrices(), ["OPCM, exact", "TSV-M"]),
    ):
        for name in mergers:
            here = _seconds(_MERGERS[name], roles, held, "cpu")
            torch.cuda.reset_peak_memory_stats()
            there = _seconds(_MERGERS[name], roles, held, "cuda")
            found = f"{there:.2f} s, {torch.cuda.max_memory_allocated() / 1e9:.1f} GB of {gpu}"
            yield Row(f"{name}, {what}", found, f"{here:.2f} s on {cores} cores", f"time {times(there, here)}")


def _tower() -> tuple[Mapping[str, str], list[Weights]]:
    """Roles, and the base and two updates."""
    store = ArtifactStore(MemoryObjects())
    base, updates = tower(store)
    opened = [store.open(ref) for ref in (base, *updates)]
    roles = {record.name: record.role for record in opened[0].manifest.tensors}
    return roles, [{name: read_tensor(one, name).clone() for name in roles} for one in opened]


def _matrices() -> tuple[Mapping[str, str], list[Weights]]:
    generator = torch.Generator().manual_seed(0)
    return dict.fromkeys(_LARGE, "linear.weight"), [
        {name: torch.randn(shape, generator=generator) * 1e-3 for name, shape in _LARGE.items()} for _ in range(3)
    ]


def _seconds(merger: Sequential, roles: Mapping[str, str], held: list[Weights], device: str) -> float:
    """The best time of merging both updates and adding them to the base, tensor by tensor."""
    base, one, two = ({name: tensor.to(device) for name, tensor in some.items()} for some in held)
    facts = [{}, {"count": 1.0, "norms": 1.0, "scale": 1.0}, {"count": 2.0, "norms": 2.0, "scale": 1.0}]

    def merged(name: str) -> Tensor:
        target = Target(name, roles[name])
        state, _ = merger.fold(None, one[name], target, facts[0], {})
        state, _ = merger.fold(state, two[name], target, facts[1], {})
        known = {**facts[2], "weight": 2.0, "majority": 1.0}
        return base[name] + merger.delta(state, known, target)

    def cost(name: str) -> float:
        return merger.workspace() * 4 * base[name].numel()

    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        for _ in in_order(list(roles), merged, cost, Budget()):
            pass
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    for row in rows():
        print(row)
