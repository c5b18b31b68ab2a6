"""Rows of a benchmark's table, and how ratios are written."""

from __future__ import annotations

from dataclasses import dataclass


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
