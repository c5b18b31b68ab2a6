"""The picture of a chain: the accuracy matrix of every line as a heat map, and accuracy against step per merger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

from flows.chain import Outcome
from flows.growing import Grown
from flows.workplace import here
from tasks.evaluate import leading


def draw(outcome: Outcome, path: Path) -> Path:
    """Draw `outcome` to the PNG file `path`."""
    count = len(outcome.lines)
    figure = plt.figure(figsize=(4.6 * count + 0.4, 8.2), layout="constrained")
    grid = figure.add_gridspec(2, count, height_ratios=[1.15, 1])
    for column, line in enumerate(outcome.lines):
        image = _heat_map(figure.add_subplot(grid[0, column]), line, names=column == 0)
    bar = figure.colorbar(image, ax=figure.axes[:count], shrink=0.8, pad=0.01)
    bar.set_label("accuracy, %")
    _curves(figure.add_subplot(grid[1, :]), outcome)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _heat_map(axes: Any, line: Grown, names: bool) -> Any:
    """Rows are steps, columns are tasks; what was not yet merged stays white."""
    store = here().store
    merged = [step.entry.task for step in line.steps]
    scores = [leading(store.open(step.scores)) for step in line.steps]
    tasks = list(scores[-1])
    matrix = np.full((len(merged), len(tasks)), np.nan)
    for row, found in enumerate(scores):
        for column, value in enumerate(found.values()):
            matrix[row, column] = 100 * value
    image = axes.imshow(matrix, vmin=0, vmax=100, cmap="viridis")
    for (row, column), value in np.ndenumerate(matrix):
        if not np.isnan(value):
            shade = "black" if value > 60 else "white"
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color=shade, fontsize=9)
    axes.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
    axes.set_yticks(range(len(merged)), [f"+ {name}" for name in merged] if names else [])
    axes.set_title(f"{line.name} (average {100 * line.last.summary.average:.1f} %)", fontsize=11)
    axes.set_xlabel("accuracy on")
    if names:
        axes.set_ylabel("after merging")
    return image


def _curves(axes: Any, outcome: Outcome) -> None:
    store = here().store
    names = [one.name for one in outcome.prepared]
    steps = np.arange(1, len(names) + 1)
    alone: dict[str, float] = {}
    single = []
    for one in outcome.prepared:
        alone[one.task.name] = leading(store.open(one.alone))[one.task.name]  # of several rounds, the newest
        single.append(100 * float(np.mean(list(alone.values()))))
    axes.plot(steps, single, color="black", linestyle=":", label="each task's own model")
    for line in outcome.lines:
        # an update that the gate left out has no point
        places = [1 + names.index(step.entry.task) for step in line.steps]
        axes.plot(places, [100 * step.summary.average for step in line.steps], marker="o", label=line.name)
    axes.set_xticks(steps, [f"{number}: + {one.name}" for number, one in zip(steps, outcome.prepared, strict=True)])
    axes.set_ylabel("average accuracy on the tasks so far, %")
    axes.set_ylim(0, 102)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    axes.set_title("one merged model, as tasks arrive", fontsize=11)
