"""Tables of a difference between two versions: what `deltaworks diff` prints."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from storage.refs import short
from tasks.difference import Difference, Placed


def tables(before: str, after: str, found: Difference) -> Iterator[Table]:
    """Only what differs, and all scores and layers."""
    if found.settings:
        table = _table("settings", "", before, after)
        for name, (old, new) in found.settings.items():
            table.add_row(*map(escape, (name, _shown(old), _shown(new))))
        yield table
    moved = [one for one in found.updates if one.before != one.after]
    if moved:
        table = _table("updates", "task", "update", before, after)
        for one in moved:
            table.add_row(escape(one.task), short(one.update), *_places(one))
        yield table
    if found.scores:
        table = _table("scores", "task", "metric", before, after, "change", "")
        for row in found.scores:
            change = "" if row.before is None or row.after is None else f"{100 * (row.after - row.before):+.1f}"
            word = "beyond both intervals" if row.apart else ""
            values = ["" if value is None else f"{100 * value:.1f}" for value in (row.before, row.after)]
            table.add_row(escape(row.task), escape(row.metric), *values, change, word)
        yield table
    table = _table("weights, |B - A| / |A|", "layer", "distance")
    for layer, distance in found.layers.items():
        table.add_row(escape(layer), f"{distance:.4%}")
    table.add_row("[bold]the whole model[/]", f"[bold]{found.whole:.4%}[/]")
    yield table


def _places(one: Placed) -> tuple[str, str]:
    told = []
    for side in (one.before, one.after):
        weight = "" if side is None or side[1] == 1 else f", weight {side[1]:g}"
        told.append("" if side is None else f"merge {side[0]}{weight}")
    return told[0], told[1]


def _shown(value: object) -> str:
    text = "-" if value is None else str(value)
    return short(text) if "/" in text and len(text) > 60 else text


def _table(title: str, *columns: str) -> Table:
    table = Table(title=escape(title), box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(
            escape(column), justify="right" if column in ("change", "distance") else "left", no_wrap=not number
        )
    return table
