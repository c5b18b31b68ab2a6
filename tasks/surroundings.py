"""Surroundings: with which code, packages and hardware a step was registered. For people who look into MLflow; no
result, name or manifest depends on it."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

import torch

_ROOT = Path(__file__).parents[1]
_PATIENCE = 5  # seconds that git may take


@lru_cache(maxsize=1)
def surroundings() -> dict[str, str]:
    """As tags: `code` (release, and the commit where it runs from a checkout), `python`, `torch`, `hardware`, and
    `packages.sha256`, of the list that `packages` gives."""
    return {
        "code": f"{_release()}{_commit()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "hardware": _hardware(),
        "packages.sha256": hashlib.sha256(packages().encode()).hexdigest(),
    }


@lru_cache(maxsize=1)
def packages() -> str:
    """What is installed, a line each, as `pip install --constraint` reads it."""
    found = {(one.metadata["Name"], one.version) for one in distributions() if one.metadata["Name"]}
    return "".join(f"{name}=={number}\n" for name, number in sorted(found, key=lambda one: one[0].lower()))


def _release() -> str:
    try:
        return version("deltaworks")
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """The commit of the checkout that this file is in; nothing elsewhere, such as where it was installed."""
    if not (_ROOT / ".git").exists():
        return ""
    try:
        found = [_git("rev-parse", "--short=12", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")]
    except (OSError, subprocess.SubprocessError):
        return ""
    return f", commit {found[0]}{' with changes' if found[1] else ''}"


def _git(*words: str) -> str:
    command = ["git", "-C", str(_ROOT), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=True).stdout.strip()


def _hardware() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    found = f"{_processor()}, {cores} cores, {memory:.0f} GiB"
    return f"{found}, {', '.join(gpus)}" if gpus else found


def _processor() -> str:
    """The model of the CPU. Linux tells it in a file, other systems through platform."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()
