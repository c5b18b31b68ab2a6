"""`deltaworks line fold`: stored updates into a line by hand, beside whoever else merges into it."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.terminal import Memory, Quiet, Workers, called, console, errors_explained, open_workplace
from storage.errors import InvalidInput


def line_fold(
    name: Annotated[str, typer.Argument(help="Name of the line, such as demo-opcm.")],
    updates: Annotated[list[str], typer.Argument(metavar="UPDATE...", help="Stored updates, in this order.")],
    task: Annotated[
        str | None, typer.Option(help="What the journal calls it, of a single update. [default: as it was tuned]")
    ] = None,
    weight: Annotated[float, typer.Option(help="How much each of them counts.")] = 1.0,
    merger: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Begin the line with this merger; one that is there must have it."),
    ] = None,
    quiet: Quiet = False,
    memory: Memory = None,
    workers: Workers = None,
) -> None:
    """Fold stored updates into a line. What the line has already is left as it is.

    Several processes may fold into one line at once: no update is lost, and nobody waits for a lock.

    Examples:  deltaworks line fold demo-opcm update/1b2c        deltaworks line fold mine update/1b2c --merger tsv_m
    """
    with errors_explained():
        if task is not None and len(updates) > 1:
            raise InvalidInput("--task names a single update", remedy="Fold updates with names of their own one by one")
        from configs.recipe_words import recipe_from_words

        # before anything slow: a wrong name is answered at once
        recipe = recipe_from_words(merger) if merger is not None else None
        place = open_workplace(memory=memory, workers=workers)
        from flows.board import bar
        from flows.tables import journal_table
        from storage.lines import Line
        from storage.refs import CheckpointRef, UpdateRef, parse_ref
        from tasks.join import join_line

        refs = [UpdateRef(parse_ref(place.store.resolve(one), "update")) for one in updates]
        line = Line(place.store.objects, name)
        if recipe is not None:
            base = place.store.open(refs[0]).manifest.lineage.inputs["base"]
            line.open(CheckpointRef(parse_ref(base, "checkpoint")), recipe.spec())
        entries = []
        for ref in refs:
            with bar(console, "folding tensors", quiet) as report:
                joined = join_line(
                    line,
                    ref,
                    place.store,
                    place.settings.device,
                    task=task,
                    weight=weight,
                    budget=place.settings.budget,
                    report=lambda done, total, note: report(done, total),
                )
            if joined.is_new:
                entries.append(joined.entry)
            else:
                console.print(f"line {name} has {joined.entry.task} already, as step {joined.entry.step}")
        if entries:
            console.print(journal_table(f"line {name}", entries))
            console.print(f"next: {called()} export {name} ./model", soft_wrap=True)
