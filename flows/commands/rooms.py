"""`deltaworks du`, `prune`, `pin`, `unpin`, `pins`: what the store takes, what may go, and what must stay."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from flows.terminal import Quiet, console, errors, errors_explained, open_workplace

if TYPE_CHECKING:
    from rich.table import Table

    from storage.sweep import Condemned, Wishes
    from storage.usage import Share, Usage

_SHOWN = 20  # updates in the table; all of them are in the JSON

Refs = Annotated[str, typer.Argument(metavar="REF", help="A ref, or the beginning of one: update/1b2c3d")]


def du(
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, and nothing else.")] = False,
    quiet: Quiet = False,
) -> None:
    """Print what takes the room: by kind, line and update; what sharing saves; and what nothing needs.

    "alone" is what nothing else of the store uses: what would be free without it.
    """
    with errors_explained():
        place = open_workplace()
        from flows.board import bar
        from flows.words import registered
        from storage.usage import usage

        with bar(console, "reading manifests", quiet or as_json) as report:
            found = usage(place.store, registered(place), report)
        if as_json:
            typer.echo(json.dumps(_usage_json(found), indent=2))
            return
        for part in _usage_tables(found):
            console.print(part)


def prune(
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would go, as without --yes.")] = False,
    grace: Annotated[
        str, typer.Option(metavar="TIME", help="What is younger stays: 7d, 12h. Less than 1d only if nothing runs.")
    ] = "7d",
    states: Annotated[
        bool, typer.Option("--states", help="Drop older states of lines too: a rollback merges them again.")
    ] = False,
    sources: Annotated[
        bool,
        typer.Option(
            "--sources",
            help="Drop what the updates of lines came from too, such as tuned checkpoints: a chain that runs again "
            "trains again, and evaluations and extractions of them cannot be repeated.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print refs and bytes as JSON, and nothing else.")] = False,
    quiet: Quiet = False,
) -> None:
    """Remove what nothing needs: no line, no registered model, no pin, no score. Shows it first; --yes removes it.

    Examples:  deltaworks prune        deltaworks prune --states --grace 1d --yes
    """
    with errors_explained():
        from flows.words import registered, seconds
        from tasks.sizes import size

        least = seconds(grace)
        place = open_workplace()
        from flows.board import bar
        from storage.needs import Needs
        from storage.sweep import Wishes, mark, sweep

        wishes = Wishes(least, not states, not sources, registered(place))
        needs = Needs(place.store)
        with bar(console, "reading manifests", quiet or as_json) as report:
            found = mark(place.store, wishes, report, needs=needs)
        remove = yes and not dry_run
        if as_json and not remove:
            typer.echo(json.dumps(_condemned_json(found), indent=2))
            return
        if not as_json:
            _print_condemned(found, wishes)
        if not remove or not len(found):
            if len(found):
                console.print("nothing was removed: --yes does it")
            return
        with bar(console, "removing", quiet or as_json) as report:
            swept = sweep(place.store, wishes, report, needs=needs)
        if as_json:
            typer.echo(json.dumps({"objects": swept.objects, "bytes": swept.bytes, "harmed": swept.harmed}, indent=2))
        else:
            console.print(f"{swept.objects} objects removed, {size(swept.bytes)} free")
        for ref in swept.harmed:
            errors.print(f"[red]bad[/]  {ref} was written meanwhile and lacks what was removed: run its step again")
        if swept.harmed:
            raise typer.Exit(1)


def pin(ref: Refs, why: Annotated[str, typer.Option(help="The reason, for those who wonder later.")] = "") -> None:
    """Keep an artifact and all it needs, whatever a prune would do. The pin is in the store, for everybody.

    Example:  deltaworks pin update/1b2c3d --why "in production since May"
    """
    with errors_explained():
        store = open_workplace().store
        from storage.pins import pin as keep

        console.print(f"pinned {keep(store, store.resolve(ref), why).ref}", soft_wrap=True)


def unpin(ref: Refs) -> None:
    """Let go of a pinned artifact. It stays until a prune, and for as long as something else needs it."""
    with errors_explained():
        store = open_workplace().store
        from storage.pins import PREFIX
        from storage.pins import unpin as let_go
        from storage.refs import parse_ref

        pinned = [parse_ref(key.removeprefix(PREFIX)) for key in store.objects.list(f"{PREFIX}{ref}")]
        chosen = pinned[0] if len(pinned) == 1 else store.resolve(ref)  # a pin outlives what was lost
        let_go(store, chosen)
        console.print(f"no longer pinned: {chosen}", soft_wrap=True)


def pins(
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON, and nothing else.")] = False,
) -> None:
    """List what is pinned, since when and why."""
    with errors_explained():
        store = open_workplace().store
        from storage.pins import pins as kept

        found = kept(store)
        if as_json:
            typer.echo(json.dumps([one.__dict__ for one in found], indent=2))
            return
        for one in found:
            console.print(f"{one.ref}  {one.at[:10]}  {one.why}".rstrip(), markup=False, soft_wrap=True)
        if not found:
            console.print("nothing is pinned")


def _usage_tables(found: Usage) -> Iterator[str | Table]:
    from rich.box import SIMPLE
    from rich.table import Table

    from storage.refs import short
    from tasks.sizes import size

    def table(title: str, first: str, rows: list[tuple[str, Share]]) -> Table:
        made = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
        for column in (first, "artifacts", "bytes", "alone"):
            made.add_column(column, justify="left" if column == first else "right", no_wrap=True)
        for name, one in rows:
            made.add_row(name, str(one.artifacts), size(one.bytes), size(one.alone))
        return made

    yield table("by kind", "kind", list(found.kinds.items()))
    if found.lines:
        yield table("by line", "line", list(found.lines.items()))
    if found.series:
        yield table("by series", "series", list(found.series.items()))
    updates = sorted(found.updates.items(), key=lambda one: -one[1].bytes)
    if updates:
        more = f", the largest {_SHOWN} of {len(updates)}" if len(updates) > _SHOWN else ""
        yield table(f"by update{more}", "update", [(short(ref), one) for ref, one in updates[:_SHOWN]])
    others = ", ".join(f"{name} {size(count)}" for name, count in sorted(found.others.items()))
    yield f"all       {found.objects} objects, {size(found.bytes)}{f'; of these {others}' if others else ''}"
    if found.apart:
        yield f"sharing   saves {size(found.shared)}: apart, the artifacts would take {size(found.apart)}"
    yield f"unneeded  {found.unneeded_objects} objects, {size(found.unneeded_bytes)}: see deltaworks prune"
    if found.unread:
        yield f"unread    {len(found.unread)} manifests are damaged: see deltaworks verify --all"


def _usage_json(found: Usage) -> dict[str, object]:
    shares = {
        group: {name: one.__dict__ for name, one in getattr(found, group).items()}
        for group in ("kinds", "lines", "series", "updates")
    }
    return {**found.__dict__, **shares, "others": dict(found.others)}


def _print_condemned(found: Condemned, wishes: Wishes) -> None:
    from storage.refs import short
    from tasks.sizes import size

    kept = f"{len(wishes.registered)} refs that registered models in MLflow name"
    console.print(f"kept: what lines, pins and scores need, and {kept}")
    for one in found.manifests:
        console.print(f"  {short(one.key)}")
    kinds: dict[str, int] = {}
    for one in (*found.manifests, *found.blobs, *found.memos):
        kind = one.key.partition("/")[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    console.print(f"nothing needs {len(found)} objects, {size(found.bytes)}{f': {counted}' if counted else ''}")
    if found.young:
        days = f"{wishes.grace / 86_400:g} days"
        free = size(sum(one.bytes for one in found.young))
        console.print(f"{len(found.young)} more ({free}) are younger than {days} and stay")
    for ref in found.missing:
        errors.print(f"[yellow]note:[/] {short(ref)} is wanted but not in the store: see deltaworks verify --all")


def _condemned_json(found: Condemned) -> dict[str, object]:
    groups = {name: [one.key for one in getattr(found, name)] for name in ("memos", "manifests", "blobs", "young")}
    return {**groups, "bytes": found.bytes, "missing": found.missing}
