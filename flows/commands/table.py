"""`deltaworks table`: what the store holds as tables for pandas, Polars, DuckDB and spreadsheets."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from flows.terminal import Quiet, console, errors, errors_explained, open_workplace


class Subject(StrEnum):
    """What there is one row of."""

    ARTIFACTS = "artifacts"
    UPDATES = "updates"
    ENTRIES = "entries"
    SCORES = "scores"


def table(
    subject: Annotated[Subject, typer.Argument(help="What there is one row of.")],
    to: Annotated[Path, typer.Option("--to", metavar="FILE", help="A .parquet or .csv file; replaced if it is there.")],
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Read every manifest again, and not only those that are new.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write artifacts, updates, entries of lines or scores as a table with typed columns.

    What was read once is kept in DELTAWORKS_HOME: the next table reads only what is new.

    Examples:  deltaworks table scores --to scores.parquet        deltaworks table entries --to lines.csv
    """
    with errors_explained():
        from flows.board import bar
        from storage.index import index_file, indexed
        from storage.inventory import TABLES, check_form, write_table
        from storage.roots import read_journals

        check_form(to)
        place = open_workplace()
        journals = read_journals(place.store.objects)
        file = index_file(place.settings.home / "index", place.store.url)
        with bar(console, "reading manifests", quiet) as report:
            found = indexed(place.store, file, report, rebuild=rebuild)
        made = TABLES[subject](found.rows, journals.lines)
        write_table(made, to)
        said = f"{made.num_rows} {subject} in {to} ({found.read} manifests read, {len(found.rows)} known)"
        console.print(said, markup=False, soft_wrap=True)
        for key in (*found.unread, *journals.problems):
            errors.print(f"[yellow]left out:[/] {key} is damaged: see deltaworks verify --all")
        if found.unread or journals.problems:
            raise typer.Exit(1)
