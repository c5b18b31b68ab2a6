"""`deltaworks why`: what a merge gave and took, task by task, and which update most likely took it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from flows.terminal import Memory, Quiet, Workers, called, console, errors_explained, open_workplace
from storage.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from flows.workplace import Workplace
    from storage.lines import Entry
    from storage.refs import ScoresRef
    from storage.registry_lines import LineVersion
    from tasks.why import Change, Without

_CHANCE = 0.05  # what is less likely by chance alone is called a loss, or a gain


def why(
    version: Annotated[
        str,
        typer.Argument(metavar="NAME[@VERSION]", help="A version of a line: a number, or an alias; without one, head."),
    ],
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="Merge again without each update, to find the cause of a loss.")
    ] = False,
    task: Annotated[
        str | None, typer.Option("--task", metavar="TASK", help="The loss to find the cause of; default: the largest.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, and nothing else.")] = False,
    memory: Memory = None,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Tell what a version changed since the one before it: its update, and gains and losses on every task.

    A change is tested on the same rows. With --leave-one-out the rest is merged again without each update in turn,
    aside, and asked for the task that lost: the update without which it does best is most likely the cause.

    Examples:  deltaworks why demo-opcm@6        deltaworks why demo-opcm@6 --leave-one-out
    """
    with errors_explained():
        from dataclasses import asdict

        from flows.board import bar
        from storage.lines import Line
        from storage.registry_lines import LineVersions, named_version
        from tasks.lineage.versions import entries_of
        from tasks.why import changes
        from tasks.why import leave_one_out as without

        place = open_workplace(memory=memory, workers=workers)
        name, which = named_version(version)
        all_of_it = LineVersions(place.registry, name).all()
        one = LineVersions(place.registry, name).one(which)
        known = name in Line.names(place.store.objects)
        entries = entries_of(one, all_of_it, list(Line(place.store.objects, name).entries()) if known else [])
        before = next((other for other in all_of_it if str(other.number) == one.tags.get("parent_version")), None)
        scores = _scores(one, place)
        found = changes(_scores(before, place) if before else None, scores, place.store)
        lost = _lost(found, task)
        causes: list[Without] = []
        if leave_one_out:
            with bar(console, f"asking {lost.task} without each update", quiet or as_json) as report:
                causes = without(
                    entries,
                    lost.task,
                    scores,
                    place.store,
                    place.settings.device,
                    budget=place.settings.budget,
                    report=lambda done, total, note: report(done, total),
                )
        if as_json:
            told = {"version": str(one), "before": str(before) if before else None, "task": entries[-1].task}
            lists = {"changes": [asdict(each) for each in found], "without": [asdict(each) for each in causes]}
            typer.echo(json.dumps({**told, "update": entries[-1].update, **lists}, indent=2))
            return
        _print(one, before, entries, found, lost, causes)


def _print(
    one: LineVersion,
    before: LineVersion | None,
    entries: Sequence[Entry],
    found: Sequence[Change],
    lost: Change,
    causes: Sequence[Without],
) -> None:
    from storage.refs import short

    last = entries[-1]
    onto = f"{before} + " if before else ""
    said = f"{one} is {onto}{last.task} ({short(last.fold.update)}), by {last.merger['name']}"
    if before is not None and before.tags["merger"] != one.tags["merger"]:
        said += f", by which all were merged again{f': {last.why}' if last.why else ''}"
    console.print(said, markup=False, soft_wrap=True)
    console.print(_changes(found))
    if causes:
        console.print(_causes(lost, causes))
        first = causes[0]
        lines = [f"no update is the cause: without any of them {lost.task} does not do better"]
        if first.gain > 0:
            points = f"{100 * first.gain:.1f} points more"
            lines = [f"most likely the cause: {first.task}, without which {lost.task} has {points}"]
            lines.append(f"without it: {called()} line rebuild {one.name} --drop {first.task}")
        for text in lines:
            console.print(text, markup=False, soft_wrap=True)
    elif lost.points is not None and lost.points < 0:
        text = f"largest loss: {lost.task}, {100 * lost.points:.1f} points. Which update took it:"
        console.print(f"{text} {called()} why {one} --leave-one-out", markup=False, soft_wrap=True)


def _scores(version: LineVersion, place: Workplace) -> ScoresRef:
    from storage.refs import ScoresRef, parse_ref

    if "scores" not in version.tags:
        raise InvalidInput(
            f"{version} was not evaluated, so that nothing is known of gains and losses",
            remedy="Give the line an exam (`deltaworks line policy --exam`), or run the chain that grows it",
        )
    found = ScoresRef(parse_ref(version.tags["scores"], "scores"))
    place.store.open(found, "scores")  # if it was pruned, that is said before anything else
    return found


def _lost(found: Sequence[Change], task: str | None) -> Change:
    """The change that the cause is looked for: the one that was asked for, or the largest loss."""
    if task is None:
        return found[0]
    for one in found:
        if one.task == task:
            return one
    raise InvalidInput(f"there is no task {task!r}", remedy=f"Its tasks: {', '.join(one.task for one in found)}")


def _changes(found: Sequence[Change]) -> Table:
    from rich.markup import escape

    table = _table("task", "before", "after", "change", "p", "")
    for one in found:
        values = ["" if value is None else f"{100 * value:.1f}" for value in (one.before, one.after)]
        if one.points is None:
            table.add_row(escape(one.task), *values, "", "", "new" if one.before is None else "")
            continue
        word = "" if one.p is None or one.p >= _CHANCE else "[red]loss[/]" if one.points < 0 else "[green]gain[/]"
        chance = "" if one.p is None else f"{one.p:.2g}"
        table.add_row(escape(one.task), *values, f"{100 * one.points:+.1f}", chance, word)
    return table


def _causes(lost: Change, causes: Sequence[Without]) -> Table:
    from rich.markup import escape

    table = _table("without", f"{lost.task} reaches", "more than with it")
    for one in causes:
        table.add_row(escape(one.task), f"{100 * one.score:.1f}", f"{100 * one.gain:+.1f}")
    return table


def _table(*columns: str) -> Table:
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(escape(column), justify="right" if number and column else "left")
    return table
