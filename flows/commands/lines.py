"""The `deltaworks line` commands: the journal of a line, going back in it, and merging its updates again."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from flows.terminal import (
    Memory,
    Quiet,
    Verbose,
    Workers,
    called,
    console,
    embedded_prefect,
    errors_explained,
    open_workplace,
)
from storage.errors import InvalidInput

if TYPE_CHECKING:
    from flows.plan import Plan
    from flows.workplace import Workplace
    from storage.lines import Entry, Line

line_app = typer.Typer(no_args_is_help=True, help="Lines: the merged models and their histories.")

Name = Annotated[str, typer.Argument(help="Name of the line, such as demo-opcm.")]


@line_app.command("log")
def line_log(name: Name) -> None:
    """Print the journal of a line: every merge, rollback and rebuild, oldest first."""
    with errors_explained():
        from flows.tables import journal_table
        from storage.lines import Line

        line = Line(open_workplace().store.objects, name)
        line.head()
        console.print(journal_table(f"line {name}", list(line.entries())))


@line_app.command("show")
def line_show(name: Name) -> None:
    """Print what a line is made of now: its base, merger, and the updates in its head."""
    with errors_explained():
        from flows.tables import origin_text, recipe_text, weighted
        from storage.lines import Line

        store = open_workplace().store
        line = Line(store.objects, name)
        head = line.head()
        console.print(f"line    {name}\nmerger  {recipe_text(head.merger)}", soft_wrap=True)
        console.print(f"base    {head.base}\nstate   {head.state or 'nothing merged yet'}", soft_wrap=True)
        for entry in line.history():
            task = weighted(entry.task, entry.weight)
            console.print(f"{entry.step:>4}  {task:<16} {entry.update}  {origin_text(store, entry)}", soft_wrap=True)
        if head.factor != 1:
            console.print(f"factor  {head.factor:g} of the merged delta is written, as a search chose", soft_wrap=True)


@line_app.command("rollback")
def line_rollback(
    name: Name,
    why: Annotated[str, typer.Option(help="The reason, for the journal.")],
    step: Annotated[
        int | None, typer.Argument(min=0, help="How many of its updates the line keeps; 0: none, back to the base.")
    ] = None,
    entry: Annotated[
        int | None,
        typer.Option(min=0, help="Instead of STEP: the number of a journal entry, such as before a rebuild."),
    ] = None,
) -> None:
    """Go back to an older state of a line. Nothing is removed: the journal gets one more entry.

    A state that was pruned is merged again from its updates first.

    Examples:  deltaworks line rollback demo-opcm 4 --why "roll hurt others"

    or, back to a journal entry:  deltaworks line rollback demo-opcm --entry 6 ...
    """
    with errors_explained():
        from flows.tables import journal_table
        from storage.lines import Line

        place = open_workplace()
        line = Line(place.store.objects, name)
        head = line.head()  # before the history is read: a merge that comes in between makes the commit fail
        to = _target(line, head, step, entry)
        there, now = ((one.state, one.factor, one.step, dict(one.merger)) for one in (to, head))
        if there == now:
            console.print(f"nothing to do: line {name} is at that state")
            return
        _refold(line, to, place)
        back = line.rollback(to, why, after=head)
        console.print(journal_table(f"{name}, entry {back.number}", [back]))
        if back.state:
            console.print(f"next: {called()} export {name} ./model", soft_wrap=True)
        console.print("its chain would merge again what it still lists: take it out of the tasks first", soft_wrap=True)


@line_app.command("rebuild")
def line_rebuild(
    name: Name,
    drop: Annotated[
        list[str] | None,
        typer.Option(metavar="UPDATE", help="Leave this update out. May be repeated."),
    ] = None,
    order: Annotated[
        str | None,
        typer.Option(metavar="UPDATE,UPDATE,...", help="The new order: every update that is kept, exactly once."),
    ] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(metavar="UPDATE=NUMBER", help="Let this update count so much. May be repeated."),
    ] = None,
    merger: Annotated[
        str | None, typer.Option(metavar="NAME", help="Merge with this, at its defaults: see `deltaworks mergers`.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A setting of the merger, or sparsify.KEY and scaling.KEY. May be repeated. "
            "Without --merger, it changes the line's own one.",
        ),
    ] = None,
    sparsify: Annotated[str | None, typer.Option(metavar="NAME", help="Thin updates with this first, or none.")] = None,
    scaling: Annotated[str | None, typer.Option(metavar="NAME", help="Scale the merged delta so, or none.")] = None,
    why: Annotated[str, typer.Option(help="The reason, for the journal.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be merged, and stop.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    memory: Memory = None,
    workers: Workers = None,
) -> None:
    """Merge the updates of a line again: without a bad one, in another order, or by another method.

    The journal gets one new entry; the old ones stay, for a rollback.

    States that stay the same are not computed again, and keep the factor that a search chose; new ones have 1.

    UPDATE is a task, a step of the line as it is now, or the beginning of a ref.

    Examples:  deltaworks line rebuild demo-opcm --drop invert --dry-run

               deltaworks line rebuild demo-opcm --merger ties --set density=0.3

               deltaworks line rebuild demo-opcm --drop 3 --order permute,1,2,roll
    """
    with errors_explained(verbose):
        from configs.recipe_words import changed_recipe
        from flows.plan import plan_rebuild
        from flows.tables import plan_table
        from storage.lines import Line

        place = open_workplace(verbose, memory, workers)
        line = Line(place.store.objects, name)
        head = line.head()  # before the history is read: a merge that comes in between makes the commit fail
        settings = setting or []
        recipe = changed_recipe(head.merger, name, merger=merger, sparsify=sparsify, scaling=scaling, settings=settings)
        ordered = [one.strip() for one in order.split(",")] if order is not None else []
        counts = dict(_weight(one) for one in weight or [])
        plan = plan_rebuild(line, head, recipe, place.store, drop=drop or [], order=ordered, weights=counts, why=why)
        if not plan.changes:
            console.print(f"nothing to do: line {name} has these updates in this order, merged like this")
            return
        if dry_run:
            from flows.rebuild import found_done

            for part in plan_table(plan, found_done(plan)):
                console.print(part, soft_wrap=isinstance(part, str))
            return
        _rebuild(plan, place, quiet)


def _rebuild(plan: Plan, place: Workplace, quiet: bool) -> None:
    server = embedded_prefect(place)
    from flows.rebuild import found_done, launch_rebuild  # imports prefect, which reads where its server is
    from flows.tables import plan_table

    if not quiet:
        for part in plan_table(plan, found_done(plan)):
            console.print(part, soft_wrap=isinstance(part, str))
    if server:
        server.await_answer()
    launch_rebuild(plan, console, quiet)


def _refold(line: Line, to: Entry, place: Workplace) -> None:
    """Make the state that a rollback goes to, if it was pruned."""
    if to.state is None or place.store.has(to.state):
        return
    from flows.board import bar
    from tasks.refold import missing_folds, refold

    history = line.history(until=to.number)
    folds = history[: [one.state for one in history].index(to.state) + 1]
    count = len(missing_folds(folds, place.store))
    console.print(f"{count} {'states were' if count > 1 else 'state was'} pruned: merging again")
    settings = place.settings
    with bar(console, "merging again", False) as report:
        refold(
            folds,
            place.store,
            settings.device,
            budget=settings.budget,
            report=lambda done, total, note: report(done, total),
        )


def _target(line: Line, head: Entry, step: int | None, number: int | None) -> Entry:
    """The older entry that a rollback goes to."""
    if (step is None) == (number is None):
        raise InvalidInput("give either a step of the line as it is now, or --entry and the number of a journal entry")
    entries = list(line.entries())
    if number is not None:
        if number > head.number:
            raise InvalidInput(f"line {line.name!r} has the entries 0 to {head.number}, not {number}")
        return entries[number]
    history = line.history()
    assert step is not None
    if step > len(history):
        raise InvalidInput(
            f"line {line.name!r} has {len(history)} updates, not {step}",
            remedy="An older head than that is reached with --entry: see `deltaworks line log`",
        )
    # back to the base, but with the merger that the line has now
    return history[step - 1] if step else replace(entries[0], merger=head.merger)


def _weight(text: str) -> tuple[str, float]:
    name, equals, number = text.rpartition("=")
    try:
        found = float(number)
    except ValueError:
        equals = ""
    if not equals or not name:
        raise InvalidInput(f"--weight {text}: is not of the form UPDATE=NUMBER", remedy="Write --weight rot90=2.0")
    return name, found
