"""A chain whose lines have gates: who becomes champion, what stays out, and changes by hand that stay."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from configs.chain import Ability, ChainConfig, Task, load_chain, parse_chain
from flows import progress
from flows.chain import chain, count_steps
from flows.growing import Grown
from flows.picture import draw
from flows.report import accuracy_table, comparison_table, gate_lines
from flows.workplace import here
from storage.artifacts import Artifact
from storage.champions import CHALLENGER, CHAMPION, PREVIOUS
from storage.errors import InvalidInput, Missing
from storage.lines import Line
from storage.refs import CheckpointRef
from storage.registry_lines import LineVersions
from tasks.checkpoints import load_model
from tasks.codecs import Dense
from tasks.data import Digits
from tasks.evaluate import NamedSuite, evaluate, leading
from tasks.gate import Gate, OnFailure
from tasks.lineage.trajectory import trajectory
from tasks.lineage.versions import version_lineage
from tasks.mergers import Average
from tasks.suites import ImageClassification
from tasks.suites.heads import ClassMeans
from tests.flows.test_chain import Count, printed

pytestmark = pytest.mark.usefixtures("prefect_server", "home")


@pytest.fixture(autouse=True)
def count() -> Count:
    watcher = Count()
    progress.watch(watcher)
    return watcher


def gated(
    of_alone: float | None,
    on_failure: OnFailure = "keep",
    retained: float | None = None,
    abilities: tuple[Ability, ...] = (),
) -> ChainConfig:
    """Three tasks whose average is far below each of them alone."""
    config = load_chain("smoke")
    tuner = replace(config.tuner, steps=40, weights="all")  # type: ignore[call-arg]
    tasks = tuple(replace(task, tuner=tuner) for task in config.tasks)
    rules = {"of_alone": of_alone, "retained": retained}
    gate = Gate(average_drop=None, significance=None, on_failure=on_failure, **rules)
    line = replace(config.lines[1], merger=Average(), gate=gate)
    return replace(config, name="gated", tasks=tasks, lines=(line,), codec=Dense(), retained=abilities)


def aliases(name: str) -> dict[str, int | None]:
    with here().registry.champions(name) as champions:
        return {alias: champions.version(alias) for alias in ("head", CHAMPION, PREVIOUS, CHALLENGER)}


def measured(task: NamedSuite, model: Artifact, base: Artifact) -> float:
    """The leading score, asked of the suite itself."""
    return task.suite.open(base).score(load_model(model), "cpu", lambda done, total: None)[0].value


def only(config: ChainConfig) -> Grown:
    (line,) = chain(config).lines
    return line


def test_a_merge_that_fails_stays_in_the_line_but_is_not_served(count: Count) -> None:
    config = gated(of_alone=0.95)
    line = only(config)
    assert [step.verdict.passed for step in line.steps if step.verdict] == [True, False, False]
    assert aliases(line.name) == {"head": 3, CHAMPION: 1, PREVIOUS: None, CHALLENGER: 3}
    reasons = line.steps[1].verdict.reasons  # type: ignore[union-attr]
    scores = leading(here().store.open(line.steps[1].scores))
    assert all(re.match(rf"'\w+' reaches {100 * scores[reason.split(chr(39))[1]]:.1f} %", reason) for reason in reasons)
    version = here().registry._client.get_model_version(line.name, "2")
    assert version.tags["gate"] == "failed"
    assert version.tags["gate.reasons"] == "; ".join(reasons)
    assert reasons[0] in version.description
    old, first = leading(here().store.open(line.steps[0].scores)), line.steps[0].entry.task
    points = f"{100 * (scores[first] - old[first]):+.1f}".replace("-", "\u2212")
    assert f"Since version 1, with {line.steps[1].entry.task}: {first} {points}, in points." in version.description
    assert f"`deltaworks line rollback {line.name} 2 --why ...`" in version.description
    before = len(count.labels)
    again = only(config)
    assert len(count.labels) == before, "everything is found done"
    assert [step.version.version for step in again.steps] == [1, 2, 3]


def test_a_change_by_hand_is_recorded_and_stays() -> None:
    config = gated(of_alone=0.95)
    name = only(config).name
    with here().registry.champions(name) as champions:
        champions.promote(3, "rot180 does not matter")
    assert aliases(name) == {"head": 3, CHAMPION: 3, PREVIOUS: 1, CHALLENGER: 3}
    only(config)
    assert aliases(name)[CHAMPION] == 3
    with here().registry.champions(name) as champions:
        assert champions.rollback("it does") == 1
        assert [(one.version, one.before, one.action, one.why) for one in champions.history()] == [
            (1, None, "gate", "passed"),
            (3, 1, "promote", "rot180 does not matter"),
            (1, 3, "rollback", "it does"),
        ]
        with pytest.raises(Missing, match="has no version 9"):
            champions.promote(9, "")
    assert aliases(name) == {"head": 3, CHAMPION: 1, PREVIOUS: 3, CHALLENGER: 3}
    with pytest.raises(Missing, match="no registered model 'other'"), here().registry.champions("other"):
        pass


def test_a_merge_that_fails_is_left_out_until_the_gate_changes(count: Count, tmp_path: Path) -> None:
    config = gated(of_alone=0.95, on_failure="leave_out")
    outcome = chain(config)
    (line,) = outcome.lines
    assert draw(outcome, tmp_path / "picture.png").stat().st_size > 10_000
    assert [text.split(":")[0] for text in gate_lines(line)] == [
        f"{line.name} version {number}, + {task}" for number, task in enumerate(("rot90", "invert", "permute"), 1)
    ]
    assert "+rot90" in [column.header for column in accuracy_table(outcome, line).columns]
    assert [step.entry.task for step in line.steps] == ["rot90"]
    assert [step.entry.task for step in line.left_out] == ["invert", "permute"]
    journal = Line(here().store.objects, line.name)
    assert [entry.task for entry in journal.history()] == ["rot90"]
    assert aliases(line.name) == {"head": 1, CHAMPION: 1, PREVIOUS: None, CHALLENGER: 3}
    before = len(count.labels)
    again = only(config)
    assert len(count.labels) == before
    assert [step.version.version for step in again.left_out] == [2, 3]
    loose = only(gated(of_alone=None, on_failure="leave_out"))
    assert [step.entry.task for step in loose.steps] == ["rot90", "invert", "permute"]
    assert not loose.left_out
    assert aliases(line.name)[CHAMPION] == aliases(line.name)["head"] == loose.last.version.version


@pytest.mark.slow
def test_a_chain_stops_where_a_merge_fails() -> None:
    with pytest.raises(InvalidInput, match="stops the chain at 'invert': 'rot90' reaches") as caught:
        chain(gated(of_alone=0.95, on_failure="stop"))
    assert "look at version 2" in str(caught.value)
    assert [entry.task for entry in Line(here().store.objects, "smoke-average").history()] == ["rot90"]
    assert only(gated(of_alone=None, on_failure="stop")).last.version.version == 4


@pytest.mark.slow
def test_the_champion_is_measured_on_the_newest_task_too(count: Count) -> None:
    config = gated(of_alone=None)
    gate = Gate(average_drop=0.0, significance=0.05)
    line = only(replace(config, lines=(replace(config.lines[0], gate=gate),)))
    passed = [step.verdict is not None and step.verdict.passed for step in line.steps]
    assert sum("evaluate ahead of" in label for label in count.labels) == 2
    # a champion that is the model of the step before was asked then
    assert sum("evaluate the champion on" in label for label in count.labels) == passed[1:-1].count(False)
    assert not count.reused_labels
    store, champion = here().store, line.steps[0]
    for number, step in enumerate(line.steps[1:], 2):
        assert step.verdict is not None
        known = leading(store.open(evaluate(champion.model, config.tasks[:number], store, base=step.entry.base)))
        facts = step.verdict.facts
        assert facts["champion_average"] == pytest.approx(sum(known.values()) / number)
        assert facts["average"] == pytest.approx(step.summary.average)
        assert step.verdict.passed is (facts["average"] >= facts["champion_average"] and facts["p_worse"] >= 0.05)
        champion = step if step.verdict.passed else champion


def test_what_is_left_of_the_base_is_told_and_asked() -> None:
    suite = ImageClassification(Digits(limit=200), ClassMeans())
    config = gated(of_alone=None, retained=1.0, abilities=(Ability("upright", suite),))
    outcome = chain(config)
    (line,) = outcome.lines
    store, base = here().store, outcome.base

    def left(model: CheckpointRef) -> float:
        return measured(config.retained[0], store.open(model), store.open(base))

    for step in line.steps:
        summary = step.summary
        assert step.verdict is not None and summary.retained is not None
        assert summary.retained > 0
        assert step.verdict.passed is (summary.retained >= 1)
        assert summary.held_out == pytest.approx(left(step.model))
        assert summary.retained == pytest.approx(left(step.model) / left(base))
        assert summary.tradeoff == pytest.approx((summary.average * left(step.model)) ** 0.5)
    run = here().registry._client.get_run(line.last.version.run_id)
    for name in ("retained", "held_out", "tradeoff", "forward_transfer"):
        assert run.data.metrics[name] == pytest.approx(getattr(line.last.summary, name))
    versions = LineVersions(here().registry, line.name)
    found = version_lineage(versions.one("head"), versions.all(), [step.entry for step in line.steps], store)
    assert [one.tradeoff for one in trajectory(found)][1:] == pytest.approx(
        [one.summary.tradeoff for one in line.steps]
    )
    figures = found.of_kind("model")[-1].figures
    assert figures["forward transfer"] == pytest.approx(line.last.summary.forward_transfer)
    shown = [row.split() for row in printed(accuracy_table(outcome, line)).splitlines()]
    assert ["trade-off", *(f"{100 * (step.summary.tradeoff or 0):.1f}" for step in line.steps)] in shown
    assert "trade-off" in printed(comparison_table(outcome))


def test_forward_transfer_is_that_of_separate_evaluations(count: Count) -> None:
    config = gated(of_alone=None)
    config = replace(config, lines=(replace(config.lines[0], gate=None),))
    outcome = chain(config)
    assert len(count.labels) == count_steps(config)
    (line,) = outcome.lines
    store, base = here().store, outcome.base

    def reached(model: CheckpointRef, task: Task) -> float:
        return measured(task, store.open(model), store.open(base))

    gains = [
        reached(before.model, task) - reached(base, task)
        for before, task in zip(line.steps, config.tasks[1:], strict=False)
    ]
    assert any(gains), "or the test says nothing"
    found = [step.summary.forward_transfer for step in line.steps]
    assert found[0] is None
    assert found[1:] == pytest.approx([gains[0], sum(gains) / 2])


@pytest.mark.slow
def test_a_merge_that_is_left_out_does_not_count_ahead() -> None:
    """The second is left out: of the third, what counts is the model after the first."""
    config = gated(None, "leave_out")
    harmful = replace(config.tasks[1], tuner=replace(config.tasks[0].tuner, learning_rate=1.0))  # type: ignore[type-var]
    gate = Gate(average_drop=0.2, significance=None, on_failure="leave_out")
    tasks = (config.tasks[0], harmful, config.tasks[2])
    outcome = chain(replace(config, tasks=tasks, lines=(replace(config.lines[0], gate=gate),)))
    (line,) = outcome.lines
    assert [step.entry.task for step in line.steps] == ["rot90", "permute"]
    store, base = here().store, outcome.base
    one, other = (measured(tasks[2], store.open(model), store.open(base)) for model in (line.steps[0].model, base))
    assert line.last.summary.forward_transfer == pytest.approx(one - other)


@pytest.mark.slow
def test_all_steps_of_a_first_run_are_counted(count: Count) -> None:
    suite = ImageClassification(Digits(limit=50), ClassMeans())
    config = gated(of_alone=None, abilities=(Ability("upright", suite),))
    chain(config)
    assert len(count.labels) == count_steps(config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gate": {"name": "gate", "of_alone": 2}}, "of_alone must be null or in"),
        ({"gate": {"name": "gate", "average": 2}}, "there is no such field"),
        ({"gate": {"name": "gate", "retry": [0.5, 0]}}, "retry must be factors, finite and positive"),
        ({"gate": {"name": "gate", "retained": 0.9}}, "`retained` names none"),
        ({"gate": {"name": "gate", "on_failure": "ignore"}}, "is not one of 'keep', 'leave_out' or 'stop'"),
    ],
)
def test_wrong_gates_are_refused(change: dict[str, object], words: str) -> None:
    data = {"name": "digits", "view": "id"}
    suite = {"name": "image_classification", "data": data, "head": {"name": "orthonormal"}}
    line = {"name": "line", "merger": {"name": "average"}, **change}
    values = {"name": "x", "base": {"name": "digits_base"}, "tasks": [{"name": "a", "suite": suite}], "lines": [line]}
    with pytest.raises(InvalidInput, match=re.escape(words)):
        parse_chain(values)


def test_a_merge_that_fails_is_written_smaller_where_the_gate_lists_factors(count: Count) -> None:
    suite = ImageClassification(Digits(limit=50), ClassMeans())
    config = gated(None, "leave_out", retained=0.9, abilities=(Ability("upright", suite),))
    harmful = replace(config.tasks[0], tuner=replace(config.tasks[0].tuner, learning_rate=0.1))  # type: ignore[type-var]
    gate = replace(config.lines[0].gate, retry=(0.9, 1e-4))  # type: ignore[type-var]
    config = replace(config, tasks=(harmful,), lines=(replace(config.lines[0], gate=gate),))
    line = only(config)
    (step,) = line.steps
    assert (step.entry.factor, step.version.version) == (1e-4, 1)
    assert step.verdict is not None and step.verdict.passed
    assert step.summary.retained is not None and step.summary.retained >= 0.9
    version = here().registry._client.get_model_version(line.name, "1")
    assert (version.tags["factor"], version.tags["gate"]) == ("0.0001", "passed")
    assert "smoke-average: evaluate rot90 at 0.9" in count.labels
    before = len(count.labels)
    assert only(config).steps[0].entry == step.entry
    assert len(count.labels) == before, "everything is found done"


def test_a_gate_that_lets_nobody_in_says_so() -> None:
    suite = ImageClassification(Digits(limit=50), ClassMeans())
    config = gated(None, "leave_out", retained=1.0, abilities=(Ability("upright", suite),))
    lost = replace(config.tasks[0], tuner=replace(config.tasks[0].tuner, learning_rate=1.0))  # type: ignore[type-var]
    with pytest.raises(
        InvalidInput, match=r"left out every update: .* of the base's ability is left, asked is 100.0 %"
    ):
        chain(replace(config, tasks=(lost,)))
    assert not Line(here().store.objects, "smoke-average").history()
