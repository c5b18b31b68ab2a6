"""`deltaworks report`: studies over many trainings and merges, whose answer is a table and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from flows.terminal import (
    Memory,
    Quiet,
    Verbose,
    Workers,
    console,
    embedded_prefect,
    errors_explained,
    open_workplace,
)

report_app = typer.Typer(no_args_is_help=True, help="Reports that compare: which tuner to take, measured.")


@report_app.command("mergeability")
def mergeability(
    study: Annotated[str, typer.Argument(help="A YAML file, or the name of a study: mergeability")] = "mergeability",
    tuner: Annotated[
        list[str] | None, typer.Option("--tuner", metavar="NAME", help="Only this one of the study; may be repeated.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N seeds of the study.")] = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FOLDER", help="Where the reports go; default: DELTAWORKS_HOME.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, and nothing else.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    memory: Memory = None,
    workers: Workers = None,
) -> None:
    """Which tuner to take when its updates will be merged: every tuner, every merger, on the same tasks.

    Of each: its accuracy alone, merged, what is forgotten, what is left of the base, bytes, seconds of training.

    What was done before is not done again. `study` is a YAML file: see the one that comes with the product, on six
    tasks of real digits, in configs/studies.

    Examples:  deltaworks report mergeability --seeds 1

               deltaworks report mergeability --tuner full --tuner "LoRA r8"

               deltaworks report mergeability studies/support-models.yaml --to reports
    """
    with errors_explained(verbose):
        from configs.study import chosen, load_study

        config = chosen(load_study(study), tuner, seeds)
        place = open_workplace(verbose, memory, workers)
        server = embedded_prefect(place)
        from flows import progress
        from flows.board import Board
        from flows.study import count_steps, plain_rows
        from flows.study import study as run
        from flows.study_report import WORDS, draw, markdown, table
        from flows.study_report import as_json as plain
        from storage.tables import write_rows

        if server:
            server.await_answer()
        place.store.objects.ready()
        with Board(console, quiet or as_json, count_steps(config)) as board:
            progress.watch(board)
            findings = run(config)
        folder = to or place.settings.home / "reports"
        picture = draw(findings, folder / f"{config.name}.png")
        words = [f"means over {len(config.seeds)} seeds" if config.seeds[1:] else f"seed {config.seeds[0]}", *WORDS]
        title = [f"# {config.name}", "", "Written by `deltaworks report mergeability`.", ""]
        page = [
            *title,
            *markdown(findings),
            "",
            *(f"- {one}" for one in words),
            "",
            f"![{config.name}]({config.name}.png)",
            "",
        ]
        (folder / f"{config.name}.md").write_text("\n".join(page))
        (folder / f"{config.name}.parquet").write_bytes(write_rows(list(plain_rows(findings))))
        if as_json:
            typer.echo(json.dumps(plain(findings), indent=2))
            return
        console.print(table(findings))
        for one in words:
            console.print(f"[dim]{one}[/]", soft_wrap=True)
        console.print(f"picture: {picture}", markup=False, soft_wrap=True)
