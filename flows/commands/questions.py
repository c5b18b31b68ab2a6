"""`deltaworks contains`, `diff` and `reproduce`: questions about versions, answered from the journals and the store."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from flows.terminal import Memory, Quiet, Workers, console, errors_explained, open_workplace
from storage.errors import Missing

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from flows.workplace import Workplace
    from storage.lines import Entry
    from storage.refs import CheckpointRef
    from tasks.contains import Holds
    from tasks.difference import Side


def contains(
    what: Annotated[
        str,
        typer.Argument(metavar="UPDATE|CHECKPOINT|TASK", help="A ref, its first digits are enough, or a task's name."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, and nothing else.")] = False,
) -> None:
    """Tell which versions of which lines hold an update, and which aliases point to them.

    An update is also meant by what it was compressed from, and by the checkpoint that it was extracted from.

    Examples:  deltaworks contains update/1b2c        deltaworks contains rot180
    """
    with errors_explained():
        from storage.index import index_file, indexed
        from storage.registry_lines import LineVersions
        from storage.roots import read_journals
        from tasks.contains import holding, meant

        place = open_workplace()
        lines = read_journals(place.store.objects).lines
        rows = indexed(place.store, index_file(place.settings.home / "index", place.store.url)).rows
        updates = meant(what, place.store, rows, lines)
        if not updates:
            raise Missing(
                f"no update is meant by {what!r}",
                remedy="Name a task of a line (`deltaworks line show NAME`), an update, or a tuned checkpoint",
            )
        versions = {}
        for line in lines:
            try:
                versions[line.name] = LineVersions(place.registry, line.name).all()
            except Missing:
                continue  # nothing of it was registered
        found = list(holding(updates, lines, versions))
        if as_json:
            typer.echo(json.dumps([one.__dict__ for one in found], indent=2))
        elif found:
            console.print(_table(found))
        else:
            console.print(f"no version and no line holds it: {len(updates)} updates are stored, none is merged")


def reproduce(
    version: Annotated[
        str,
        typer.Argument(metavar="NAME[@VERSION]", help="A version of a line: a number, or an alias; without one, head."),
    ],
    memory: Memory = None,
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Merge a version again from its stored updates, and compare what comes of it with what is stored, by name.

    Nothing is changed: the work is done aside. Returns 0 if all is the same, byte for byte, and 1 where it is not.

    A line that MLflow does not know is read from the store alone; VERSION is then the number of a journal entry.

    Example:  deltaworks reproduce demo-opcm@champion
    """
    with errors_explained():
        from flows.board import bar
        from storage.refs import short
        from tasks.reproduce import reproduce as again

        place = open_workplace(memory=memory, workers=workers)
        title, entries, model = _merges(version, place)
        with bar(console, f"merging {title} again", quiet) as report:
            steps = again(
                entries,
                model,
                place.store,
                place.settings.device,
                budget=place.settings.budget,
                report=lambda done, total, note: report(done, total),
            )
        last = steps[-1]
        if last.same:
            what = "states and the model" if model else "states"
            console.print(f"{title}: {len(entries)} merges again, {what} are the same, byte for byte", soft_wrap=True)
            return
        kind = "the model" if last.expected.startswith("checkpoint/") else f"the state after merge {last.number}"
        console.print(
            f"{title}: {kind}, {last.task!r}, came out as {short(last.found)}, and not as {short(last.expected)}",
            soft_wrap=True,
            markup=False,
        )
        console.print(
            "Last digits differ between kinds of machines: try it where it was merged (cpu, cuda, DELTAWORKS_THREADS)"
        )
        raise typer.Exit(1)


def diff(
    before: Annotated[str, typer.Argument(metavar="NAME@V1", help="A version: a number or an alias.")],
    after: Annotated[str, typer.Argument(metavar="NAME@V2", help="Another, of the same line or of another one.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, and nothing else.")] = False,
    quiet: Quiet = False,
) -> None:
    """Tell two versions apart: settings, updates, scores, and how far their weights are from each other, by layer.

    Examples:  deltaworks diff demo-opcm@5 demo-opcm@6        deltaworks diff demo-opcm@champion demo-tsv@head
    """
    with errors_explained():
        from dataclasses import asdict

        from flows.board import bar
        from flows.commands.difference_tables import tables
        from tasks.difference import difference

        place = open_workplace()
        old, new = _side(before, place), _side(after, place)
        with bar(console, "comparing tensors", quiet or as_json) as report:
            found = difference(old, new, place.store, lambda done, total, note: report(done, total))
        if as_json:
            typer.echo(json.dumps({"before": old.title, "after": new.title, **asdict(found)}, indent=2))
            return
        for one in tables(old.title, new.title, found):
            console.print(one)


def _side(text: str, place: Workplace) -> Side:
    from storage.refs import ScoresRef, parse_ref
    from storage.registry_lines import LineVersions, named_version
    from tasks.difference import Side

    name, which = named_version(text)
    version = LineVersions(place.registry, name).one(which)
    title, entries, _ = _merges(f"{name}@{version.number}", place)
    scores = version.tags.get("scores")
    return Side(title, entries, version.model, ScoresRef(parse_ref(scores, "scores")) if scores else None)


def _merges(text: str, place: Workplace) -> tuple[str, Sequence[Entry], CheckpointRef | None]:
    """What a version is called, the merges that made it, and its model, if the registry knows that."""
    from storage.lines import Line
    from storage.registry_lines import LineVersions, named_version
    from tasks.lineage.versions import entries_at, entries_of

    name, which = named_version(text)
    known = name in Line.names(place.store.objects)
    journal = list(Line(place.store.objects, name).entries()) if known else []
    try:
        versions = LineVersions(place.registry, name)
        all_of_it = versions.all()
    except Missing:
        if not journal:
            raise
        all_of_it = []
    if all_of_it:
        one = versions.one(which)
        return str(one), entries_of(one, all_of_it, journal), one.model
    number, entries = entries_at(name, which, journal)
    return f"{name}, entry {number}", entries, None


def _table(found: Sequence[Holds]) -> Table:
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    from storage.refs import short

    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("line", "version", "aliases", "merge", "task", "update", "now"):
        table.add_column(column, justify="right" if column in ("version", "merge") else "left")
    for one in found:
        number = "" if one.version is None else str(one.version)
        now = "left out by the gate" if one.left_out else "in the line" if one.in_head else "taken out since"
        aliases = ", ".join(one.aliases)
        cells = (one.line, number, aliases, str(one.step), one.task, short(one.update), now)
        table.add_row(*map(escape, cells))
    return table
