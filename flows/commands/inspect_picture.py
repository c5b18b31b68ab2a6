"""The picture of an inspection: what changed in every layer, how far, and what the codecs make of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from storage.refs import short
from tasks.inspection.costs import CodecCost
from tasks.inspection.findings import OUTSIDE, Group, Inspection
from tasks.inspection.verdict import percent
from tasks.kinds import FineKind

_COLOURS: dict[FineKind, str] = {
    "attention": "#1f77b4",
    "mlp": "#d95f02",
    "norm": "#2ca02c",
    "bias": "#9467bd",
    "embedding": "#8c564b",
    "head": "#e377c2",
    "other": "#7f7f7f",
}
_MARKERS = (10, 8, 6.5, 5, 4, 3.2, 2.5)  # equal values stay visible, as rings
_TURNED = 12  # layers from which their labels are thinned out
_PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # text on top of a line
_KEPT, _LOST = "#2b7a4b", "#4c72b0"


def draw(found: Inspection, path: Path) -> Path:
    """Draw `found` to the file `path`."""
    figure = Figure(figsize=(11, 6.4) if found.costs else (7, 6.4), layout="constrained")
    figure.suptitle(f"{short(found.update)}: {found.total.elements:,} numbers", fontsize=11)
    columns = figure.subfigures(1, 2, width_ratios=(1.1, 1)) if found.costs else [figure]
    above, below = columns[0].subplots(2, 1, sharex=True)
    relative = found.total.relative is not None
    compared = "in a bit" if found.by_bits else "not zero in the update"
    _by_layer(above, found, lambda one: one.changed, f"numbers changed ({compared})")
    _by_layer(
        below, found, lambda one: one.relative if relative else one.norm, "norm over the base's" if relative else "norm"
    )
    above.yaxis.set_major_formatter(PercentFormatter(1.0))
    above.set_ylim(-0.03, 1.03 if _top(found) > 0.3 else None)
    if relative:
        below.yaxis.set_major_formatter(PercentFormatter(1.0))
    below.set_ylim(bottom=0)
    below.set_xlabel("layer")
    above.legend(fontsize=8, ncols=3, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.08))
    if found.costs:
        _bars(columns[1].subplots(), found)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _top(found: Inspection) -> float:
    return max((part.changed for one in found.layers for part in one.kinds), default=0.0)


def _by_layer(axes: Any, found: Inspection, value: Callable[[Group], float | None], title: str) -> None:
    """A line for every kind, with a gap where a layer has none of it; what is in no layer stands apart at the end."""
    labels = [one.label for one in found.layers]
    for size, (kind, colour) in zip(_MARKERS, _COLOURS.items(), strict=True):
        parts = [one.only(kind) for one in found.layers]
        points = [
            (place, number) for place, part in enumerate(parts) if part.members and (number := value(part)) is not None
        ]
        inside = [point for point in points if labels[point[0]] != OUTSIDE]
        outside = [point for point in points if labels[point[0]] == OUTSIDE]
        if inside:
            axes.plot(*zip(*inside, strict=True), "o-", color=colour, label=kind, markersize=size, linewidth=1.4)
        if outside:
            axes.plot(*zip(*outside, strict=True), "D", color=colour, label=None if inside else kind, markersize=size)
    every = max(1, -(-len(labels) // _TURNED))
    ticks = [place for place in range(len(labels)) if place % every == 0 or labels[place] == OUTSIDE]
    axes.set_xticks(ticks, [labels[place] for place in ticks])
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)


def _bars(axes: Any, found: Inspection) -> None:
    """Bytes as bars, with the error and the ratio beside them; the smallest at the top."""
    costs = sorted((one for one in found.costs if one.bytes is not None), key=lambda one: -(one.bytes or 0))
    sizes = [(one.bytes or 0) / 1e6 for one in costs]
    axes.barh(
        [one.codec for one in costs], sizes, color=[_KEPT if one.lossless else _LOST for one in costs], height=0.65
    )
    for place, (one, size) in enumerate(zip(costs, sizes, strict=True)):
        axes.annotate(
            _said(one), (size, place), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9, bbox=_PLAIN
        )
    bf16 = found.bf16 / 1e6
    axes.axvline(bf16, color="0.5", linestyle="--", linewidth=1)
    axes.text(bf16, len(costs) - 0.4, "bfloat16", ha="center", va="bottom", fontsize=8, color="0.4")
    axes.set_xlim(0, 1.55 * max([*sizes, bf16]))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("MB, all files")
    axes.set_title("codecs: times smaller than bfloat16, and error", fontsize=10, loc="left", pad=16)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _said(cost: CodecCost) -> str:
    error = "every bit" if cost.lossless else f"error {percent(cost.error or 0.0)}"
    return f"{cost.ratio or 0.0:.2g}x, {error}"
