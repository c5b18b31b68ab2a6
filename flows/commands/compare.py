"""`deltaworks compare`: which merger and which codec for the updates of a chain, measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from flows.terminal import Memory, Quiet, Verbose, Workers, console, embedded_prefect, errors_explained, open_workplace


def compare(
    config: Annotated[str, typer.Argument(help="A chain: a YAML file, or the name of a preset.")],
    mergers: Annotated[
        str | None, typer.Option(metavar="NAME,NAME ...", help="With settings: 'opcm alpha=0.3,ties'. [the chain's]")
    ] = None,
    codecs: Annotated[
        str | None, typer.Option(metavar="NAME,NAME ...", help="With settings: 'exact,ternary density=0.1'.")
    ] = None,
    orders: Annotated[
        int, typer.Option(min=1, help="Orders of the tasks: the chain's own, and others that are drawn.")
    ] = 1,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each task: its tuner's seed, and the next ones.")] = 1,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FOLDER", help="Where the picture and the table go.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the leaderboard as JSON, and nothing else.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    memory: Memory = None,
    workers: Workers = None,
) -> None:
    """Compare mergers and codecs on the same updates, over orders and seeds: a leaderboard, a picture, runs in MLflow.

    Nothing enters a line. Every cell of the grid is a run of the experiment CHAIN-compare in MLflow, with its settings
    as parameters for parallel coordinates. What was done before, by a chain too, is not done again.

    Examples:  deltaworks compare demo --mergers opcm,tsv_m,ties --codecs exact,ternary --orders 3

               deltaworks compare chains/support.yaml --mergers "opcm alpha=0.3,opcm alpha=0.7" --seeds 3
    """
    with errors_explained(verbose):
        from configs.chain import load_chain
        from configs.grid import grid_of

        grid = grid_of(load_chain(config), _words(mergers), _words(codecs), orders, seeds)
        place = open_workplace(verbose, memory, workers)
        server = embedded_prefect(place)
        from dataclasses import asdict

        from flows import progress
        from flows.board import Board
        from flows.compare import compare as run
        from flows.compare import count_steps, leaderboard, plain_rows, register
        from flows.compare_report import WORDS, draw, table
        from storage.tables import write_rows

        if server:
            server.await_answer()
        place.store.objects.ready()
        with Board(console, quiet or as_json, count_steps(grid)) as board:
            progress.watch(board)
            outcomes = run(grid)
        folder = to or place.settings.home / "reports"
        places = leaderboard(outcomes)
        picture = draw(places, folder / f"{grid.chain.name}-compare.png")
        (folder / f"{grid.chain.name}-compare.parquet").write_bytes(write_rows(plain_rows(outcomes)))
        experiment = register(grid, outcomes)
        if as_json:
            typer.echo(json.dumps([asdict(one) for one in places], indent=2))
            return
        console.print(table(places))
        for one in WORDS:
            console.print(f"[dim]{one}[/]", soft_wrap=True)
        console.print(f"picture: {picture}", markup=False, soft_wrap=True)
        console.print(f"in MLflow: experiment {experiment}, {len(outcomes)} runs", markup=False, soft_wrap=True)


def _words(text: str | None) -> list[str]:
    return list(dict.fromkeys(one.strip() for one in (text or "").split(",") if one.strip()))
