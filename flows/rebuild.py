"""The rebuild: updates of a line merged again into one new entry of its journal, reusing every state that stays."""

from __future__ import annotations

from prefect import flow
from rich.console import Console

from flows import progress, steps
from flows.board import Board
from flows.folding import fold_all
from flows.plan import Plan
from flows.policy import remembered, run_now
from flows.tables import journal_table
from flows.terminal import called
from storage.lines import Entry
from storage.refs import StateRef


@flow(name="rebuild", flow_run_name="{plan.line}", validate_parameters=False)
def rebuild(plan: Plan) -> Entry:
    """Fold the updates of the plan onto the base, then commit. Until then the line has its old head.

    States that the line has already keep their factor; a rebuild knows no examples to search one for the new states.
    """
    factors = {one.state: one.factor for one in plan.held}
    folds = fold_all(plan.line, plan.head.base, plan.folds, plan.recipe, factors)
    label = f"{plan.line}: commit {len(folds)} updates"
    entry: Entry = run_now(steps.commit_rebuild, label, plan.line, plan.head, plan.recipe, folds, plan.why)
    return entry


def found_done(plan: Plan) -> list[StateRef]:
    """The states at the plan's beginning that are in the store already."""
    found: list[StateRef] = []
    for one in plan.folds:
        held = found[-1] if found else None
        state = remembered(steps.fold, plan.head.base, held, one.update, plan.recipe, one.weight)
        if state is None:
            break
        found.append(StateRef(state))
    return found


def launch_rebuild(plan: Plan, console: Console, quiet: bool) -> Entry:
    """Rebuild with progress, then the new entry and what to do with it."""
    with Board(console, quiet, len(plan.folds) + 1) as board:
        progress.watch(board)
        entry = rebuild(plan)
    if quiet:
        console.print(entry.state, soft_wrap=True)
        return entry
    console.print(journal_table(f"{plan.line}, entry {entry.number}", [entry]))
    console.print(f"{board.done} steps done, {board.reused_steps} found done")
    for text in next_steps(plan, entry):
        console.print(text, soft_wrap=True)
    return entry


def next_steps(plan: Plan, entry: Entry) -> list[str]:
    """What a person may want after a rebuild that gave `entry`."""
    command = called()
    found = [f"next: {command} export {plan.line} ./model    writes the model as a folder for from_pretrained"]
    tasks = ", ".join(one.task for one in plan.folds)
    chain = f"{command} run <its chain>"
    found.append(f"      {chain}    evaluates and registers it, once the chain has the tasks {tasks}")
    changes: list[str] = []
    if dict(plan.head.merger) != plan.recipe.spec():
        changes.append("the new merger")
    if any(one.weight != plan.held[one.step - 1].weight for one in plan.folds):
        changes.append("these weights")
    if changes:
        found.append(f"      and {' and '.join(changes)} in its config")
    states = {one.state for one in plan.held}
    if any(one.factor != 1 for one in plan.held) and any(one.state not in states for one in entry.folds):
        found.append("note: the new merges are written with factor 1. To search for theirs, run that chain after")
        found.append(f"      {command} line rollback {plan.line} 0 --why ...    what was merged is found done")
    found.append(f"back: {command} line rollback {plan.line} --entry {plan.head.number} --why ...")
    return found
