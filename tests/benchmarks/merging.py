"""Benchmarks of merging: speed, memory and quality, as a table and pictures in tests/benchmarks/results.

python -m tests.benchmarks.merging                 all of them, half an hour on two cores
python -m tests.benchmarks.merging opcm growth     only these; the results of the others stay

Peers are run where the environment names them, and their rows say so where it does not:
  FUSION_BENCH   a Python that has fusion-bench 0.2.33 (transformers 4.57, datasets 4.4)
  MERGEKIT       the mergekit-yaml command of mergekit 0.1.4 or newer
The part `gpu` is measured where torch sees one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console

from tests.benchmarks import growth, mergekit, on_gpu, opcm_step, quality
from tests.benchmarks.rows import Row, chosen, run_parts
from tests.benchmarks.usage import Usage

RESULTS = Path(__file__).parent / "results"


def opcm(console: Console) -> list[Row]:
    return list(opcm_step.rows())


def folders(console: Console) -> list[Row]:
    return list(mergekit.rows())


def cost(console: Console) -> list[Row]:
    sizes, numbers = list(growth.by_size()), list(growth.by_number())
    _draw_cost(sizes, numbers)
    return list(growth.rows(sizes, numbers))


def digits(console: Console) -> list[Row]:
    with TemporaryDirectory() as folder:
        table = quality.overview(quality.measure(Path(folder), console))
    (RESULTS / "quality.json").write_text(json.dumps(table, indent=1) + "\n")
    _draw_quality(table)
    return []


def gpu(console: Console) -> list[Row]:
    return list(on_gpu.rows())


PARTS = {"opcm": opcm, "mergekit": folders, "growth": cost, "quality": digits, "gpu": gpu}


def main() -> None:
    console = Console()
    wanted = [part for part in chosen(PARTS) if part != "gpu" or torch.cuda.is_available()]
    _write_page(run_parts(PARTS, wanted, RESULTS / "rows.json", console))
    console.print((RESULTS / "README.md").read_text(), markup=False)


def _write_page(found: Mapping[str, Any]) -> None:
    lines = ["# Merging, measured", "", "Written by `make bench-merge`; every ratio was taken in one run."]
    lines += ["Compression has [a page of its own](compress.md).", ""]
    for name, part in found.items():
        lines += [f"## {name}", "", "; ".join(part["machine"].values()) + ".", ""]
        if part["rows"]:
            lines += ["| what | ours | yardstick | ours / yardstick |", "|---|---|---|---|"]
            lines += ["| " + " | ".join(row.values()) + " |" for row in part["rows"]]
        if name == "quality":
            lines += _quality_lines(json.loads((RESULTS / "quality.json").read_text()))
        if name in ("growth", "quality"):
            lines += ["", f"![{name}]({name}.png)"]
        lines.append("")
    (RESULTS / "README.md").write_text("\n".join(lines))


def _quality_lines(table: list[Mapping[str, Any]]) -> list[str]:
    """Percent after six tasks: mean over three seeds by three orders."""
    steps = range(1, 7)
    lines = [
        "Accuracy in % on the digits, six tasks merged one by one: the mean over three seeds by three orders, from",
        "exact updates; `ternary` is the demo's own run, from ternary ones. The mean of the single models is the first",
        "step.",
        "",
        "| merger | average | ± | worst task | forgetting | ternary | " + " | ".join(f"{n}" for n in steps) + " |",
        "|" + "---|" * (6 + len(steps)),
    ]
    for row in table:
        numbers = [row[key] for key in ("average", "spread", "worst", "forgetting", "ternary")]
        numbers += [row[f"step {step}"] for step in steps]
        lines.append(f"| {row['merger']} | " + " | ".join(f"{number:.1f}" for number in numbers) + " |")
    return lines


def _draw_quality(table: list[Mapping[str, Any]]) -> None:
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    steps = list(range(1, 7))
    for place, row in enumerate(table):
        values = [row[f"step {step}"] for step in steps]
        bold = place < 5
        axes.plot(
            steps,
            values,
            marker="o" if bold else None,
            linewidth=2 if bold else 1,
            color=f"C{place}" if bold else "0.75",
            label=row["merger"] if bold else None,
        )
        if not bold and values[-1] > 20:
            axes.annotate(row["merger"], (6.05, values[-1]), fontsize=6, color="0.4", annotation_clip=False)
    axes.set(xlabel="tasks merged", ylabel="average accuracy on the tasks so far, %", xticks=steps, ylim=(0, 100))
    axes.set_title("Six tasks of the digits merged one by one: the five best mergers, the others in grey", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    figure.savefig(RESULTS / "quality.png", dpi=110)


def _draw_cost(sizes: list[tuple[str, str, Usage]], numbers: list[tuple[str, list[Usage], list[int]]]) -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    memory, time = figure.subplots(1, 2)
    for merger in growth.LARGE_MERGERS:
        points = [(float(size), usage.peak / 2**30) for name, size, usage in sizes if name == merger]
        memory.plot(*zip(*points, strict=True), marker="o", label=merger)
    memory.axhline(1, color="0.6", linestyle="--", label="memory budget")
    memory.set(xlabel="billions of parameters", ylabel="peak memory of a fold, GiB", xscale="log", ylim=(0, None))
    memory.set_title("One fold, by the size of the model", loc="left")
    for merger, usages, _ in numbers:
        time.plot(range(1, len(usages) + 1), [usage.wall for usage in usages], label=merger, linewidth=1)
    time.set(xlabel="number of the model", ylabel="seconds to add it", yscale="log")
    time.set_title("One fold, by the number of models before it", loc="left")
    for axes in (memory, time):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(RESULTS / "growth.png", dpi=110)


if __name__ == "__main__":
    main()
