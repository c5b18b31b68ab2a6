"""Benchmark: what one more fold costs, against the size of the model and against the number of models before it.

python -m tests.benchmarks.growth
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.manifest import Lineage
from storage.refs import CheckpointRef, StateRef, UpdateRef
from tasks.merge import fold_update
from tasks.mergers import MERGERS
from tasks.parallel import Budget
from tasks.recipe import Recipe
from tests.benchmarks.rows import Row
from tests.benchmarks.usage import Usage, in_own_process, tell

# A decoder of hidden size 2048; the largest tensor is the embedding, 65.5 M numbers
_BLOCK = {
    "q.weight": (2048, 2048),
    "k.weight": (256, 2048),
    "v.weight": (256, 2048),
    "o.weight": (2048, 2048),
    "gate.weight": (5632, 2048),
    "up.weight": (5632, 2048),
    "down.weight": (2048, 5632),
    "norm.weight": (2048,),
}
_LARGE = {"0.1": 1, "0.5": 10, "1": 21, "3": 67}  # billions of parameters: blocks
_SMALL = {"attn.weight": (384, 384), "up.weight": (1536, 384), "down.weight": (384, 1536), "norm.weight": (384,)}
_BUDGET = Budget(workers=2, memory=2**30)
LARGE_MERGERS = ("average", "ties")
SMALL_MERGERS = ("average", "ties", "opcm", "tsv_m", "iso_c", "varm")
MODELS = 50


def by_size() -> Iterator[tuple[str, str, Usage]]:
    """Merger, billions of parameters, what folding a second update takes."""
    for merger in LARGE_MERGERS:
        for size in _LARGE:
            yield merger, size, in_own_process("tests.benchmarks.growth", "size", merger, size)[0]


def by_number() -> Iterator[tuple[str, list[Usage], list[int]]]:
    """Merger, what adding each of many models takes, and the bytes of each state."""
    for merger in SMALL_MERGERS:
        with TemporaryDirectory() as folder:
            usages = in_own_process("tests.benchmarks.growth", "number", merger, folder)
            store = ArtifactStore(DirectoryObjects(Path(folder)))
            states = [store.open(ref).manifest for ref in store.refs("state")]
            sizes = {int(one.facts["count"]): one.tensor_bytes for one in states}
            yield merger, usages, [sizes[number] for number in sorted(sizes)]


def rows(
    measured_sizes: list[tuple[str, str, Usage]], measured: list[tuple[str, list[Usage], list[int]]]
) -> Iterator[Row]:
    for merger in LARGE_MERGERS:
        found = {size: usage for name, size, usage in measured_sizes if name == merger}
        peaks = [usage.peak / 2**30 for usage in found.values()]
        text = ", ".join(f"{size} B {peak:.2f}" for size, peak in zip(found, peaks, strict=True))
        yield Row(
            f"peak memory of a fold, {merger}", f"{text} GiB", "budget 1 GiB", f"{peaks[-1] / peaks[1]:.2f} (flat is 1)"
        )
    for merger, usages, sizes in measured:
        first, last = (sum(one.wall for one in some) / len(some) for some in (usages[4:14], usages[-10:]))
        peaks = [max(one.peak for one in some) / 1e6 for some in (usages[4:14], usages[-10:])]
        yield Row(
            f"adding one model, {merger}",
            f"{last:.2f} s, {peaks[1]:.0f} MB, state {sizes[-1] / 1e6:.0f} MB at 41 to {MODELS}",
            f"{first:.2f} s, {peaks[0]:.0f} MB, state {sizes[4] / 1e6:.0f} MB at 5 to 14",
            f"time {last / first:.2f}, memory {peaks[1] / peaks[0]:.2f} (flat is 1)",
        )


def _store_model(store: ArtifactStore, kind: str, blocks: int, seed: int, base: str = "") -> str:
    """A small model with `blocks` blocks, every tensor drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    draft = store.draft(kind, Lineage("drawn", {"base": base} if base else {}, {"seed": seed}))  # type: ignore[arg-type]
    for block in range(blocks):
        for leaf, shape in _SMALL.items():
            tensor = torch.randn(shape, generator=generator) * 1e-3
            role = "linear.weight" if len(shape) == 2 else "norm.weight"
            draft.add(f"layers.{block:02d}.{leaf}", {"tensor": tensor}, role=role, dtype="F32", shape=shape)
    return draft.commit()


def _repeated_model(store: ArtifactStore, kind: str, blocks: int, base: str = "") -> str:
    """A large model of equal blocks: the store keeps one of them, but every tensor is read, folded and hashed."""
    draft = store.draft(kind, Lineage("drawn", {"base": base} if base else {}, {"kind": kind}))  # type: ignore[arg-type]
    shapes = {"embed.weight": (32000, 2048), **_BLOCK}
    drawn = {}
    for seed, (leaf, shape) in enumerate(shapes.items()):
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1e-3
        drawn[leaf] = store.write_tensor(leaf, {"tensor": tensor}, role="linear.weight", dtype="F32", shape=shape)
    draft.share(drawn.pop("embed.weight"))
    for block in range(blocks):
        for leaf, record in drawn.items():
            draft.share(type(record)(**{**record.__dict__, "name": f"layers.{block:02d}.{leaf}"}))
    return draft.commit()


def _fold_large(merger: str, size: str) -> None:
    with TemporaryDirectory() as folder:
        store, recipe = ArtifactStore(DirectoryObjects(Path(folder))), Recipe(MERGERS[merger]())
        base = CheckpointRef(_repeated_model(store, "checkpoint", _LARGE[size]))  # type: ignore[arg-type]
        update = UpdateRef(_repeated_model(store, "update", _LARGE[size], base))  # type: ignore[arg-type]
        state = fold_update(base, None, update, recipe, store, budget=_BUDGET)
        tell(lambda: fold_update(base, state, update, recipe, store, budget=_BUDGET))


def _fold_many(merger: str, folder: str) -> None:
    """Add one small model after the other; the updates themselves are forgotten again."""
    store, recipe = ArtifactStore(DirectoryObjects(Path(folder))), Recipe(MERGERS[merger]())
    base = CheckpointRef(_store_model(store, "checkpoint", 4, 0))  # type: ignore[arg-type]
    state: list[StateRef | None] = [None]
    for number in range(1, MODELS + 1):
        update = UpdateRef(_store_model(store, "update", 4, number, base))  # type: ignore[arg-type]

        def add(update: UpdateRef = update) -> None:
            state[0] = fold_update(base, state[0], update, recipe, store, budget=Budget(workers=2))

        tell(add)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["size"]:
        _fold_large(*sys.argv[2:])
    elif sys.argv[1:2] == ["number"]:
        _fold_many(*sys.argv[2:])
    else:
        for row in rows(list(by_size()), list(by_number())):
            print(row)
