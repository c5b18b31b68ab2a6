"""The `deltaworks series` commands: checkpoints of one training, published one after the other as what changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flows.terminal import console, errors_explained, open_workplace

if TYPE_CHECKING:
    from rich.table import Table

    from storage.artifacts import ArtifactStore
    from storage.series import Version

series_app = typer.Typer(
    no_args_is_help=True, help="Series: the checkpoints of one training, each stored as what changed since the last."
)

Name = Annotated[str, typer.Argument(help="Name of the series, such as policy-7b.")]


@series_app.command("publish")
def series_publish(
    name: Name,
    source: Annotated[str, typer.Argument(help="A folder with safetensors, or a hub id: the next checkpoint.")],
    anchors: Annotated[
        int, typer.Option(min=1, help="Versions from one whole checkpoint to the next. More: smaller, slower to read.")
    ] = 10,
    after: Annotated[
        str | None,
        typer.Option(metavar="REF", help="Refuse unless this is the newest version: what the trainer started from."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub id: branch, tag or commit.")] = None,
) -> None:
    """Publish the next checkpoint of a training. Every bit comes back; what did not change is not stored again.

    Publishing the newest version again does nothing.

    Examples:  deltaworks series publish policy ./step-100        deltaworks export checkpoint/1b2c ./model
    """
    with errors_explained():
        place = open_workplace()
        from storage.refs import CheckpointRef, parse_ref
        from storage.series import Series
        from tasks.ingest import Checkpoint
        from tasks.snapshot import snapshot

        wanted = CheckpointRef(parse_ref(place.store.resolve(after), "checkpoint")) if after else None
        series, spec = Series(place.store.objects, name), Checkpoint(source=source, revision=revision)
        done = snapshot(spec, series, place.store, anchors=anchors, after=wanted)
        if not done.is_new:
            console.print(f"nothing to do: version {done.version.number} has these weights and files")
        earlier = next((one for one in series.versions() if one.number == done.version.number - 1), None)
        console.print(_table(place.store, name, [done.version], earlier))
        console.print(f"whole: {done.version.checkpoint}", soft_wrap=True)


@series_app.command("log")
def series_log(name: Name) -> None:
    """Print the versions of a series, oldest first, with what each one takes."""
    with errors_explained():
        from storage.series import Series

        store = open_workplace().store
        series = Series(store.objects, name)
        series.head()
        console.print(_table(store, name, list(series.versions())))


def _table(store: ArtifactStore, name: str, versions: list[Version], before: Version | None = None) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    from storage.refs import short
    from tasks.snapshot import own_bytes

    table = Table(title=f"series {name}", title_justify="left", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("#", "checkpoint", "stored", "bytes", "of whole", "when (UTC)"):
        table.add_column(column, justify="right" if column in ("#", "bytes", "of whole") else "left", no_wrap=True)
    earlier = store.open(before.checkpoint, "checkpoint").manifest if before else None
    for version in versions:
        manifest = store.open(version.checkpoint, "checkpoint").manifest
        own = own_bytes(earlier, manifest)
        whole = sum(record.elements * _width(record.dtype) for record in manifest.tensors)
        since = f"{version.since_anchor} after a whole one" if version.since_anchor else "whole"
        share, when = f"{own / whole:.1%}" if whole else "-", version.at[:16].replace("T", " ")
        table.add_row(str(version.number), short(version.checkpoint), since, f"{own:,}", share, when)
        earlier = manifest
    return table


def _width(dtype: str) -> int:
    from storage.blobs import DTYPES

    return DTYPES[dtype].itemsize
