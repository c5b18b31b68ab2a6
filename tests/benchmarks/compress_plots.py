"""Pictures of the compression benchmarks: sizes and speeds by share, and accuracy against bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from tests.benchmarks.codec_quality import Quality, by_codec
from tests.benchmarks.coding import Measured

_MARKS = "osD^vP*Xph<>"


def speeds(name: str, rows: Sequence[Measured], goals: tuple[float, float], target: Path) -> None:
    """Size, encoding and decoding by share; ours in bold. Dotted: the goals."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    size, encode, decode = figure.subplots(1, 3)
    over = name == "ternary"
    _lines(size, rows, lambda row: 8 * row.per_parameter / row.bound if over else 2 / row.per_parameter)
    _lines(encode, rows, lambda row: row.speed(row.encode))
    _lines(decode, rows, lambda row: row.speed(row.decode))
    word = "kept" if over else "changed"
    size.set(ylabel="size, as a multiple of the entropy bound" if over else "times smaller than bf16")
    if over:
        size.axhline(1, color="0.3", linestyle=":")
        size.set_title("Size (dotted: the bound)", loc="left")
    else:
        size.set_yscale("log")
        ticks = [1, 2, 5, 10, 20, 50, 100, 200]
        size.yaxis.set(major_locator=FixedLocator(ticks), minor_locator=NullLocator(), major_formatter=_plain())
        size.set_title("Size", loc="left")
    kinds = list(dict.fromkeys(row.data for row in rows))
    lines = [f"{kind}: {line}" for kind, line in zip(kinds, ("full lines", "dashed"), strict=False)]
    figure.suptitle(", ".join(lines), fontsize=10, x=0.01, ha="left")
    for axes, what, goal in ((encode, "Encoding", goals[0]), (decode, "Decoding", goals[1])):
        axes.axhline(goal, color="0.3", linestyle=":")
        axes.set(ylabel="GB/s of dense bf16 on one core", ylim=(0, None))
        axes.set_title(f"{what} (dotted: the goal, {goal} GB/s)", loc="left")
    shares = sorted({row.share for row in rows})
    for axes in (size, encode, decode):
        axes.set(xlabel=f"share of numbers {word}", xticks=range(len(shares)))
        axes.set_xticklabels([f"{share:.0%}" for share in shares])
        axes.grid(alpha=0.3)
    figure.legend(*size.get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=9, frameon=False)
    figure.savefig(target, dpi=110)


def _lines(axes: Any, rows: Sequence[Measured], height: Callable[[Measured], float]) -> None:
    shares = sorted({row.share for row in rows})
    kinds = list(dict.fromkeys(row.data for row in rows))
    for color, way in enumerate(dict.fromkeys(row.way for row in rows if row.bytes)):
        for kind in kinds:
            found = [row for row in rows if (row.way, row.data) == (way, kind) and row.bytes]
            axes.plot(
                [shares.index(row.share) for row in found],
                [height(row) for row in found],
                marker="o",
                markersize=4,
                color=f"C{color}",
                linestyle="-" if kind == kinds[0] else "--",
                linewidth=2.5 if found and found[0].ours else 1.2,
                label=way if kind == kinds[0] else None,
            )


def quality(rows: Sequence[Quality], target: Path) -> None:
    """Accuracy against how much smaller the files are, of single models and of merged ones.

    The axis of accuracy is logarithmic in the share of errors: what matters is close to the exact update.
    """
    figure = Figure(figsize=(14, 7), layout="constrained")
    panels = figure.subplots(1, 2)
    exact = next(row for row in rows if row.codec == "dense")
    for axes, key, title in (
        (panels[0], "single", "One task's update on the base, on that task"),
        (panels[1], "tsv_m", "All six updates merged by tsv_m, on all tasks"),
    ):
        for number, (codec, several) in enumerate(by_codec(rows)):
            places = [(row.ratio, _errors(row, key)) for row in several]
            keys = ", ".join(key for key, _ in _words(several[0].setting))
            label = f"{codec} ({keys})" if keys else codec
            axes.plot(
                *zip(*places, strict=True), _MARKS[number], color=f"C{number}", markersize=7, alpha=0.8, label=label
            )
        axes.axhline(_errors(exact, key), color="0.5", linestyle=":", linewidth=1)
        axes.margins(x=0.12, y=0.06)
        axes.set(xscale="log", xlabel="times smaller than bf16, headers included")
        axes.set(yscale="log", ylabel="accuracy, %")
        axes.invert_yaxis()
        axes.yaxis.set(minor_locator=NullLocator(), major_formatter=FuncFormatter(lambda value, _: f"{100 - value:g}"))
        axes.yaxis.set_major_locator(FixedLocator([1, 2, 3, 5, 7, 10, 12, 15, 20, 30, 40, 50, 70]))
        ticks = [0.5, 1, 2, 5, 10, 20, 50, 100]
        axes.xaxis.set(major_locator=FixedLocator(ticks), minor_locator=NullLocator(), major_formatter=_plain())
        axes.set_title(title, loc="left")
        axes.grid(alpha=0.3)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=9, fontsize=10, frameon=False
    )
    figure.draw_without_rendering()  # only then do the places of the marks hold
    for axes, key in zip(panels, ("single", "tsv_m"), strict=True):
        _label(axes, rows, key)
    figure.savefig(target, dpi=110)


def _errors(row: Quality, key: str) -> float:
    """In percent; not zero, of which there is no logarithm."""
    return max(100 - 100 * float(getattr(row, key)), 0.1)


def _label(axes: Any, rows: Sequence[Quality], key: str) -> None:
    """The settings' values beside their marks, at the nearest place where nothing else is. All in points."""
    points = 72 / axes.figure.dpi
    low, high = (points * edge for edge in axes.get_window_extent().intervalx)
    colors = {codec: f"C{number}" for number, (codec, _) in enumerate(by_codec(rows))}
    places = [(row.ratio, _errors(row, key)) for row in rows]
    marks = [points * axes.transData.transform(place) for place in places]
    taken = [(x - 4, y, 8.0) for x, y in marks]  # left, middle, width
    around = [(side, step) for distance in range(0, 90, 3) for side in (1, -1) for step in (distance, -distance)]
    for row, place, (x, y) in zip(rows, places, marks, strict=True):
        words = ", ".join(value for _, value in _words(row.setting))
        width = 3.9 * len(words)  # of letters of size 7
        boxes = [(x + 7 if side > 0 else x - 7 - width, y + step, width) for side, step in around]
        best = next((n for n, box in enumerate(boxes) if low < box[0] < high - width and _free(box, taken)), 0)
        taken.append(boxes[best])
        side, step = around[best]
        axes.annotate(
            words,
            place,
            (7 * side, step),
            textcoords="offset points",
            va="center",
            ha="left" if side > 0 else "right",
            fontsize=7,
            color=colors[row.codec],
            arrowprops={"arrowstyle": "-", "color": colors[row.codec], "linewidth": 0.5, "shrinkA": 0, "shrinkB": 0}
            if abs(step) > 5
            else None,
        )


def _free(box: tuple[float, float, float], taken: Sequence[tuple[float, float, float]]) -> bool:
    left, middle, width = box
    return all(left + width < a or a + other < left or abs(middle - b) > 8 for a, b, other in taken)


def _words(setting: str) -> list[tuple[str, str]]:
    """`density 0.1, alpha norm` as pairs."""
    return [(key, value) for key, _, value in (one.partition(" ") for one in setting.split(", ") if one)]


def _plain() -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{value:g}")
