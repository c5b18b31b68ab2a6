"""Reports: what a run came to, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from flows.chain import Outcome
from flows.growing import Grown
from flows.tables import recipe_name
from flows.workplace import here
from tasks.evaluate import leading


def accuracy_table(outcome: Outcome, line: Grown) -> Table:
    """Task by step: alone, and merged after each step; then what the line's summary says."""
    store = here().store
    table = _table(f"{line.name}: accuracy in % after each merge")
    table.add_column("task")
    table.add_column("base", justify="right")
    table.add_column("alone", justify="right")
    for step in line.steps:
        table.add_column(f"+{step.entry.task}", justify="right")
    base = leading(store.open(outcome.base_scores))
    matrix = [leading(store.open(step.scores)) for step in line.steps]
    alone = {one.task.name: leading(store.open(one.alone))[one.task.name] for one in outcome.prepared}
    for name in alone:
        merged = [_percent(row[name]) if name in row else "" for row in matrix]
        table.add_row(name, _percent(base[name]), _percent(alone[name]), *merged)
    table.add_section()
    means = [_percent(step.summary.average) for step in line.steps]
    table.add_row("average", _percent(_mean(base)), _percent(_mean(alone)), *means, style="bold")
    forgot = [_percent(step.summary.forgetting) for step in line.steps]
    table.add_row("forgetting", "", "", *forgot)
    if any(step.summary.forward_transfer is not None for step in line.steps):
        table.add_row("forward", "", "", *(_percent(step.summary.forward_transfer) for step in line.steps))
    if any(step.summary.retained is not None for step in line.steps):
        table.add_row("of the base", "100.0", "", *(_percent(step.summary.retained) for step in line.steps))
        table.add_row("trade-off", "", "", *(_percent(step.summary.tradeoff) for step in line.steps))
    mergers = [recipe_name(step.entry.merger) for step in line.steps]
    if len(set(mergers)) > 1:
        table.add_row("merger", "", "", *mergers)
    if any(step.entry.factor != 1 for step in line.steps):
        table.add_row("factor", "", "", *(f"{step.entry.factor:g}" for step in line.steps))
    return table


def accuracy_rows(outcome: Outcome) -> list[dict[str, Any]]:
    """The accuracy matrices of all lines as rows: line, step, the task just merged, the task measured, its accuracy.

    Step 0 is the base (no line, nothing merged) and each task's own model (line `alone`).
    """
    store = here().store
    rows = [_row("", 0, "", name, value) for name, value in leading(store.open(outcome.base_scores)).items()]
    for one in outcome.prepared:
        rows.append(_row("alone", 0, one.task.name, one.task.name, leading(store.open(one.alone))[one.task.name]))
    for line in outcome.lines:
        for step in line.steps:
            scores = leading(store.open(step.scores))
            rows += [_row(line.name, step.entry.step, step.entry.task, name, value) for name, value in scores.items()]
    return rows


def _row(line: str, step: int, merged: str, task: str, accuracy: float) -> dict[str, Any]:
    return {"line": line, "step": step, "merged": merged, "task": task, "accuracy": accuracy}


def comparison_table(outcome: Outcome) -> Table:
    """One row per line, the best first; with the factors of the newest merges if any is not 1."""
    table = _table("the merged models, in %")
    searched = any(line.last.entry.factor != 1 for line in outcome.lines)
    held = any(line.last.summary.held_out is not None for line in outcome.lines)
    columns = ["line", "merger", *["factor"] * searched, "average", "worst", "of alone", "forgetting", "forward"]
    columns += [*["trade-off"] * held, "version"]
    for column in columns:
        table.add_column(column, justify="left" if column in ("line", "merger") else "right", no_wrap=column == "line")
    for line in sorted(outcome.lines, key=lambda one: -one.last.summary.average):
        summary, last = line.last.summary, line.last
        table.add_row(
            line.name,
            recipe_name(last.entry.merger),
            *[f"{last.entry.factor:g}"] * searched,
            _percent(summary.average),
            _percent(summary.worst),
            _percent(summary.normalised),
            _percent(summary.forgetting),
            _percent(summary.forward_transfer),
            *[_percent(summary.tradeoff)] * held,
            str(last.version.version),
            style="bold" if line is outcome.best else "",
        )
    return table


def gate_lines(line: Grown) -> Iterator[str]:
    """What a line's gate said of its merges, the newest last."""
    for step in sorted([*line.steps, *line.left_out], key=lambda one: one.version.version):
        if step.verdict is not None:
            what = "was left out" if step in line.left_out else "is no champion"
            passed = f"passed, all merged again: {step.entry.why}" if step.entry.action == "rebuild" else "passed"
            said = passed if step.verdict.passed else f"{what}: {'; '.join(step.verdict.reasons)}"
            yield f"{line.name} version {step.version.version}, + {step.entry.task}: {said}"


def size_lines(outcome: Outcome) -> Iterator[str]:
    """What the updates cost before and after compression, in real files."""
    store = here().store
    after = [store.open(one.update).manifest for one in outcome.prepared]
    before = [store.open(str(manifest.lineage.inputs["update"])).manifest for manifest in after]
    bf16 = sum(int(manifest.facts["bf16_bytes"]) for manifest in after)
    dense, small = (sum(manifest.tensor_bytes for manifest in manifests) for manifests in (before, after))
    yield (
        f"{len(after)} updates: {dense / 1e6:.2f} MB as extracted, {small / 1e6:.2f} MB compressed, "
        f"{bf16 / small:.1f} times smaller than the model in bfloat16 ({bf16 / 1e6:.2f} MB)"
    )


def _table(title: str) -> Table:
    """A table narrow enough for a terminal of 80 columns with half a dozen tasks."""
    return Table(
        title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1)
    )


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"
