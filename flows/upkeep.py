"""Upkeep: what the deployed flows do to a line or a store that is there, beside merging into it."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import get_run_logger
from prefect.artifacts import create_table_artifact

from configs.chain import load_chain
from configs.recipe_words import changed_recipe
from flows import steps
from flows.plan import plan_rebuild
from flows.policy import run_now
from flows.rebuild import rebuild
from flows.workplace import here
from storage.errors import Damaged
from storage.lines import Line
from storage.roots import read_journals
from storage.sweep import Wishes, mark, sweep
from storage.verify import damaged_journals, verify
from tasks.evaluate import read_scores


def rebuild_by_words(
    line: str, drop: Sequence[str], order: Sequence[str], merger: str | None, settings: Sequence[str], why: str
) -> str:
    """What `deltaworks line rebuild` does. The ref of the line's state afterwards."""
    store = here().store
    journal = Line(store.objects, line)
    head = journal.head()  # before the history is read: a merge that comes in between makes the commit fail
    recipe = changed_recipe(head.merger, line, merger=merger, settings=settings)
    plan = plan_rebuild(journal, head, recipe, store, drop=drop, order=order, why=why)
    return str(rebuild(plan).state if plan.changes else head.state)


def evaluate_head(line: str, config: str) -> str:
    """Scores of a line's newest model on the tasks of a chain; their ref. The run gets them as a table."""
    tasks = list(load_chain(config).tasks)
    store = here().store
    head = Line(store.objects, line).head()
    scores = run_now(steps.evaluate, f"{line}: evaluate", steps.head_model(line), tasks, head.base)
    rows = [row.__dict__ for row in read_scores(store.open(scores, "scores"))]
    said = f"{line}, entry {head.number}: {scores}"
    create_table_artifact(rows, key=f"{line.replace('_', '-')}-scores", description=said)
    return str(scores)


def tidy(prune: bool, grace_days: float) -> dict[str, int]:
    """Verify everything; then remove, or only count, what nothing needs. Damaged, with a table, if something is."""
    place = here()
    journals = read_journals(place.store.objects)
    verdict = verify(place.store, place.store.refs(), journals=journals.all)
    findings = [*verdict.findings, *damaged_journals(journals.problems)]
    if findings:
        rows = [
            {"object": one.object, "problem": one.problem, "needed by": ", ".join(one.needed_by)} for one in findings
        ]
        create_table_artifact(rows, key="damage", description=f"{len(findings)} damaged objects in {place.store.url}")
        raise Damaged(
            f"{len(findings)} objects are damaged or missing, the first is {findings[0].object}",
            remedy="The run's artifact lists them; `deltaworks verify --all --repair-from URL` repairs from a copy",
        )
    wishes = Wishes(grace=grace_days * 24 * 3600, registered=place.registry.refs())
    count = sweep(place.store, wishes).objects if prune else len(mark(place.store, wishes))
    done = "were removed" if prune else "could go"
    get_run_logger().info("%d artifacts are whole, %d objects %s", verdict.artifacts, count, done)
    return {"artifacts": verdict.artifacts, "blobs": verdict.blobs, "objects": count}
