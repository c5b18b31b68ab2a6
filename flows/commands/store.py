"""`deltaworks store`: the object store itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from flows.terminal import console, errors_explained, open_workplace

if TYPE_CHECKING:
    from storage.objects import ObjectStore

store_app = typer.Typer(no_args_is_help=True, help="Examine the object store itself.")

_COLOURS = {"good": "green", "note": "yellow", "bad": "red"}


@store_app.callback()
def store() -> None:
    """Examine the object store itself."""


@store_app.command()
def doctor(
    remove_uploads: Annotated[
        bool, typer.Option("--remove-uploads", help="Of S3: also remove uploads in parts that were left a day ago.")
    ] = False,
) -> None:
    """Try out what the store must be able to do, and print what it did. Exit code 1 if anything is bad.

    A few small objects are written beside the data and removed again. For S3 what is found out about conditional
    writes is remembered in the store.
    """
    with errors_explained():
        place = open_workplace()
        from rich.box import SIMPLE
        from rich.markup import escape
        from rich.table import Table

        from storage.doctor import diagnose

        if remove_uploads:
            _remove_uploads(place.store.objects)
        table = Table("check", "", "what was seen", title=f"store {place.store.url}", title_justify="left", box=SIMPLE)
        bad = 0
        with console.status("examining ..."):
            for check in diagnose(place.store.objects):
                bad += check.verdict == "bad"
                table.add_row(check.what, f"[{_COLOURS[check.verdict]}]{check.verdict}[/]", escape(check.said))
        console.print(table)
        console.print(f"{bad} bad" if bad else "this store can be trusted with journals")
        if bad:
            raise typer.Exit(1)


def _remove_uploads(objects: ObjectStore) -> None:
    from storage.cache import uncached
    from storage.errors import InvalidInput

    if not objects.url.startswith("s3:"):
        raise InvalidInput(f"{objects.url} has no uploads in parts", remedy="--remove-uploads is for s3:// stores")
    from storage.s3_doctor import remove_uploads

    console.print(f"{remove_uploads(uncached(objects))} abandoned uploads removed")
