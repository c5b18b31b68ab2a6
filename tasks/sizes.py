"""Sizes as people write them, in the terminal, on pages and in MLflow alike."""

from __future__ import annotations


def size(count: float) -> str:
    """Bytes, in steps of a thousand: `95.9 kB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
