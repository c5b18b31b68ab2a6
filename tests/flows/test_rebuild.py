"""Rebuilding a line under a real Prefect server: the refs are those of a line that was grown that way directly."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

import tasks.merge
from configs.chain import ChainConfig, LineConfig, load_chain
from flows import progress
from flows.chain import chain
from flows.plan import Plan, plan_rebuild
from flows.rebuild import found_done, next_steps, rebuild
from flows.report import comparison_table
from flows.tables import show_artifact
from flows.workplace import here
from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.errors import Conflict, InvalidInput
from storage.lines import Entry, Line
from storage.refs import Ref, StateRef, UpdateRef
from storage.verify import verify, verify_lines
from tasks.materialize import materialize
from tasks.mergers import Average, Opcm, Sce, Ties
from tasks.recipe import Recipe
from tasks.scalings import MatchNorm
from tasks.sparsifiers import Dare
from tests.flows.test_chain import Count

pytestmark = pytest.mark.usefixtures("prefect_server")

OPCM = Recipe(Opcm(alpha=0.5))


def config(*names: str, line: LineConfig | None = None) -> ChainConfig:
    """The smoke chain with these of its tasks, into one line."""
    smoke = load_chain("smoke")
    chosen = {task.name: task for task in smoke.tasks}
    return replace(smoke, tasks=tuple(chosen[name] for name in names), lines=(line or smoke.lines[0],))


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory, prefect_server: None) -> Path:
    """A home in which rot90, invert and permute were merged by OPCM."""
    home = tmp_path_factory.mktemp("grown") / "home"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DELTAWORKS_HOME", str(home))
        chain(config("rot90", "invert", "permute"))
    return home


@pytest.fixture
def home(grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it."""
    shutil.copytree(grown, tmp_path / "home")
    monkeypatch.setenv("DELTAWORKS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def count() -> Iterator[Count]:
    watcher = Count()
    progress.watch(watcher)
    yield watcher
    progress.watch(progress.Log())


@pytest.fixture
def line(home: Path) -> Line:
    return Line(here().store.objects, "smoke-opcm")


def plan(line: Line, recipe: Recipe = OPCM, **options: Any) -> Plan:
    return plan_rebuild(line, line.head(), recipe, here().store, **options)


def directly(folds: Sequence[Entry], recipe: Recipe) -> list[StateRef]:
    """The states of merging these updates one by one, in a store that knows nothing of earlier merges."""
    base, state, states = folds[0].base, None, []
    for one in folds:
        assert one.update is not None
        state = tasks.merge.fold_update(base, state, one.update, recipe, here().store, weight=one.weight)
        states.append(state)
    return states


def states(line: Line) -> list[StateRef | None]:
    return [entry.state for entry in line.history()]


RECIPES = {
    "average, weighted": (Recipe(Average()), {"invert": 2.0}),
    "ties of thinned updates, scaled": (Recipe(Ties(density=0.5), Dare(density=0.5), MatchNorm()), {}),
    "joint": (Recipe(Sce(), Dare(density=0.5)), {}),
}


@pytest.mark.parametrize(("recipe", "weights"), RECIPES.values(), ids=RECIPES)
def test_another_method_and_order_give_the_refs_of_a_line_grown_that_way(
    line: Line, count: Count, recipe: Recipe, weights: dict[str, float]
) -> None:
    wanted = plan(line, recipe, order=["permute", "rot90", "invert"], weights=weights, why="a try")
    entry = rebuild(wanted)
    assert count.reused_labels == []
    assert len(count.labels) == 4
    assert entry == line.head()
    assert (entry.number, entry.action, entry.why, dict(entry.merger)) == (4, "rebuild", "a try", recipe.spec())
    assert [(one.task, one.weight) for one in entry.folds] == [
        (name, weights.get(name, 1.0)) for name in ("permute", "rot90", "invert")
    ]
    assert states(line) == directly(wanted.folds, recipe)

    store = here().store
    assert entry.state is not None
    materialize(entry.base, entry.state, store)
    assert not verify(store, store.refs()).findings
    assert not verify_lines(store)
    assert list(show_artifact(store.open(entry.state)))


@pytest.mark.slow
def test_without_an_update_and_then_on_with_its_chain(line: Line, count: Count) -> None:
    newest = chain(config("rot90", "invert", "permute")).lines[0].last.version.version
    count.labels.clear()
    count.reused_labels.clear()
    before = line.history()
    wanted = plan(line, drop=["invert"], why="it hurt")
    assert found_done(wanted) == [before[0].state]
    rebuild(wanted)
    assert count.reused_labels == ["smoke-opcm: merge rot90"]
    assert count.labels == ["smoke-opcm: merge permute", "smoke-opcm: commit 2 updates"]
    assert states(line) == directly(wanted.folds, OPCM)
    assert not plan(line).changes
    with pytest.raises(InvalidInput, match="'invert' is no update"):
        plan(line, drop=["invert"])

    with pytest.raises(Conflict, match=r"since rebuild 4 \(it hurt\): rot90, permute\. .*Take invert out"):
        chain(config("rot90", "invert", "permute"))
    outcome = chain(config("rot90", "permute"))
    assert [step.entry.state for step in outcome.lines[0].steps] == states(line)
    assert [step.version.version - newest for step in outcome.lines[0].steps] == [-2, 1]
    assert chain(config("rot90", "permute")).lines[0].last.version.version == newest + 1
    assert len(list(line.entries())) == 5
    client = MlflowClient(here().settings.tracking)
    head = client.get_model_version_by_alias("smoke-opcm", "head")
    assert (int(head.version), head.tags["tasks"]) == (newest + 1, "rot90 permute")
    assert int(head.tags["parent_version"]) == newest - 2

    longer = chain(config("rot90", "permute", "invert")).lines[0]
    assert (line.head().action, line.head().step, longer.last.version.version) == ("fold", 3, newest + 2)


def test_going_back_before_a_rebuild_is_a_new_version(line: Line, count: Count) -> None:
    newest = chain(config("rot90", "invert", "permute")).lines[0].last.version.version
    best = line.head()
    rebuild(plan(line, drop=["permute"]))
    shorter = chain(config("rot90", "invert"))
    assert shorter.lines[0].last.version.version == newest + 1
    line.rollback(best, "permute was no harm")
    done = len(count.labels)
    again = chain(config("rot90", "invert", "permute"))
    assert count.labels[done:] == ["smoke-opcm: register permute"]
    assert again.lines[0].last.entry.state == best.state
    assert again.lines[0].last.version.version == newest + 2
    assert again.lines[0].beyond == ()
    assert chain(config("rot90", "invert")).lines[0].beyond == ("permute",)


def test_what_stays_keeps_its_factor_and_what_is_new_has_none_searched(line: Line, count: Count) -> None:
    before = line.history()
    unsearched = plan(line, drop=["invert"])
    assert "factor" not in "".join(next_steps(unsearched, rebuild(unsearched)))
    line.rollback(next(line.entries()), "search")
    for entry in before:
        assert entry.update is not None and entry.state is not None
        line.fold(line.head(), entry.task, entry.update, entry.state, 1.0, 2.0)
    shorter = plan(line, drop=["permute"])
    made = rebuild(shorter)
    assert [one.factor for one in made.folds] == [2.0, 2.0]
    assert made.factor == 2.0
    assert "factor" not in "".join(next_steps(shorter, made))
    other = plan(line, order=["invert", "rot90"])
    made = rebuild(other)
    assert [one.factor for one in made.folds] == [1.0, 1.0]
    assert "written with factor 1" in (told := "\n".join(next_steps(other, made)))
    assert "line rollback smoke-opcm 0 --why" in told


def test_a_chain_with_the_new_merger_goes_on_and_one_with_the_old_is_told(line: Line, count: Count) -> None:
    recipe = Recipe(Sce(), Dare(density=0.5))
    rebuild(plan(line, recipe, drop=["invert"]))
    with pytest.raises(Conflict, match=r"rebuild smoke-opcm --merger opcm --set alpha=0\.5.* --sparsify none`"):
        chain(config("rot90", "permute"))
    joint = LineConfig("smoke-opcm", Sce(), Dare(density=0.5))
    outcome = chain(config("rot90", "permute", line=joint))
    assert [step.entry.state for step in outcome.lines[0].steps] == states(line)
    merger = next(column for column in comparison_table(outcome).columns if column.header == "merger")
    assert list(merger.cells) == ["sce (dare)"]
    version = MlflowClient(here().settings.tracking).get_model_version_by_alias("smoke-opcm", "head")
    assert '"sparsify":{"density":0.5,"name":"dare"' in version.tags["merger"]


def test_a_rebuild_that_fails_in_the_middle_leaves_the_line(
    line: Line, count: Count, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = plan(line, order=["permute", "invert", "rot90"])
    expected = directly(wanted.folds, OPCM)
    held, fold = list(line.entries()), tasks.merge.fold_update
    last = wanted.folds[-1].update

    def fail(base: Any, state: Any, update: Any, *rest: Any, **options: Any) -> StateRef:
        if update == last:
            raise InvalidInput("the third update is not to be read today")
        return fold(base, state, update, *rest, **options)

    monkeypatch.setattr(tasks.merge, "fold_update", fail)
    with pytest.raises(InvalidInput, match="not to be read today"):
        rebuild(wanted)
    assert list(line.entries()) == held
    monkeypatch.setattr(tasks.merge, "fold_update", fold)
    again = plan(line, order=["permute", "invert", "rot90"])
    assert again == wanted
    assert found_done(again) == expected[:2]
    count.labels.clear()
    entry = rebuild(again)
    assert count.labels == ["smoke-opcm: merge rot90", "smoke-opcm: commit 3 updates"]
    assert (entry.number, states(line)) == (len(held), expected)


def test_a_merge_that_comes_in_between_makes_it_fail(line: Line, count: Count) -> None:
    theirs = UpdateRef(Ref(f"update/{'7' * 64}"))

    def interfere(label: str) -> None:
        if label.endswith("merge permute"):
            line.fold(line.head(), "theirs", theirs, StateRef(Ref(f"state/{'7' * 64}")))

    count.finished = interfere  # type: ignore[method-assign]
    with pytest.raises(Conflict, match="entry 4 already holds update/7777"):
        rebuild(plan(line, drop=["invert"]))
    assert [entry.task for entry in line.history()] == ["rot90", "invert", "permute", "theirs"]


def test_a_killed_rebuild_leaves_the_line_and_is_done_again(line: Line, home: Path) -> None:
    wanted = plan(line, Recipe(Opcm(alpha=0.25)), drop=["invert"])
    expected = directly(wanted.folds, wanted.recipe)
    other = home.parent / "killed"
    shutil.copytree(home, other)
    store = ArtifactStore(DirectoryObjects(other / "store"))
    for ref in expected:
        (other / "store" / ref).unlink()
    held = list(Line(store.objects, "smoke-opcm").entries())
    command = [sys.executable, "-c", "from flows.cli import main; main()"]
    command += ["line", "rebuild", "smoke-opcm", "--drop", "invert", "--set", "alpha=0.25", "--why", "again"]
    environment = {**os.environ, "DELTAWORKS_HOME": str(other)}
    environment.pop("PREFECT_API_URL", None)
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not store.has(expected[0]):
        assert child.poll() is None, child.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    child.kill()
    child.wait()
    assert list(Line(store.objects, "smoke-opcm").entries()) == held, "killed too late for this test to say anything"

    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "rebuild" in done.stdout and "again" in done.stdout
    assert "export smoke-opcm" in done.stdout
    entry = Line(store.objects, "smoke-opcm").head()
    assert (entry.number, [one.state for one in entry.folds]) == (len(held), expected)
    repeated = subprocess.run(command[:-6] + command[-4:], env=environment, capture_output=True, text=True, timeout=200)
    assert "nothing to do" in repeated.stdout
    assert Line(store.objects, "smoke-opcm").head() == entry
