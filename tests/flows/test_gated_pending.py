"""A queue whose line has an exam: every merge is measured, the gate moves the champion or leaves a submission out."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient
from prefect.settings import PREFECT_API_URL, temporary_settings
from transformers import AutoModel

from configs.chain import Ability
from configs.exam import Exam
from flows import pending
from flows.examining import examiner_of
from flows.notices import CHAMPION, REFUSED, Folded
from flows.service import merge_pending
from flows.workplace import here
from storage.errors import Unanswered
from storage.lines import Line
from storage.queue import Queue
from storage.refs import CheckpointRef
from storage.registry_lines import LineVersions
from tasks.codecs import Dense
from tasks.data import Digits, Jsonl
from tasks.digits_base import DigitsBase, train_digits_base
from tasks.evaluate import evaluate, leading
from tasks.export import export
from tasks.gate import Gate, OnFailure
from tasks.intake import Intake
from tasks.lineage.kept import PAGE
from tasks.lineage.versions import version_lineage
from tasks.mergers import Average, Opcm, TaskArithmetic
from tasks.recipe import Recipe
from tasks.retry import OtherRecipe
from tasks.suites import CausalLm, ImageClassification
from tasks.suites.heads import ClassMeans
from tests.builders import perturbed
from tests.flows.arrivals import submit
from tests.flows.test_pending import artifacts, await_events

LINE = "digits"
SUITE = Ability("upright", ImageClassification(Digits(limit=300), ClassMeans()))
_SERVER = multiprocessing.get_context("forkserver")

pytestmark = [pytest.mark.usefixtures("prefect_server", "home"), pytest.mark.filterwarnings("ignore:.*is_gradient")]


@pytest.fixture
def base(home: Path, tables: Path) -> CheckpointRef:
    """A line of a small model that knows upright digits; what is merged is added whole."""
    home.mkdir()
    shutil.copy(tables, home)
    store = here().store
    found = train_digits_base(DigitsBase(width=32, steps=60), store)
    Line(store.objects, LINE).open(found, Recipe(TaskArithmetic(scale=1.0)).spec())
    return found


def set_exam(on_failure: OnFailure, **rules: Any) -> None:
    gate = Gate(average_drop=0.05, significance=None, on_failure=on_failure)
    exam = Exam((SUITE,), gate=replace(gate, **rules))
    Queue(here().store.objects, LINE).set_policy({**Intake(codec=Dense()).spec(), "exam": exam.spec()})


def drop(base: CheckpointRef, folder: Path, name: str, seed: int, size: float, weight: float = 1.0) -> None:
    """Submit the base with noise of this size on every parameter: a little does no harm, much of it does."""
    source = folder / "base"
    if not source.exists():
        export(base, source, here().store)
    perturbed(AutoModel.from_pretrained(source), seed, size).save_pretrained(folder / name)
    submit(folder / name, base, LINE, weight)


def aliases() -> dict[str, int]:
    found = MlflowClient(here().settings.tracking).get_registered_model(LINE).aliases
    return {name: int(version) for name, version in found.items()}


def states() -> dict[str, tuple[str, str]]:
    return {one.task: (one.state, one.kind) for one in Queue(here().store.objects, LINE).submissions()}


def test_what_fails_is_left_out_with_its_reason_and_the_others_go_on(base: CheckpointRef, tmp_path: Path) -> None:
    set_exam("leave_out")
    for seed, (name, size) in enumerate({"first": 1e-3, "harmful": 1.0, "second": 1e-3}.items(), 1):
        drop(base, tmp_path, name, seed, size)
    found = merge_pending(LINE)
    assert [entry.task for entry in found.merged] == ["first", "second"]
    (aside,) = found.quarantined
    assert (aside.task, aside.kind) == ("harmful", "Gate")
    assert "points below the champion's" in aside.why
    assert states() == {
        "first": ("merged", "passed"),
        "harmful": ("quarantined", "Gate"),
        "second": ("merged", "passed"),
    }
    assert [entry.task for entry in Line(here().store.objects, LINE).history()] == ["first", "second"]
    assert aliases() == {"head": 3, "champion": 3, "previous": 1, "challenger": 2}
    client = MlflowClient(here().settings.tracking)
    versions = {number: client.get_model_version(LINE, str(number)) for number in (1, 2, 3)}
    assert [versions[number].tags["gate"] for number in (1, 2, 3)] == ["passed", "failed", "passed"]
    assert versions[2].tags["gate.reasons"] == aside.why
    model = versions[3].tags["model"]
    score = leading(here().store.open(evaluate(model, [SUITE], here().store, base=base)))["upright"]
    run = client.get_run(versions[3].run_id)
    assert run.data.metrics["average"] == pytest.approx(score)
    assert run.data.metrics["accuracy/upright"] == pytest.approx(score)
    assert "points below" in artifacts(f"{LINE}-quarantine")[0]
    at_base = leading(here().store.open(evaluate(base, [SUITE], here().store, base=base)))["upright"]
    known = LineVersions(here().registry, LINE)
    accuracy = version_lineage(known.one("3"), known.all(), [], here().store).accuracy
    assert (accuracy.tasks, accuracy.suites, accuracy.alone) == ((), ("upright",), {})
    assert accuracy.base == {"upright": at_base}, "the first merge was held against it"
    assert [row.scores["upright"].value for row in accuracy.rows][-1] == score
    (page,) = here().settings.home.glob(f"mlflow-artifacts/*/{versions[3].run_id}/artifacts/{PAGE}")
    assert "The exam of the line asks upright of every merge" in page.read_text()
    assert await_events(CHAMPION, {LINE}) == await_events(REFUSED, {LINE}) == {LINE}


def test_what_fails_is_written_smaller_where_the_gate_lists_factors(base: CheckpointRef, tmp_path: Path) -> None:
    set_exam("leave_out", retry=(0.9, 1e-4))
    drop(base, tmp_path, "first", 1, 1e-3)
    drop(base, tmp_path, "harmful", 2, 1.0)
    found = merge_pending(LINE)
    assert [(entry.task, entry.factor) for entry in found.merged] == [("first", 1.0), ("harmful", 1e-4)]
    assert not found.quarantined
    assert states() == {"first": ("merged", "passed"), "harmful": ("merged", "passed")}
    assert aliases() == {"head": 2, "champion": 2, "previous": 1}
    assert MlflowClient(here().settings.tracking).get_model_version(LINE, "2").tags["factor"] == "0.0001"


SMALL = OtherRecipe(TaskArithmetic(scale=1e-4))


def test_what_fails_is_merged_by_another_recipe_and_with_it_what_was_there(base: CheckpointRef, tmp_path: Path) -> None:
    """The first of the recipes has no weights, and is passed over."""
    set_exam("leave_out", retry=(OtherRecipe(Opcm()), SMALL))
    place = here()
    drop(base, tmp_path, "first", 1, 1e-3)
    drop(base, tmp_path, "harmful", 2, 1.0, weight=2.0)
    drop(base, tmp_path, "after", 3, 1e-3)
    found = merge_pending(LINE)
    line = Line(place.store.objects, LINE)
    assert found.merged == tuple(line.entries())[1:] == tuple(line.steps())
    _, brought, after = found.merged
    assert [one.action for one in found.merged] == ["fold", "rebuild", "fold"]
    assert [one.merger["scale"] for one in found.merged] == [1.0, 1e-4, 1e-4]
    assert [(one.task, one.weight) for one in brought.folds] == [("first", 1.0), ("harmful", 2.0)]
    assert brought.why.startswith("the gate refused 'harmful' by task_arithmetic scale 1.0: its average over one task")
    assert brought.why.endswith("; by task_arithmetic scale 0.0001 it passes")
    assert states() == dict.fromkeys(("first", "harmful", "after"), ("merged", "passed"))
    assert Queue(place.store.objects, LINE).find(found_content("harmful")).why == brought.why  # type: ignore[union-attr]
    assert aliases() == {"head": 3, "champion": 3, "previous": 2}
    client = MlflowClient(place.settings.tracking)
    versions = [client.get_model_version(LINE, str(number)) for number in (1, 2, 3)]
    assert [json.loads(one.tags["merger"])["scale"] for one in versions] == [1.0, 1e-4, 1e-4]
    assert [one.tags["parent_version"] for one in versions] == ["none", "1", "2"]
    assert f"all were merged again: {brought.why}" in versions[1].description
    assert any("all merged again by task_arithmetic" in told for told in artifacts(f"{LINE}-pending"))
    assert merge_pending(LINE) == Folded(LINE)

    champion = examiner_of(Queue(place.store.objects, LINE), line)
    assert champion is not None
    facts = champion.examine(line.steps()[:2], after).verdict.facts  # type: ignore[union-attr]
    model = versions[1].tags["model"]
    score = leading(place.store.open(evaluate(CheckpointRef(model), [SUITE], place.store, base=base)))["upright"]
    assert facts["champion_average"] == pytest.approx(score)


def found_content(task: str) -> str:
    return next(one.content for one in Queue(here().store.objects, LINE).submissions() if one.task == task)


def test_what_no_recipe_saves_is_left_out(base: CheckpointRef, tmp_path: Path) -> None:
    set_exam("leave_out", retry=(0.9, OtherRecipe(Average())))
    drop(base, tmp_path, "harmful", 2, 1.0)
    (aside,) = merge_pending(LINE).quarantined
    assert (aside.task, aside.kind) == ("harmful", "Gate")
    assert [one.action for one in Line(here().store.objects, LINE).entries()] == ["open"]
    assert aliases() == {"challenger": 1}


def test_what_fails_may_stay_in_the_line_while_the_champion_is_another(base: CheckpointRef, tmp_path: Path) -> None:
    set_exam("keep")
    for seed, (name, size) in enumerate({"first": 1e-3, "harmful": 1.0, "after": 1e-3}.items(), 1):
        drop(base, tmp_path, name, seed, size)
    assert [entry.task for entry in merge_pending(LINE).merged] == ["first", "harmful", "after"]
    assert states() == {"first": ("merged", "passed"), "harmful": ("merged", "failed"), "after": ("merged", "failed")}
    assert aliases() == {"head": 3, "champion": 1, "challenger": 3}


def test_without_a_champion_a_merge_is_held_against_the_line_before_it(base: CheckpointRef, tmp_path: Path) -> None:
    """The line had a merge before it had an exam."""
    Queue(here().store.objects, LINE).set_policy(Intake(codec=Dense()).spec())
    drop(base, tmp_path, "spoiled", 1, 1.0)
    merge_pending(LINE)
    set_exam("leave_out")
    drop(base, tmp_path, "after", 2, 1e-3)
    merge_pending(LINE)
    assert states() == {"spoiled": ("merged", ""), "after": ("merged", "passed")}
    assert aliases() == {"head": 2, "champion": 2}


def test_an_exam_that_cannot_be_held_is_no_fault_of_the_submission(base: CheckpointRef, tmp_path: Path) -> None:
    gone = Ability(
        "gone", CausalLm(Jsonl(train=("/nowhere/*.jsonl",), test=("/nowhere/*.jsonl",)), prompt="q", answer="a")
    )
    policy = {**Intake(codec=Dense()).spec(), "exam": Exam((gone,)).spec()}
    Queue(here().store.objects, LINE).set_policy(policy)
    drop(base, tmp_path, "first", 1, 1e-3)
    with pytest.raises(Unanswered, match=r"'first'.*nowhere"):
        merge_pending(LINE)
    assert states() == {"first": ("pending", "")}
    set_exam("keep")
    assert [entry.task for entry in merge_pending(LINE).merged] == ["first"]


def mistake(room: str) -> Callable[..., Any]:
    """A function with a bug, as if it stood in a file of that room."""
    names: dict[str, Any] = {}
    file = Path(__file__).parents[2] / room / "ingest.py"
    exec(compile("def wrong(*_, **__):\n    return {}['a bug']\n", str(file), "exec"), names)
    found: Callable[..., Any] = names["wrong"]
    return found


@pytest.mark.parametrize("where", ["tasks.receive.ingest", "tasks.extract.extract_update", "tasks.merge.fold_update"])
def test_a_bug_is_no_fault_of_the_submission(
    base: CheckpointRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """It stays first in the queue, with the error as its note, and is merged when the bug is gone."""
    drop(base, tmp_path, "first", 1, 1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(where, mistake("tasks"))
        with pytest.raises(KeyError):
            merge_pending(LINE)
    (one,) = Queue(here().store.objects, LINE).submissions()
    assert (one.state, one.why, one.tries) == ("pending", "KeyError: 'a bug'", 0)
    assert [entry.task for entry in merge_pending(LINE).merged] == ["first"]


def test_an_error_of_a_library_over_its_files_is(
    base: CheckpointRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(base, tmp_path, "first", 1, 1e-3)
    monkeypatch.setattr("tasks.receive.ingest", mistake(".venv/lib/python3.11/site-packages/transformers"))
    (aside,) = merge_pending(LINE).quarantined
    assert (aside.kind, "cannot be read: KeyError" in aside.why) == ("InvalidInput", True)


DEATHS = ["before evaluate", "after evaluate", "before commit", "after commit", "before register", "after register"]


def dying(death: str, task: str, home: str, api: str) -> None:
    """Merge what waits, and be killed there."""
    from flows import examining, retrying

    os.environ["DELTAWORKS_HOME"] = home
    when, _, step = death.partition(" ")
    run_now = pending.run_now

    def deadly(one: Any, label: str, *inputs: Any) -> Any:
        is_there = label == f"{LINE}: {step} {task}"
        if is_there and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        found = run_now(one, label, *inputs)
        if is_there:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    pending.run_now = examining.run_now = retrying.run_now = deadly
    with temporary_settings({PREFECT_API_URL: api}):
        merge_pending(LINE)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["harmful", "second"])
def test_a_run_killed_at_every_step_comes_to_the_same_verdicts(base: CheckpointRef, tmp_path: Path, task: str) -> None:
    set_exam("leave_out")
    for seed, (name, size) in enumerate({"first": 1e-3, "harmful": 1.0, "second": 1e-3}.items(), 1):
        drop(base, tmp_path, name, seed, size)
    api = PREFECT_API_URL.value()
    assert api
    for death in DEATHS:
        if task == "harmful" and "commit" in death:
            continue
        process = _SERVER.Process(target=dying, args=(death, task, str(here().settings.home), api))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, death
    merge_pending(LINE)
    assert states() == {
        "first": ("merged", "passed"),
        "harmful": ("quarantined", "Gate"),
        "second": ("merged", "passed"),
    }
    assert aliases() == {"head": 3, "champion": 3, "previous": 1, "challenger": 2}


@pytest.mark.slow
def test_a_run_killed_at_every_step_comes_to_the_same_rebuild(base: CheckpointRef, tmp_path: Path) -> None:
    set_exam("leave_out", retry=(SMALL,))
    for seed, (name, size) in enumerate({"first": 1e-3, "harmful": 1.0, "second": 1e-3}.items(), 1):
        drop(base, tmp_path, name, seed, size)
    api = PREFECT_API_URL.value()
    assert api
    for death in DEATHS:
        process = _SERVER.Process(target=dying, args=(death, "harmful", str(here().settings.home), api))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL, death
    merge_pending(LINE)
    assert states() == dict.fromkeys(("first", "harmful", "second"), ("merged", "passed"))
    assert [one.action for one in Line(here().store.objects, LINE).entries()] == ["open", "fold", "rebuild", "fold"]
    assert aliases() == {"head": 3, "champion": 3, "previous": 2}
