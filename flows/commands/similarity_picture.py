"""The picture of how alike updates are: their cosines, and their sign conflicts, as heat maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from flows.commands.similarity import colour_reach
from tasks.similarity import Similarity

_WRITTEN = 16  # updates up to which every cell says its number


def draw(found: Similarity, labels: Sequence[str], path: Path) -> Path:
    """Draw `found` to the file `path`: what goes together is red, what goes against each other is blue."""
    size = len(labels)
    side = max(3.4, 0.55 * size + 1.4)
    figure = Figure(figsize=(2 * side + 2.4, side + 0.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _heat_map(figure, left, found.cosines, labels, 0.0, "RdBu_r", lambda value: f"{value:.3f}")
    left.set_title("cosine: red together, blue against each other", fontsize=11)
    _heat_map(figure, right, found.conflicts, labels, 0.5, "RdBu", lambda value: f"{value:.0%}")
    right.set_title("sign conflicts, of the numbers that both change", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _heat_map(
    figure: Figure,
    axes: Any,
    square: NDArray[np.float64],
    labels: Sequence[str],
    middle: float,
    colours: str,
    write: Callable[[float], str],
) -> None:
    """Pairs only: an update beside itself says nothing and stays grey."""
    size = len(labels)
    pairs = square.copy()
    np.fill_diagonal(pairs, np.nan)
    reach = colour_reach(square, middle)
    axes.set_facecolor("0.88")
    image = axes.imshow(pairs, vmin=middle - reach, vmax=middle + reach, cmap=colours)
    if size <= _WRITTEN:
        for (row, column), value in np.ndenumerate(pairs):
            if row != column:
                shade = "white" if abs(value - middle) > 0.6 * reach else "black"
                axes.text(column, row, write(value), ha="center", va="center", color=shade, fontsize=9)
    axes.set_xticks(range(size), labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(size), labels)
    axes.set_xticks(np.arange(0.5, size - 1), minor=True)
    axes.set_yticks(np.arange(0.5, size - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    if middle:
        bar.formatter = PercentFormatter(1.0)
