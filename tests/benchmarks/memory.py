"""Peak memory of one fold, measured in a process of its own that does nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.refs import CheckpointRef, StateRef, UpdateRef
from tasks.merge import fold_update
from tasks.mergers import MERGERS
from tasks.recipe import Recipe
from tests.builders import checkpoint_of, update_of

_SHAPE = (2048, 1024)
_BYTES = 4 * _SHAPE[0] * _SHAPE[1]
# glibc learns to keep freed tensors for itself, more in one run than in the next; what is kept is not what is used
_STEADY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


def peak_of_fold(merger: str, count: int) -> float:
    """Memory that folding a second update takes, in tensors, for a model of `count` equal ones."""
    with TemporaryDirectory() as folder:
        store = ArtifactStore(DirectoryObjects(Path(folder)))
        names = [f"layer.{number:02d}.weight" for number in range(count)]
        base = checkpoint_of({name: torch.zeros(_SHAPE) for name in names}, store)
        update = update_of({name: torch.randn(_SHAPE) for name in names}, base, store)
        state = fold_update(base, None, update, Recipe(MERGERS[merger]()), store)
        command = [sys.executable, "-m", "tests.benchmarks.memory", folder, merger, base, state, update]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **_STEADY})
        return float(done.stdout) / _BYTES


def _resident(field: str) -> int:
    """Bytes of resident memory: `VmRSS` now, or `VmHWM` the most since `_forget_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"the kernel does not tell {field}")


def _forget_peak() -> None:
    """getrusage would do on any system, but its peak cannot be reset, and importing torch is one."""
    Path("/proc/self/clear_refs").write_text("5")


def _fold(folder: str, merger: str, base: str, state: str, update: str) -> int:
    """Fold once; bytes of resident memory above what the process had before."""
    store = ArtifactStore(DirectoryObjects(Path(folder)))
    _forget_peak()
    before = _resident("VmRSS")
    refs = CheckpointRef(base), StateRef(state), UpdateRef(update)  # type: ignore[arg-type]
    fold_update(*refs, Recipe(MERGERS[merger]()), store)
    return _resident("VmHWM") - before


if __name__ == "__main__":
    print(_fold(*sys.argv[1:]))
