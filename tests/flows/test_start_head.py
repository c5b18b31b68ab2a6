"""Sequential tuning: a task trained from the merged model of the step before it, and rounds of fold and reset."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient

from configs.chain import ChainConfig, LineConfig, dump_chain, load_chain
from flows import progress
from flows.chain import chain, count_steps
from flows.picture import draw
from flows.report import accuracy_rows, accuracy_table
from flows.workplace import here
from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.errors import Conflict, InvalidInput
from storage.verify import verify
from tasks.codecs import AnyCodec, Dense, Exact, Ternary
from tasks.evaluate import leading
from tasks.extract import Extract
from tasks.fine_tune import fine_tune
from tasks.mergers import Average, Opcm, TaskArithmetic
from tasks.search import Search
from tasks.tensors import read_delta, read_tensor
from tests.flows.test_chain import Count, refs
from tests.flows.test_resume import journal, run

pytestmark = pytest.mark.usefixtures("prefect_server")

AGAINST_START = Extract(against="start")


@pytest.fixture(autouse=True)
def tracking(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> str:
    """One database for all tests here: to create one takes seconds. Keys of versions hold the store's address."""
    file = tmp_path_factory.getbasetemp() / "start-head.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    return f"sqlite:///{file}"


@pytest.fixture
def count() -> Count:
    watcher = Count()
    progress.watch(watcher)
    return watcher


def from_head(merger: Any = None, codec: AnyCodec | None = None, **changes: Any) -> ChainConfig:
    """Two tasks, the second of them LoRA, into one line; the second starts from the first one's merged model."""
    config = load_chain("smoke")
    line = LineConfig("in-turn", merger or Opcm())
    changed = replace(config, tasks=config.tasks[:2], lines=(line,), start="head", codec=codec or config.codec)
    return replace(changed, **changes)


def in_rounds(rounds: int = 3, **changes: Any) -> ChainConfig:
    """One task in rounds, each with a fresh adapter, all of which is merged: base + a1 + a2 + a3."""
    config = from_head(TaskArithmetic(scale=1.0), Dense(), extract=AGAINST_START)
    task = replace(config.tasks[1], rounds=rounds)
    return replace(config, tasks=(task,), **changes)


@pytest.mark.usefixtures("home")
def test_a_training_starts_from_the_merged_model_of_the_step_before(count: Count, tracking: str) -> None:
    config = from_head(codec=Dense())
    outcome = chain(config)
    assert len(count.labels) == count_steps(config)
    store, (first, second), line = here().store, outcome.prepared, outcome.lines[0]
    start = line.steps[0].model
    assert dict(store.open(first.tuned).manifest.lineage.inputs) == {"base": outcome.base}
    assert dict(store.open(second.tuned).manifest.lineage.inputs) == {"base": outcome.base, "start": start}
    tuner, task = config.tuner_of(second.task), second.task
    assert fine_tune(outcome.base, task.name, task.suite, tuner, store, start=start) == second.tuned
    assert fine_tune(outcome.base, task.name, task.suite, tuner, store) != second.tuned
    base, tuned, update = map(store.open, (outcome.base, second.tuned, second.update))
    for name in update.names:  # against the base: what was merged before is in it
        expected = read_tensor(tuned, name).float() - read_tensor(base, name).float()
        torch.testing.assert_close(read_delta(update, name), expected, rtol=0, atol=1e-6)
    assert "merged" not in tuned.manifest.facts
    assert not verify(store, store.refs()).findings

    client, versions = MlflowClient(tracking), [str(step.version.version) for step in line.steps]
    assert [client.get_model_version("in-turn", one).tags["start"] for one in versions] == [outcome.base, start]

    done = len(count.labels)
    again = chain(config)
    assert count.labels[done:] == []
    assert refs(again) == refs(outcome)


@pytest.mark.slow
@pytest.mark.usefixtures("home", "count")
def test_the_first_task_is_that_of_a_chain_that_starts_at_the_base() -> None:
    head = chain(from_head())
    base = chain(replace(from_head(), start="base", lines=(LineConfig("each", Opcm()),)))
    assert head.prepared[0] == base.prepared[0]
    assert head.lines[0].steps[0].model == base.lines[0].steps[0].model
    assert head.prepared[1].update != base.prepared[1].update


