"""Benchmark: one OPCM step on a CLIP ViT-B/32-shaped vision tower, beside fusion_bench's OPCM.

python -m tests.benchmarks.opcm_step      FUSION_BENCH=<python that has fusion-bench> for the peer's rows
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from torch import Tensor

from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.manifest import Lineage
from storage.refs import CheckpointRef, StateRef, UpdateRef
from tasks.materialize import materialize
from tasks.merge import fold_update
from tasks.mergers import Opcm
from tasks.mergers.base import Target
from tasks.naming import Skeleton
from tasks.parallel import Budget, in_order
from tasks.recipe import Recipe
from tasks.tensors import read_tensor
from tests.benchmarks.rows import Row, times
from tests.benchmarks.usage import Usage, in_own_process, tell

_PEER = Path(__file__).parent / "peers" / "opcm_fusion_bench.py"
_SETTINGS = {
    "exact": Opcm(alpha=0.5),
    "diagonal left in": Opcm(alpha=0.5, diagonal="leave"),
}


def tower(store: ArtifactStore) -> tuple[CheckpointRef, list[UpdateRef]]:
    """A base and two updates of the tower, every parameter moved."""
    config = transformers.CLIPVisionConfig(patch_size=32, architectures=["CLIPVisionModel"])
    slots = Skeleton(json.dumps(config.to_dict()).encode()).slots
    generator = torch.Generator().manual_seed(0)

    def drawn(kind: str, lineage: Lineage, size: float) -> str:
        draft = store.draft(kind, lineage)  # type: ignore[arg-type]
        for name, slot in slots.items():
            tensor = torch.randn(slot.shape, generator=generator) * size
            draft.add(name, {"tensor": tensor}, role=slot.role, dtype="F32", shape=slot.shape)
        return draft.commit()

    base = CheckpointRef(drawn("checkpoint", Lineage("ingest"), 0.02))  # type: ignore[arg-type]
    return base, [UpdateRef(drawn("update", Lineage("extract", {"base": base}), 1e-4)) for _ in range(2)]  # type: ignore[arg-type]


def rows() -> Iterator[Row]:
    """Twice: what the peer does, from memory into memory; and the whole step of a line, with reading from the disk,
    checking digests, writing the state and writing the merged model."""
    ours: dict[tuple[str, int], Usage] = {}
    for how, flag in (("in memory", ["memory"]), ("with store", [])):
        for setting in _SETTINGS:
            for cores in (1, 2):
                usage = in_own_process("tests.benchmarks.opcm_step", setting, str(cores), *flag)[0]
                ours[f"{setting}, {how}", cores] = usage
    peer = os.environ.get("FUSION_BENCH")
    theirs = {n: in_own_process(str(_PEER), threads=n, python=peer)[0] for n in (1, 2)} if peer else {}
    for (setting, cores), usage in ours.items():
        what = f"OPCM step of ViT-B/32, {setting}, {cores} core{'s' * (cores > 1)}"
        found = f"{usage.wall:.1f} s, {usage.cpu:.1f} s of CPU, {usage.peak / 1e9:.2f} GB"
        if cores not in theirs:
            yield Row(what, found, "FUSION_BENCH is not set", "")
            continue
        other = theirs[cores]
        yield Row(
            what,
            found,
            f"{other.wall:.1f} s, {other.cpu:.1f} s of CPU, {other.peak / 1e9:.2f} GB  fusion_bench",
            f"wall {times(usage.wall, other.wall)}, CPU {times(usage.cpu, other.cpu)}, "
            f"memory {times(usage.peak, other.peak)}",
        )


def _arithmetic(setting: str, cores: int) -> None:
    """The same numbers from memory and into memory, as the peer has them: no files, no digests."""
    torch.set_num_threads(1)
    merger = _SETTINGS[setting]
    with TemporaryDirectory() as folder:
        store = ArtifactStore(DirectoryObjects(Path(folder)))
        base, updates = tower(store)
        root, first, second = (store.open(ref) for ref in (base, *updates))
        held = [{name: read_tensor(one, name).clone() for name in one.names} for one in (root, first, second)]
    facts: dict[str, float] = {"count": 1, "norms": 1.0, "scale": 1.0}

    def merged(name: str) -> Tensor:
        target = Target(name, root.record(name).role)
        state, _ = merger.fold(None, held[1][name], target, {}, {})
        state, _ = merger.fold(state, held[2][name], target, facts, {})
        return held[0][name] + merger.delta(state, facts, target)

    def size(name: str) -> float:
        return 24.0 * held[0][name].numel()

    tell(lambda: list(in_order(root.names, merged, size, Budget(workers=cores))))


def _step(setting: str, cores: int) -> None:
    """Fold the second update and write the model, once, in this process."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        store = ArtifactStore(DirectoryObjects(Path(folder)))
        base, (first, second) = tower(store)
        recipe, budget = Recipe(_SETTINGS[setting]), Budget(workers=cores)
        state = fold_update(base, None, first, recipe, store, budget=budget)

        def work() -> None:
            after: StateRef = fold_update(base, state, second, recipe, store, budget=budget)
            materialize(base, after, store, budget=budget)

        tell(work)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        (_arithmetic if sys.argv[3:] else _step)(sys.argv[1], int(sys.argv[2]))
    else:
        for row in rows():
            print(row)
