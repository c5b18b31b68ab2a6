"""What a rebuild would merge: how updates are named, which recipe comes of the options, and what is refused."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

import pytest

from configs.recipe_words import changed_recipe
from flows.continuation import Wanted, check_continuation
from flows.plan import Plan, plan_rebuild
from flows.tables import journal_table, plan_table, recipe_name, recipe_text
from storage.artifacts import ArtifactStore
from storage.errors import Conflict, InvalidInput, Missing
from storage.lines import Entry, Line
from storage.manifest import Lineage
from storage.options import rebuild_options
from storage.refs import CheckpointRef, StateRef, UpdateRef
from tasks.mergers import Average, Opcm, Ties
from tasks.recipe import Recipe
from tasks.scalings import MatchNorm
from tasks.sparsifiers import Dare
from tests.builders import memory_store


@pytest.fixture
def store() -> ArtifactStore:
    return memory_store()


def made(store: ArtifactStore, kind: Any, text: str) -> Any:
    draft = store.draft(kind, Lineage("test"))
    draft.facts["text"] = text
    return draft.commit()


@pytest.fixture
def line(store: ArtifactStore) -> Line:
    """Four updates by average, the second with a weight: a, b, c and 1, a task named like a step."""
    found = Line(store.objects, "main")
    found.open(CheckpointRef(made(store, "checkpoint", "base")), Average().spec())
    for task in ("a", "b", "c", "1"):
        update, state = UpdateRef(made(store, "update", task)), StateRef(made(store, "state", task))
        found.fold(found.head(), task, update, state, 2.0 if task == "b" else 1.0)
    return found


def plan(line: Line, store: ArtifactStore, recipe: Recipe | None = None, **options: Any) -> Plan:
    return plan_rebuild(line, line.head(), recipe or Recipe(Average()), store, **options)


def tasks(plan: Plan) -> str:
    return "".join(one.task for one in plan.folds)


def test_an_update_is_named_by_task_step_or_ref(line: Line, store: ArtifactStore) -> None:
    ref = line.history()[2].update
    assert ref is not None
    for name in ("c", "3", ref, ref[:20]):
        assert tasks(plan(line, store, drop=[name])) == "ab1"
    assert tasks(plan(line, store, drop=["a", "4"])) == "bc"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop": ["d"]}, r"'d' is no update of line 'main'\. .*1 a \(update/\w{8}\), 2 b"),
        ({"drop": ["5"]}, "'5' is no update"),
        ({"drop": ["0"]}, "'0' is no update"),
        ({"drop": ["1"]}, "'1' could be several updates"),
        ({"drop": ["update/"]}, "'update/' is no update"),
        ({"drop": ["a", "b", "c", "4"]}, r"nothing would be left.*line rollback main 0"),
        (
            {"order": ["a", "b", "c"]},
            r"--order lacks 1\. It must name each update that is kept exactly once: a, b, c, 1",
        ),
        ({"order": ["a", "b", "c", "4", "3"]}, "--order names twice c"),
        ({"order": ["a", "b", "c", "4"], "drop": ["b"]}, "--order names, though it is dropped, b"),
        ({"order": ["a", "b", "c", "d"]}, "'d' is no update"),
        ({"weights": {"d": 1.0}}, "'d' is no update"),
        ({"weights": {"a": 0.0}}, "the weight of 'a' must be positive, found 0"),
        ({"weights": {"a": float("nan")}}, "the weight of 'a' must be positive, found nan"),
        ({"weights": {"a": 2.0}, "drop": ["a"]}, "both dropped and given a weight"),
        (
            {"recipe": Recipe(Opcm())},
            r"merger 'opcm' lets every update count the same, but 'b' has weight 2\. Add --weight b=1",
        ),
    ],
)
def test_what_cannot_be_merged_is_refused(
    line: Line, store: ArtifactStore, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInput, match=message):
        plan(line, store, **options)


def test_order_goes_with_drop_and_weights(line: Line, store: ArtifactStore) -> None:
    found = plan(line, store, drop=["a"], order=["4", "c", "b"], weights={"b": 1.0, "c": 0.5})
    assert [(one.task, one.step, one.weight) for one in found.folds] == [("1", 4, 1.0), ("c", 3, 0.5), ("b", 2, 1.0)]
    assert [one.task for one in found.dropped] == ["a"]
    assert found.changes


def test_a_plan_that_changes_nothing(line: Line, store: ArtifactStore) -> None:
    assert not plan(line, store).changes
    assert not plan(line, store, order=["a", "b", "c", "4"], weights={"b": 2.0}).changes
    assert plan(line, store, weights={"b": 1.0}).changes
    assert plan(line, store, Recipe(Average(), Dare())).changes


def test_what_is_no_longer_there_is_said_before_anything_is_merged(line: Line, store: ArtifactStore) -> None:
    gone = line.history()[0].update
    assert gone is not None
    del store.objects._objects[gone]  # type: ignore[attr-defined]
    with pytest.raises(Missing, match=r"update/\w+ of line 'main' is not in memory"):
        plan(line, store, drop=["c"])
    assert tasks(plan(line, store, drop=["a"])) == "bc1"


def test_a_line_without_merges_cannot_be_rebuilt(store: ArtifactStore) -> None:
    line = Line(store.objects, "empty")
    line.open(CheckpointRef(made(store, "checkpoint", "base")), Average().spec())
    with pytest.raises(InvalidInput, match="no merges"):
        plan(line, store)


SPEC = Recipe(Ties(density=0.4), Dare(density=0.5), MatchNorm(factor=2.0)).spec()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, Recipe(Ties(density=0.4), Dare(density=0.5), MatchNorm(factor=2.0))),
        ({"merger": "opcm"}, Recipe(Opcm(), Dare(density=0.5), MatchNorm(factor=2.0))),
        ({"merger": "ties"}, Recipe(Ties(), Dare(density=0.5), MatchNorm(factor=2.0))),
        ({"settings": ["scale=0.3"]}, Recipe(Ties(density=0.4, scale=0.3), Dare(density=0.5), MatchNorm(factor=2.0))),
        ({"sparsify": "none", "scaling": "none"}, Recipe(Ties(density=0.4))),
        (
            {
                "merger": "opcm",
                "settings": ["alpha=1e-1", "sparsify.seed=7", "scaling.factor=1"],
                "scaling": "match_norm",
            },
            Recipe(Opcm(alpha=0.1), Dare(density=0.5, seed=7), MatchNorm(factor=1.0)),
        ),
    ],
)
def test_options_change_the_recipe_of_a_line(options: dict[str, Any], expected: Recipe) -> None:
    assert changed_recipe(SPEC, "main", **options) == expected


def test_a_merger_of_an_earlier_version_becomes_todays() -> None:
    old = {**Average().spec(), "version": 0}
    assert changed_recipe(old, "main") == Recipe(Average())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"merger": "opmc"}, "did you mean opcm"),
        ({"settings": ["densty=0.1"]}, "did you mean density"),
        ({"settings": ["density=2"]}, r"density must be in \(0, 1\], found 2"),
        ({"settings": ["density=many"]}, "density"),
        ({"settings": ["density"]}, "not of the form key=value"),
        ({"settings": ["codec.density=1"]}, "not of the form key=value"),
        ({"settings": ["name=opcm"]}, "Choose with --merger NAME"),
        ({"settings": ["density=[1"]}, "cannot be read"),
        ({"scaling": "none", "settings": ["scaling.factor=1"]}, "no scaling. Name one: --scaling NAME"),
    ],
)
def test_wrong_options_are_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        changed_recipe(SPEC, "main", **options)


@pytest.mark.parametrize(
    "wanted", [Recipe(Opcm()), Recipe(Ties(density=0.1), None, MatchNorm()), Recipe(Ties(density=0.4), Dare(seed=1))]
)
def test_the_command_that_an_error_proposes_does_what_it_says(wanted: Recipe) -> None:
    words = shlex.split(rebuild_options(SPEC, wanted.spec()))
    options: dict[str, Any] = {"settings": []}
    for option, value in zip(words[::2], words[1::2], strict=True):
        if option == "--set":
            options["settings"].append(value)
        else:
            options[option.removeprefix("--")] = value
    assert changed_recipe(SPEC, "main", **options) == wanted


def wanted(line: Line, *names: str) -> list[Wanted]:
    held = {one.task: one for one in line.history()}
    return [
        Wanted(name, held[name].update, held[name].weight)  # type: ignore[arg-type]
        if name in held
        else Wanted(name, UpdateRef(f"update/{name * 64}"))  # type: ignore[arg-type]
        for name in names
    ]


@pytest.mark.parametrize("names", ["", "a", "abc", "abc1", "abc1de"])
def test_a_chain_may_go_on_with_a_line_that_begins_like_it(line: Line, names: str) -> None:
    check_continuation("main", line.head(), line.history(), wanted(line, *names))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            "acb1",
            r"'b' \(update/\w+\) as its step 2, this chain would merge 'c'.*`deltaworks line rebuild main --order a,c",
        ),
        ("ac1", r"The line: a, b, c, 1\. The chain: a, c, 1\. `deltaworks line rebuild main --drop b`"),
        ("adbc1", r"\. Take d out of the chain's tasks, or move it to their end: the line lacks it"),
        ("cda1", r"--drop b --order c,a,1` makes the line like the chain; or take d out"),
        ("de", r"Take d.*|Give the line a new name"),
    ],
)
def test_a_chain_that_differs_is_told_how(line: Line, names: str, message: str) -> None:
    with pytest.raises(Conflict, match=message):
        check_continuation("main", line.head(), line.history(), wanted(line, *names))


def test_a_chain_with_another_weight_is_told_so(line: Line) -> None:
    chain = wanted(line, "a", "b")
    with pytest.raises(Conflict, match=r"'b' with weight 2, this chain gives it 1\. .*line rebuild main --weight b=1`"):
        check_continuation("main", line.head(), line.history(), [chain[0], Wanted("b", chain[1].update)])


def test_a_task_with_another_update_is_told_so(line: Line) -> None:
    other = Wanted("a", UpdateRef(f"update/{'7' * 64}"))  # type: ignore[arg-type]
    with pytest.raises(Conflict, match=r"\. 'a' gives another update than it did: undo.*--drop a"):
        check_continuation("main", line.head(), line.history(), [other, *wanted(line, "b")])


def test_a_rebuilt_line_says_since_when(line: Line, store: ArtifactStore) -> None:
    line.rebuild(line.head(), Average().spec(), [line.history()[0].fold], "b was bad")
    with pytest.raises(Conflict, match=r"The line since rebuild 5 \(b was bad\): a\."):
        check_continuation("main", line.head(), line.history(), wanted(line, "b"))


def test_recipes_are_printed_in_one_line() -> None:
    assert recipe_text(Average().spec()) == "average"
    assert recipe_name(SPEC) == "ties (dare, match_norm)"
    text = recipe_text(SPEC)
    assert text.startswith("ties aggregate mean, density 0.4")
    assert "; sparsify dare density 0.5" in text
    assert "; scaling match_norm factor 2.0" in text


def test_tables_say_what_changes(line: Line, store: ArtifactStore) -> None:
    found = plan(line, store, Recipe(Ties(), Dare()), drop=["c"], weights={"a": 3.0})
    *texts, table = plan_table(found, [StateRef(made(store, "state", "found"))])
    assert [text.split()[0] for text in map(str, texts)] == ["line", "merger", "before"]
    columns = {column.header: list(column.cells) for column in table.columns}  # type: ignore[union-attr]
    assert columns["task"] == ["a x3", "b x2", "1", "c"]
    assert columns["was"] == ["1", "2", "4", "3"]
    assert columns["state"][0].startswith("found: state/")  # type: ignore[union-attr]
    assert columns["state"][1:] == ["to be merged", "to be merged", "left out"]

    again = [one.fold for one in line.history()[:2]]
    line.rebuild(
        line.head(), Recipe(Ties(), Dare()).spec(), [again[0], replace(again[1], factor=1.5)], "[odd] [/] reason"
    )
    entries: list[Entry] = list(line.entries())
    log = {column.header: list(column.cells) for column in journal_table("line main", entries).columns}
    assert log["task"] == ["by average", "a", "b x2", "c", "1", "a, b x2, written x1.5 by ties (dare)"]
    assert log["why"][-1] == r"\[odd] \[/] reason"
