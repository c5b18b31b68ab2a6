"""`deltaworks copy`, `mirror`, `line export` and `line import`: what the store holds, in other stores and in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.terminal import Quiet, console, errors, errors_explained, open_workplace

if TYPE_CHECKING:
    from storage.transfer import Sent

Url = Annotated[str, typer.Argument(metavar="URL", help="Another store: a folder, or s3://bucket/prefix.")]
Json = Annotated[bool, typer.Option("--json", help="Print what was done as JSON, and nothing else.")]


def copy(
    words: Annotated[
        list[str], typer.Argument(metavar="REF... URL", help="Refs, or their beginnings, then the other store.")
    ],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Copy artifacts with all they need into another store. What is there is not sent again; all is checked.

    Interrupted, the same command goes on.

    Examples:  deltaworks copy update/1b2c checkpoint/77aa s3://bucket/shared        deltaworks copy update/1b2c ./other
    """
    with errors_explained():
        if len(words) < 2:
            raise typer.BadParameter("give at least one ref, and the address of the other store")
        *named, url = words
        store = open_workplace().store
        from flows.board import bar
        from flows.words import other_store
        from storage.transfer import copy as send

        refs = [store.resolve(one) for one in named]
        with bar(console, "copying objects", quiet or as_json) as report:
            sent = send(refs, store, other_store(url), report)
        _say(sent, as_json)


def mirror(url: Url, as_json: Json = False, quiet: Quiet = False) -> None:
    """Make another store have everything that this one has: artifacts, lines, pins. Nothing there is removed.

    Refused if a line has another history there. What is damaged here is left out, and named: exit code 1.

    Example:  deltaworks mirror s3://backup/deltaworks
    """
    with errors_explained():
        store = open_workplace().store
        from flows.board import bar
        from flows.words import other_store
        from storage.transfer import mirror as send

        with bar(console, "copying objects", quiet or as_json) as report:
            sent = send(store, other_store(url), report)
        _say(sent, as_json)
        if sent.left_out:
            raise typer.Exit(1)


def line_export(
    name: Annotated[str, typer.Argument(help="Name of the line, such as demo-opcm.")],
    file: Annotated[Path, typer.Argument(metavar="FILE.tar", help="A new file.")],
    all_states: Annotated[
        bool, typer.Option("--states", help="With older states too; a rollback merges those that lack again.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write a line with all it needs as one tar file, for places without a network.

    Example:  deltaworks line export demo-opcm demo.tar
    """
    with errors_explained():
        store = open_workplace().store
        from flows.board import bar
        from storage.archive import export_line
        from tasks.sizes import size

        with bar(console, "writing objects", quiet) as report:
            found = export_line(store, name, file, report, states=all_states)
        counted = f"{found.entries} entries, {found.artifacts} artifacts, {found.blobs} blobs, {size(found.bytes)}"
        console.print(f"line {name} in {file}: {counted}", markup=False, soft_wrap=True)


def line_import(
    file: Annotated[Path, typer.Argument(metavar="FILE.tar", help="What `deltaworks line export` wrote.")],
    name: Annotated[str | None, typer.Option("--as", metavar="NAME", help="What to call the line here.")] = None,
    quiet: Quiet = False,
) -> None:
    """Read a line from a tar file. All is checked before any of it becomes visible.

    A line of that name may be here already, if its history is the same so far: it grows.

    Example:  deltaworks line import demo.tar
    """
    with errors_explained():
        store = open_workplace().store
        from flows.board import bar
        from storage.archive import import_line
        from tasks.sizes import size

        with bar(console, "reading objects", quiet) as report:
            found = import_line(file, store, report, name=name)
        counted = f"{found.entries} new entries, {found.artifacts} artifacts, {found.blobs} blobs, {size(found.bytes)}"
        console.print(f"line {found.line}: {counted}", markup=False, soft_wrap=True)


def _say(sent: Sent, as_json: bool) -> None:
    from tasks.sizes import size

    if as_json:
        typer.echo(json.dumps({**sent.__dict__, "left_out": dict(sent.left_out)}, indent=2))
        return
    entries = f", {sent.entries} entries of lines" if sent.entries else ""
    console.print(f"{sent.objects} objects written, {size(sent.bytes)}{entries}; {sent.held} were there")
    for key, problem in sent.left_out:
        errors.print(f"[red]left out[/]  {key}\n     ", end="")
        errors.print(problem, markup=False)
