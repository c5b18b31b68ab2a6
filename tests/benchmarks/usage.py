"""Wall time, CPU time and peak memory of a piece of work, measured in a process of its own that does nothing else."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

# glibc learns to keep freed tensors for itself, more in one run than in the next; what is kept is not what is used
_STEADY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}


@dataclass(frozen=True)
class Usage:
    """Seconds, seconds of all threads, and bytes of resident memory above those before the work."""

    wall: float
    cpu: float
    peak: int


def in_own_process(
    module: str, *arguments: str, threads: int = 1, python: str = sys.executable, steady: bool = True
) -> list[Usage]:
    """What `module`, run as a script with these arguments, tells of each piece of its work.

    `steady`: give freed memory back at once, for peaks that can be compared. It costs time: pages are cleared anew.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    environment |= _STEADY if steady else {}
    start = ["-m", module] if python == sys.executable else [module]
    done = subprocess.run([python, *start, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return [Usage(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith('{"wall"')]


def tell(work: Callable[[], object]) -> None:
    """Do the work and print its usage for `in_own_process`."""
    print(json.dumps(asdict(used(work))))


def used(work: Callable[[], object]) -> Usage:
    """Do the work. Pages of mapped files count while they are held."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of importing torch
    before = _resident("VmRSS")
    start, cpu = time.perf_counter(), time.process_time()
    work()
    wall, spent = time.perf_counter() - start, time.process_time() - cpu
    return Usage(wall, spent, max(_resident("VmHWM") - before, 0))


def machine() -> Mapping[str, str]:
    """What a reader must know of the machine that measured."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": f"{model}, {os.cpu_count()} cores",
        "memory": f"{memory:.0f} GiB",
        "system": f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}",
        "load": f"{os.getloadavg()[0]:.1f} processes were running when it began",
    }


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"the kernel does not tell {field}")
