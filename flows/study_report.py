"""What a study came to: a table for the terminal, the same as Markdown, and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from rich.box import SIMPLE_HEAD
from rich.table import Table

from flows.study import Findings, Row

WORDS = (
    "alone: the mean of each task's own model, in %",
    "each merger: the average over all tasks after the last merge, in %",
    "of the best merger: forgotten, points lost since each task was merged; kept, % of what the base could do",
    "kB: all updates, compressed; train s: seconds of all trainings",
)


def table(findings: Findings) -> Table:
    """A row per tuner, the best for merging first; the best merger of each in bold."""
    found = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in _columns(findings):
        found.add_column(name, justify="left" if name == "tuner" else "right", no_wrap=name == "tuner")
    for row in findings.rows:
        found.add_row(*_cells(row, "[bold]{}[/]"))
    return found


def markdown(findings: Findings) -> Iterator[str]:
    columns = _columns(findings)
    yield f"| {' | '.join(columns)} |"
    yield f"|---|{'---:|' * (len(columns) - 1)}"
    for row in findings.rows:
        yield f"| {' | '.join(_cells(row, '**{}**'))} |"


def draw(findings: Findings, path: Path) -> Path:
    """Three views of the same tuners: merged accuracy by merger, against bytes, and against the base's abilities."""
    rows = findings.rows[::-1]  # the best on top
    figure, (bars, sizes, kept) = plt.subplots(
        1, 3, figsize=(16, 1.6 + 0.34 * max(len(rows), 8)), width_ratios=[1.5, 1, 1], layout="constrained"
    )
    mergers = list(rows[0].cells)
    marks = dict(zip(mergers, "osD^vPX*<>" * 3, strict=False))
    for place, row in enumerate(rows):
        bars.plot(100 * row.alone, place, marker="|", color="black", markersize=14, label="alone" if not place else "")
        for number, (merger, cell) in enumerate(row.cells.items()):
            wide = None if cell.spread is None else 100 * cell.spread
            label = merger if not place else ""
            bars.errorbar(100 * cell.average, place, xerr=wide, fmt=marks[merger], color=f"C{number}", label=label)
    bars.set_yticks(range(len(rows)), [row.tuner for row in rows])
    bars.set_xlabel("average accuracy after the last merge, %")
    bars.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, fontsize=8)
    for number, row in enumerate(findings.rows):
        color, label = f"C{number % 10}", row.tuner
        marker = "o" if number < 10 else "s"
        sizes.plot(row.bytes / 1e3, 100 * row.best.average, marker, color=color, label=label)
        if row.best.retained is not None:
            kept.plot(100 * row.best.retained, 100 * row.best.average, marker, color=color, label=label)
    sizes.set_xscale("log")
    sizes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # powers of ten alone are too few, all digits too many
    sizes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    sizes.xaxis.set_minor_formatter(NullFormatter())
    sizes.set_xlabel("all updates, compressed, kB")
    sizes.set_ylabel("average accuracy, best merger, %")
    kept.set_xlabel("of the base's ability, kept, %")
    figure.legend(*sizes.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    for axes in (bars, sizes, kept):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def as_json(findings: Findings) -> dict[str, Any]:
    from dataclasses import asdict

    return {"base": findings.base, "tuners": [asdict(row) for row in findings.rows]}


def _columns(findings: Findings) -> list[str]:
    return ["tuner", "alone", *findings.rows[0].cells, "forgotten", "kept", "kB", "train s"]


def _cells(row: Row, strong: str) -> list[str]:
    merged = [f"{100 * cell.average:.1f}" for cell in row.cells.values()]
    best = max(range(len(merged)), key=lambda number: list(row.cells.values())[number].average)
    merged[best] = strong.format(merged[best])
    forgotten, kept = (
        "-" if share is None else f"{100 * share:.1f}" for share in (row.best.forgetting, row.best.retained)
    )
    took = "-" if row.seconds is None else f"{row.seconds:.1f}"
    return [row.tuner, f"{100 * row.alone:.1f}", *merged, forgotten, kept, f"{row.bytes / 1e3:.1f}", took]
