"""Rows of a benchmark's table, how ratios are written, and how the parts of a benchmark are run and kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tests.benchmarks.usage import machine


@dataclass(frozen=True)
class Row:
    """One measurement: ours, the yardstick, and what the ratio means."""

    what: str
    ours: str
    yardstick: str
    ratio: str


def times(ours: float, yardstick: float) -> str:
    """`1/5.3` when ours is less than the yardstick, `1.2` when it is more."""
    return f"1/{yardstick / ours:.1f}" if ours < yardstick else f"{ours / yardstick:.2f}"


def chosen(parts: Mapping[str, Any]) -> list[str]:
    """The parts that the command names, or all of them."""
    unknown = [name for name in sys.argv[1:] if name not in parts]
    if unknown:
        sys.exit(f"there is no benchmark {unknown[0]!r}; choose among {', '.join(parts)}")
    return sys.argv[1:] or list(parts)


def run_parts(
    parts: Mapping[str, Callable[[Console], Sequence[Any]]], wanted: Sequence[str], known: Path, console: Console
) -> dict[str, Any]:
    """Run parts that give dataclasses as rows, and write each into the JSON file `known` as soon as it is done.

    Returns all that the file holds: per part the machine and the rows. Parts that were not wanted stay.
    """
    torch.set_num_threads(1)
    known.parent.mkdir(exist_ok=True)
    found: dict[str, Any] = json.loads(known.read_text()) if known.exists() else {}
    for name in wanted:
        before = dict(machine())
        with console.status(f"{name} ..."):
            rows = parts[name](console)
        found[name] = {"machine": before, "rows": [asdict(row) for row in rows]}
        known.write_text(json.dumps(found, indent=1) + "\n")
    return found
