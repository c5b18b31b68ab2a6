"""What a comparison came to: the leaderboard for the terminal, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from flows.compare import Place
from flows.study_report import sizes_axis

WORDS = (
    "average, worst: over all tasks after the last merge, in %; ±: standard deviation over orders and seeds",
    "forgotten: points lost since each task's best; ahead: points above the base on tasks before they are merged",
    "kept: % of what the base could do; trade-off: geometric mean of average and score on that; kB: all updates",
)


def table(places: Sequence[Place]) -> Table:
    """A row per merger and codec, best first."""
    found = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    able = any(one.held_out is not None for one in places)
    names = ("average", "±", "worst", "forgotten", "ahead", *(("kept", "trade-off") if able else ()))
    for name in ("merger", "codec", "runs", *names, "kB"):
        found.add_column(name, justify="left" if name in ("merger", "codec") else "right")
    for one in places:
        shares = [one.average, one.spread, one.worst, one.forgetting, one.forward_transfer]
        shares += [one.retained, one.tradeoff] if able else []
        cells = ["-" if share is None else f"{100 * share:.1f}" for share in shares]
        found.add_row(escape(one.merger), escape(one.codec), str(one.runs), *cells, f"{one.bytes / 1e3:.1f}")
    return found


def draw(places: Sequence[Place], path: Path) -> Path:
    """Accuracy against bytes, against forgetting, and against what is held of the base's abilities, if they were
    measured: a colour per merger, a mark per codec."""
    able = any(one.held_out is not None for one in places)
    figure, panes = plt.subplots(1, 2 + able, figsize=(12 + 4 * able, 4.6), layout="constrained")
    sizes, forgotten = panes[:2]
    colours = {name: f"C{number % 10}" for number, name in enumerate(sorted({one.merger for one in places}))}
    marks = dict(zip(sorted({one.codec for one in places}), "osD^vPX*<>" * 3, strict=False))
    for one in places:
        style = {"color": colours[one.merger], "fmt": marks[one.codec], "label": f"{one.merger}, {one.codec}"}
        wide = None if one.spread is None else 100 * one.spread
        sizes.errorbar(one.bytes / 1e3, 100 * one.average, yerr=wide, **style)
        if one.forgetting is not None:
            forgotten.errorbar(100 * one.forgetting, 100 * one.average, yerr=wide, **style)
        if one.held_out is not None:
            panes[2].errorbar(100 * one.held_out, 100 * one.average, yerr=wide, **style)
    sizes_axis(sizes)
    sizes.set_ylabel("average after the last merge, %")
    forgotten.set_xlabel("forgotten, points")
    if able:
        panes[2].set_xlabel("on what the base can do, %")
    for axes in panes:
        axes.grid(alpha=0.3)
    figure.legend(*sizes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