@pytest.mark.slow
@pytest.mark.usefixtures("home", "count")
def test_an_average_of_updates_against_the_base_is_that_of_the_models() -> None:
    outcome = chain(from_head(Average(), Dense()))
    store = here().store
    merged = store.open(outcome.lines[0].last.model)
    tuned = [store.open(one.tuned) for one in outcome.prepared]
    for name in merged.names:
        mean = sum(read_tensor(one, name) for one in tuned) / len(tuned)
        torch.testing.assert_close(read_tensor(merged, name), mean, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("home", "count")
@pytest.mark.parametrize(
    "codec",
    [
        Dense(),
        pytest.param(Exact(), marks=pytest.mark.slow),
        pytest.param(Ternary(density=0.2, alpha="grid"), marks=pytest.mark.slow),
    ],
    ids=["dense", "exact", "grid"],
)
def test_an_update_against_its_start_holds_what_was_learned_there(codec: AnyCodec) -> None:
    config = from_head(TaskArithmetic(scale=0.25), codec, extract=AGAINST_START)
    outcome = chain(config)
    store, second, line = here().store, outcome.prepared[1], outcome.lines[0]
    update = store.open(second.update)
    assert update.manifest.lineage.inputs["base"] == outcome.base
    assert update.manifest.lineage.inputs["start"] == line.steps[0].model
    if codec.name == "ternary":
        return
    start, tuned, after = map(store.open, (line.steps[0].model, second.tuned, line.last.model))
    for name in update.names:
        step = read_tensor(tuned, name) - read_tensor(start, name)
        torch.testing.assert_close(read_delta(update, name), step, rtol=0, atol=1e-6)
        moved = read_tensor(after, name) - read_tensor(start, name)
        torch.testing.assert_close(moved, 0.25 * step, rtol=0, atol=2e-6)
    if codec.name == "dense":
        ranks = [record.rank for record in update.manifest.tensors if record.role == "linear.weight" and record.rank]
        assert set(ranks) == {4}  # LoRA's factors, exactly


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_a_longer_chain_trains_only_what_is_new(count: Count) -> None:
    config = load_chain("smoke")
    shorter = chain(from_head())
    done = len(count.labels)
    longer = chain(from_head(tasks=config.tasks))
    assert {
        label.rsplit(" ", 1)[-1] for label in count.labels[done:] if "base" not in label and "alone" not in label
    } == {"permute"}
    assert refs(longer)[: len(refs(shorter))] == refs(shorter)
    start = here().store.open(longer.prepared[2].tuned).manifest.lineage.inputs["start"]
    assert start == shorter.lines[0].last.model


@pytest.mark.usefixtures("home")
def test_what_the_line_holds_otherwise_is_refused_before_it_is_trained(count: Count) -> None:
    chain(from_head())
    done = len(count.labels)
    other = from_head(tasks=load_chain("smoke").tasks[::-1])
    with pytest.raises(Conflict, match=r"already holds 'rot90' .* would merge 'permute' \(not yet trained\)"):
        chain(other)
    # the same tasks, each trained from the base
    with pytest.raises(Conflict, match=r"already holds 'invert'"):
        chain(from_head(start="base"))
    base_first = from_head(start="base", lines=(LineConfig("each", Opcm()),))
    chain(base_first)
    done = len(count.labels)
    with pytest.raises(
        Conflict, match=r"holds 'invert' as its step 2, trained from checkpoint/.*depends on all merges"
    ):
        chain(replace(base_first, start="head"))
    assert not [label for label in count.labels[done:] if "fine-tune" in label]


@pytest.mark.slow
@pytest.mark.usefixtures("home", "count")
def test_a_line_that_was_searched_gives_its_written_model() -> None:
    line = LineConfig("in-turn", Average(), search=Search(factors=(3.0,), samples=20))
    outcome = chain(from_head(lines=(line,)))
    assert outcome.lines[0].steps[0].entry.factor == 3.0
    store = here().store
    assert store.open(outcome.prepared[1].tuned).manifest.lineage.inputs["start"] == outcome.lines[0].steps[0].model


@pytest.mark.usefixtures("home")
def test_rounds_fold_an_adapter_into_the_line_and_start_afresh(count: Count, tmp_path: Path) -> None:
    config = in_rounds()
    outcome = chain(config)
    assert len(count.labels) == count_steps(config)
    store, line = here().store, outcome.lines[0]
    names = ["invert.1", "invert.2", "invert.3"]
    assert [step.entry.task for step in line.steps] == names
    assert [store.open(one.update).manifest.facts["task"] for one in outcome.prepared] == names
    seeds = [store.open(one.tuned).manifest.lineage.spec["tuner"]["seed"] for one in outcome.prepared]
    assert seeds == [0, 1, 2]
    starts = [store.open(one.tuned).manifest.lineage.inputs.get("start") for one in outcome.prepared]
    assert starts == [None, line.steps[0].model, line.steps[1].model]
    assert len({one.update for one in outcome.prepared}) == 3
    for step, one in zip(line.steps, outcome.prepared, strict=True):  # what is merged is what was tuned
        merged, tuned = store.open(step.model), store.open(one.tuned)
        for name in merged.names:
            torch.testing.assert_close(read_tensor(merged, name), read_tensor(tuned, name), rtol=0, atol=1e-6)
    assert line.last.summary.forgetting is None  # one task, whose rounds are not each other's past
    assert {row["task"] for row in accuracy_rows(outcome)} == {"invert"}
    assert len(accuracy_table(outcome, line).columns) == 3 + 3
    assert draw(outcome, tmp_path / "picture.png").stat().st_size > 0
    done = len(count.labels)
    longer = chain(in_rounds(4))  # has other names for nothing that is there
    assert refs(longer)[: len(refs(outcome))] == refs(outcome)
    assert sum("fine-tune" in label for label in count.labels[done:]) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("home", "count")
def test_rounds_of_several_tasks_are_summarised_by_task() -> None:
    config = in_rounds(2)
    both = replace(config, tasks=(replace(load_chain("smoke").tasks[0], rounds=2), config.tasks[0]))
    outcome = chain(both)
    line = outcome.lines[0]
    assert [step.entry.task for step in line.steps] == ["rot90.1", "rot90.2", "invert.1", "invert.2"]
    scores = [leading(here().store.open(step.scores)) for step in line.steps]
    assert [list(one) for one in scores] == [["rot90"], ["rot90"], ["rot90", "invert"], ["rot90", "invert"]]
    assert line.last.summary.backward_transfer == pytest.approx(scores[3]["rot90"] - scores[1]["rot90"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: from_head(lines=load_chain("smoke").lines), "merged model of one line, found 2 lines"),
        (lambda: from_head(start="base", extract=AGAINST_START), "against: start needs start: head"),
        (lambda: in_rounds(start="base", extract=Extract()), r"rounds: 3 of task 'invert' needs start: head"),
        (lambda: in_rounds(extract=Extract()), r"found start: head and extract.against: base"),
        (lambda: in_rounds(0), "rounds must be positive, found 0"),
    ],
)
def test_what_does_not_go_together_is_refused(make: Callable[[], ChainConfig], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        make()


@pytest.mark.slow
@pytest.mark.usefixtures("home")
def test_killed_rounds_go_on_where_they_stopped(tmp_path: Path) -> None:
    """In the middle of a round's training, between folding and the commit's model, and in the next training."""
    config = in_rounds()
    slow = replace(config.tasks[0].tuner, steps=40, save_every=2)  # type: ignore[type-var]
    config = replace(config, tasks=(replace(config.tasks[0], tuner=slow),))
    file = tmp_path / "rounds.yaml"
    file.write_text(yaml.safe_dump(dump_chain(config)))
    chain(config)
    expected, killed = here().store, tmp_path / "killed"
    store = ArtifactStore(DirectoryObjects(killed / "store"))

    def training_after(merges: int) -> bool:
        objects = store.objects
        return bool(list(objects.list("training/"))) and len(list(objects.list("state/"))) >= merges

    run(killed, lambda: training_after(0), str(file))
    run(killed, lambda: training_after(1), str(file))
    run(killed, lambda: len(list(store.objects.list("line/in-turn/"))) >= 3, str(file))
    run(killed, lambda: training_after(2), str(file))
    run(killed, config=str(file))
    assert journal(store) == journal(expected)
    assert set(store.refs()) == set(expected.refs())
    assert not list(store.objects.list("training/"))
    assert "nothing to do" in run(killed, config=str(file))
