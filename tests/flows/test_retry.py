"""A chain whose gate lists other recipes: a merge that fails is made by them, with all that the line merged before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from configs.chain import ChainConfig, Task
from flows import progress
from flows.chain import Outcome, chain
from flows.cli import app
from flows.growing import Step
from flows.report import accuracy_rows, accuracy_table, gate_lines
from flows.workplace import here
from storage.errors import Conflict
from storage.lines import Line
from storage.registry_lines import LineVersions
from tasks.extract import Extract
from tasks.fine_tune import trained_from
from tasks.gate import Gate, OnFailure
from tasks.lineage.versions import version_lineage
from tasks.merge import fold_update
from tasks.mergers import TaskArithmetic, TsvM
from tasks.recipe import Recipe
from tasks.retry import OtherRecipe
from tasks.search import Search
from tests.flows.test_chain import Count
from tests.flows.test_gated_chain import aliases, gated

pytestmark = pytest.mark.usefixtures("prefect_server", "home")

NAME = "smoke-average"
SPECTRUM = OtherRecipe(TsvM())


@pytest.fixture(autouse=True)
def count() -> Count:
    watcher = Count()
    progress.watch(watcher)
    return watcher


def config(
    tasks: str, retry: tuple[float | OtherRecipe, ...] = (0.9, SPECTRUM), on_failure: OnFailure = "leave_out"
) -> ChainConfig:
    """Averaging rot90 and invert costs more than is allowed, by TSV-M it does not; what was ruined never passes."""
    found = gated(None)
    known = {task.name: task for task in found.tasks}
    ruined = replace(known["permute"].tuner, learning_rate=1.0)  # type: ignore[type-var]
    known["ruined"] = Task("ruined", known["permute"].suite, ruined)
    gate = Gate(average_drop=0.1, significance=None, retry=retry, on_failure=on_failure)
    lines = (replace(found.lines[0], gate=gate),)
    return replace(found, tasks=tuple(known[name] for name in tasks.split()), lines=lines)


def told(some: list[Step]) -> list[tuple[Any, ...]]:
    return [(one.entry, one.model, one.scores, one.summary, one.version.version, one.verdict) for one in some]


def same(one: Outcome, other: Outcome) -> bool:
    lists = [(told(each.steps), told(each.left_out)) for each in (one.lines[0], other.lines[0])]
    return lists[0] == lists[1] and accuracy_rows(one) == accuracy_rows(other)


def test_another_recipe_merges_all_again_and_the_line_goes_on_by_it(count: Count) -> None:
    first = chain(config("rot90 ruined invert"))
    (line,), store = first.lines, here().store
    journal = Line(store.objects, NAME)
    _, alone, brought = journal.entries()
    assert [(step.entry.task, step.version.version) for step in line.steps] == [("rot90", 1), ("invert", 3)]
    assert [(step.entry.task, step.version.version) for step in line.left_out] == [("ruined", 2)]
    assert (alone.action, alone.merger["name"], brought.action, brought.merger["name"]) == (
        "fold",
        "average",
        "rebuild",
        "tsv_m",
    )
    assert brought.why.startswith("the gate refused 'invert' by average: its average over 2 tasks is ")
    assert brought.why.endswith("; by tsv_m it passes")
    state = None
    for one in brought.folds:
        state = fold_update(brought.base, state, one.update, Recipe(TsvM()), store)
        assert one.state == state
    assert [one.task for one in brought.folds] == ["rot90", "invert"]
    assert f"{NAME}: evaluate invert at 0.9" in count.labels
    assert aliases(NAME) == {"head": 3, "champion": 3, "previous": 1, "challenger": 2}

    before = len(count.labels)
    assert same(chain(config("rot90 ruined invert")), first)
    assert len(count.labels) == before, "everything is found done"

    longer = chain(config("rot90 ruined invert permute"))
    assert told(longer.lines[0].steps)[:2] == told(line.steps)
    last = longer.lines[0].last
    assert (last.entry.action, last.entry.merger["name"], last.version.version) == ("fold", "tsv_m", 4)
    assert last.summary.forgetting is not None
    assert last.entry.state == fold_update(brought.base, state, last.entry.fold.update, Recipe(TsvM()), store)
    done = len(count.labels)
    assert same(chain(config("rot90 ruined invert permute")), longer)
    assert len(count.labels) == done
    assert same(chain(config("rot90 ruined invert")), first), "what the line holds beyond is left alone"

    read_right(longer, brought.why)
    taken_over = config("rot90 ruined invert permute", retry=())
    taken_over = replace(taken_over, lines=(replace(taken_over.lines[0], merger=TsvM()),))
    assert same(chain(taken_over), longer), "what came in before came in as it did"
    assert len(count.labels) == done
    with pytest.raises(Conflict, match=r"merges with .*tsv_m.*line rebuild smoke-average --merger average"):
        chain(config("rot90 ruined invert", retry=(0.9,)))


def read_right(outcome: Outcome, why: str) -> None:
    """What people see of the version that was merged again."""
    (line,) = outcome.lines
    versions = LineVersions(here().registry, NAME)
    third = versions.one("3")
    assert '"name":"tsv_m"' in third.tags["merger"]
    assert (third.tags["parent_version"], third.tags["tasks"]) == ("1", "rot90 invert")
    assert f"and all were merged again: {why}" in third.description
    journal = list(Line(here().store.objects, NAME).entries())
    page = version_lineage(versions.one("head"), versions.all(), journal, here().store)
    assert page.merger["name"] == "tsv_m"
    summaries = [row.summary for row in page.accuracy.rows]
    assert [one and one.forgetting for one in summaries] == [step.summary.forgetting for step in line.steps]
    again = next(node for node in page.of_kind("model") if node.row == 1)
    assert again.notes[0] == "merged again with a later update, and not written"
    assert "average" not in again.figures
    assert f"{NAME} version 3, + invert: passed, all merged again: {why}" in list(gate_lines(line))
    names, mergers = accuracy_table(outcome, line).columns[0], accuracy_table(outcome, line).columns[-2]
    assert list(zip(names.cells, mergers.cells, strict=True))[-1] == ("merger", "tsv_m")
    said = CliRunner().invoke(app, ["why", f"{NAME}@3"])
    assert said.exit_code == 0, said.output
    assert f"by tsv_m, by which all were merged again: {why}" in said.output.replace("\n", "")
    assert "states and the model are the same, byte for byte" in said_by("reproduce", f"{NAME}@3")
    assert "rebuild" in said_by("line", "log", NAME)


def said_by(*words: str) -> str:
    found = CliRunner().invoke(app, list(words))
    assert found.exit_code == 0, found.output
    return " ".join(found.output.split())


@pytest.mark.slow
def test_what_is_trained_from_the_head_is_trained_from_what_it_was_then(count: Count) -> None:
    """A rebuild makes other states of the merges before it, from which nobody has trained."""
    added = OtherRecipe(TaskArithmetic(scale=1.0))
    started = config("rot90 invert permute", retry=(added,), on_failure="keep")
    gate = replace(started.lines[0].gate, average_drop=None, of_alone=0.4)  # type: ignore[type-var]
    lines = (replace(started.lines[0], gate=gate),)
    started = replace(started, lines=lines, start="head", extract=Extract(against="start"))
    first = chain(started)
    steps = first.lines[0].steps
    assert [one.entry.action for one in steps] == ["fold", "rebuild", "fold"]
    starts = [trained_from(here().store.open(one.tuned).manifest.lineage) for one in first.prepared]
    assert starts == [first.base, steps[0].model, steps[1].model]
    before = len(count.labels)
    assert same(chain(started), first)
    assert len(count.labels) == before


@pytest.mark.slow
@pytest.mark.parametrize("back", [("--entry", "1"), ("1",), ("0",)])
def test_going_back_over_it_or_into_it(count: Count, back: tuple[str, ...]) -> None:
    first = chain(config("rot90 ruined invert permute"))
    said_by("line", "rollback", NAME, *back, "--why", "to see")
    again = chain(config("rot90 ruined invert permute"))
    assert again.lines[0].last.entry.state == first.lines[0].last.entry.state
    before = len(count.labels)
    assert same(chain(config("rot90 ruined invert permute")), again)
    assert len(count.labels) == before


@pytest.mark.slow
def test_a_line_that_searches_its_factors_searches_that_of_the_other_recipe_too(count: Count) -> None:
    searching = config("rot90 invert permute", retry=(SPECTRUM,), on_failure="keep")
    line = replace(searching.lines[0], search=Search(factors=(0.95, 1.05)))
    first = chain(replace(searching, lines=(line,)))
    brought = first.lines[0].steps[1].entry
    assert (brought.action, brought.folds[0].factor) == ("rebuild", 1.0)
    assert brought.factor == brought.folds[-1].factor in (0.95, 1.05)
    assert f"{NAME}: search invert by tsv_m" in count.labels
    before = len(count.labels)
    assert same(chain(replace(searching, lines=(line,))), first)
    assert len(count.labels) == before
