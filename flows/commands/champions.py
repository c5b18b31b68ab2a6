"""`deltaworks promote`, `rollback` and `champions`: which version of a line's model is served, changed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from flows.terminal import console, errors_explained, open_workplace

if TYPE_CHECKING:
    from rich.table import Table

    from storage.champions import Change

Name = Annotated[str, typer.Argument(help="The registered model, which is called as its line.")]
Why = Annotated[str, typer.Option("--why", help="The reason, for those who look later.")]


def promote(
    name: Name,
    version: Annotated[int, typer.Argument(help="The version that is to be served.")],
    why: Why = "by hand",
) -> None:
    """Make a version the champion, whatever its gate said; the champion so far becomes `previous`.

    Load it anywhere with the alias:  models:/NAME@champion

    Example:  deltaworks promote demo-opcm 4 --why "the test set of rot180 was wrong"
    """
    with errors_explained():
        with open_workplace().registry.champions(name) as champions:
            before = champions.version()
            champions.promote(version, why)
        _say(name, version, before)


def rollback(name: Name, why: Why = "by hand") -> None:
    """Make the former champion the champion again. Only the alias moves: the line keeps all its merges.

    To take a merge out of the line itself:  deltaworks line rollback, deltaworks line rebuild --drop
    """
    with errors_explained():
        with open_workplace().registry.champions(name) as champions:
            before = champions.version()
            version = champions.rollback(why)
        _say(name, version, before)


def champions(name: Name) -> None:
    """Who was the champion of a model, since when, and why."""
    with errors_explained():
        with open_workplace().registry.champions(name) as found:
            now, changes = found.version(), found.history()
        if not changes:
            console.print(f"{name} has had no champion: its line has no gate, and nobody promoted a version")
            return
        console.print(_table(changes))
        console.print(f"champion: version {now}")


def _say(name: str, version: int, before: int | None) -> None:
    if before == version:
        console.print(f"version {version} of {name} is the champion already")
        return
    former = "" if before is None else f"; version {before} is previous now"
    console.print(f"version {version} of {name} is the champion{former}")


def _table(changes: Sequence[Change]) -> Table:
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("when (UTC)", "version", "after", "by", "why"):
        table.add_column(column, justify="right" if column in ("version", "after") else "left")
    for one in changes:
        before = "" if one.before is None else str(one.before)
        table.add_row(one.at[:16].replace("T", " "), str(one.version), before, one.action, escape(one.why))
    return table
