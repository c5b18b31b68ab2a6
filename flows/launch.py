"""Launch: run a chain under somebody's eyes, with progress, and at the end tables, a picture and the next step."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from configs.chain import ChainConfig, dump_chain
from flows import progress
from flows.board import Board
from flows.chain import Outcome, chain, count_steps
from flows.picture import draw
from flows.registering import patiently
from flows.report import accuracy_rows, accuracy_table, comparison_table, gate_lines, size_lines
from flows.terminal import called
from flows.workplace import Workplace
from storage.errors import Unavailable
from storage.manifest import canonical, digest
from storage.registry import Stage
from storage.tables import write_rows


def launch(config: ChainConfig, place: Workplace, console: Console, quiet: bool) -> Outcome:
    """Run `config` and report on `console`."""
    place.store.objects.ready()  # an unreachable, forbidden or unsafe store is said now, not after the first training
    if not quiet:
        lines = ", ".join(line.name for line in config.lines)
        console.print(f"[bold]{config.name}[/]: {len(config.tasks)} tasks into {lines}")
        console.print(f"store {place.store.url}, device {place.settings.device}")
    with Board(console, quiet, count_steps(config)) as board:
        progress.watch(board)
        outcome = chain(config)
    picture, table = (place.settings.home / "reports" / f"{config.name}{suffix}" for suffix in (".png", ".parquet"))
    if board.done or not (picture.exists() and table.exists()):
        draw(outcome, picture)
        table.write_bytes(write_rows(accuracy_rows(outcome)))
    missing = _log(config, place, outcome, [picture, table])
    if not quiet:
        _print(outcome, console)
    if board.done == 0:
        console.print(f"nothing to do: all {board.reused_steps} steps were done before")
    elif not quiet:
        console.print(f"{board.done} steps done, {board.reused_steps} found done")
    for line in outcome.lines:
        if line.beyond:
            held = ", ".join(line.beyond)
            console.print(f"note: {line.name} also holds {held}, which this chain does not have: not measured here")
    if missing is not None:
        console.print(f"note: the run with the summary is not in MLflow: {missing}", soft_wrap=True)
        console.print(
            "Every version is. When it answers, the same command writes that run too, and makes nothing again"
        )
    best = outcome.best.last
    console.print(f"best: {best.version.name} version {best.version.version}, {best.model}", soft_wrap=True)
    if not quiet:
        console.print(f"picture: {picture}", soft_wrap=True)
        command = called()
        console.print(f"next: {command} export {best.version.name} ./model    or    {command} ui", soft_wrap=True)
    return outcome


def _log(config: ChainConfig, place: Workplace, outcome: Outcome, files: list[Path]) -> Unavailable | None:
    """The run that compares the lines. Returns why it could not be written: all that it tells is kept without it."""
    averages = {f"{line.name}/average": line.last.summary.average for line in outcome.lines}
    best = outcome.best.last
    tags = {"run": f"{config.name}: summary", "best": f"{best.version.name} v{best.version.version}"}
    models = [line.last.model for line in outcome.lines]
    key = digest(canonical([place.store.url, dump_chain(config), models]))
    summary = Stage("summary", best.model, dump_chain(config), averages, tags=tags)
    try:
        patiently(lambda: place.registry.log_chain(config.name, key, summary, files))
    except Unavailable as error:
        return error
    return None


def _print(outcome: Outcome, console: Console) -> None:
    console.print()
    console.print(accuracy_table(outcome, outcome.best))
    console.print(comparison_table(outcome))
    for text in size_lines(outcome):
        console.print(text)
    for line in outcome.lines:
        for text in gate_lines(line):
            console.print(text, markup=False)
