"""Examining: what the exam of a line says of a merge. Every answer follows from the journals, so it may be asked again.

The champion is the newest merge of the queue that passed and is still in the line. As long as there is none, a merge
is held against what the line was without it: the model before it, or the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from configs.exam import Exam, exam_of
from flows import steps
from flows.policy import run_now
from flows.registering import kept
from flows.workplace import here
from storage.errors import InvalidInput, Unanswered
from storage.lines import Entry, Line
from storage.queue import Queue
from storage.refs import CheckpointRef, ScoresRef
from storage.registry import ModelVersion
from tasks.evaluate import Summary, leading, outcomes_of, retention, with_abilities
from tasks.gate import Standing, Verdict, judge
from tasks.retry import OtherRecipe

PASSED, FAILED = "passed", "failed"  # what a queue notes of a merge that was judged


@dataclass(frozen=True)
class Examined:
    """What a merge came to. `verdict` is None without a gate. `able`: scores of the base and of the model on what the
    base can do, if the exam asks for that; `measured`: of the base on the exam, if the merge was held against it."""

    model: CheckpointRef
    scores: ScoresRef
    summary: Summary
    verdict: Verdict | None
    able: tuple[ScoresRef, ...] = ()
    measured: tuple[ScoresRef, ...] = ()

    @property
    def noted(self) -> tuple[str, str]:
        """The kind and the reason under which a queue keeps it."""
        if self.verdict is None:
            return "", ""
        return (PASSED, "") if self.verdict.passed else (FAILED, "; ".join(self.verdict.reasons))


class Examiner:
    """Asks the merges of one line."""

    def __init__(self, exam: Exam, queue: Queue, journal: Line) -> None:
        self._exam, self._queue, self._journal, self.line = exam, queue, journal, journal.name
        self._able: dict[CheckpointRef, ScoresRef] = {}  # models on what the base can do

    def examine(self, before: Sequence[Entry], merged: Entry) -> Examined:
        """`before`: the steps that `merged` came after, oldest first. Unanswered if the suites cannot be asked."""
        try:
            return self._examine(before, merged)
        except InvalidInput as error:
            raise Unanswered(
                f"the exam of line {self.line!r} cannot be held on {merged.task!r}: {error}",
                remedy=f"Its data must be there for the worker; `deltaworks line policy {self.line} --exam FILE` "
                "sets another one",
            ) from error

    @property
    def retry(self) -> tuple[float | OtherRecipe, ...]:
        """What is tried where the gate refuses a merge."""
        return self._exam.gate.retry if self._exam.gate else ()

    def lets_in(self, found: Examined) -> bool:
        gate = self._exam.gate
        return gate is None or gate.on_failure != "leave_out" or found.verdict is None or found.verdict.passed

    def register_left_out(self, before: Sequence[Entry], merged: Entry, found: Examined) -> ModelVersion:
        """A version with the reasons, for people to look at; it is no part of the line."""
        return register_examined(self.line, [*before, merged], found, left_out=True)

    def _examine(self, before: Sequence[Entry], merged: Entry) -> Examined:
        model = written(self.line, merged)
        scores, standing = self._standing(merged.task, model, merged.base)
        values = list(standing.scores.values())
        summary = Summary(fmean(values), min(values), None, None, None)
        able = tuple(self._able[one] for one in (merged.base, model)) if self._exam.retained else ()
        summary = with_abilities(summary, standing.abilities, self._left("the base", merged.base, merged.base))
        found = Examined(model, scores, summary, None, able)
        if self._exam.gate is None:
            return found
        against = self._against(before)
        if against is None:
            at_base, champion = self._standing("the base", merged.base, merged.base)
            return replace(found, verdict=judge(self._exam.gate, standing, champion, {}), measured=(at_base,))
        return replace(found, verdict=judge(self._exam.gate, standing, self._champion(against, merged.base), {}))

    def _against(self, before: Sequence[Entry]) -> Entry | None:
        """The merge whose model the next one is held against; None for the base."""
        passed = {one.entry for one in self._queue.submissions() if one.state == "merged" and one.kind == PASSED}
        champion = next((one for one in reversed(before) if one.number in passed and self._is_entry(one)), None)
        return champion or (before[-1] if before else None)

    def _champion(self, against: Entry, base: CheckpointRef) -> Standing | None:
        """What its model reaches; None if its state was removed from the store."""
        if against.state is None or not here().store.has(against.state):
            return None
        return self._standing(f"{against.task}, the champion", written(self.line, against), base)[1]

    def _is_entry(self, step: Entry) -> bool:
        """Whether it is an entry of the journal, and not one of those that a rebuild merged again."""
        return step == self._journal.entry(step.number)

    def _standing(self, name: str, model: CheckpointRef, base: CheckpointRef) -> tuple[ScoresRef, Standing]:
        scores = run_now(steps.evaluate, f"{self.line}: evaluate {name}", model, list(self._exam.suites), base)
        found = here().store.open(scores)
        left, before = self._left(name, model, base), self._left("the base", base, base)
        return scores, Standing(leading(found), outcomes_of(found), retention(left, before), left)

    def _left(self, name: str, model: CheckpointRef, base: CheckpointRef) -> dict[str, float]:
        """What a model reaches on what the base can do, if that is asked."""
        if not self._exam.retained:
            return {}
        if model not in self._able:
            label = f"{self.line}: evaluate abilities of {name}"
            self._able[model] = run_now(steps.evaluate, label, model, list(self._exam.retained), base)
        return leading(here().store.open(self._able[model]))


def examiner_of(queue: Queue, journal: Line) -> Examiner | None:
    """The examiner of a line, if its policy has an exam."""
    exam = exam_of(queue.policy(), journal.name)
    return None if exam is None else Examiner(exam, queue, journal)


def written(line: str, entry: Entry) -> CheckpointRef:
    """The model of an entry, written unless it is there."""
    inputs: tuple[Any, ...] = (
        (entry.base, entry.state) if entry.factor == 1 else (entry.base, entry.state, entry.factor)
    )
    model: CheckpointRef = run_now(steps.materialize, f"{line}: write {entry.task}", *inputs)
    return model


def register_examined(
    line: str, entries: Sequence[Entry], found: Examined | None, *, left_out: bool = False
) -> ModelVersion:
    """The version of the last of `entries`, with what its exam said, if it had one."""
    last = entries[-1]
    if found is None:
        inputs: tuple[Any, ...] = (written(line, last),)
    else:
        inputs = (found.model, found.scores, found.summary, found.verdict, left_out, found.measured, found.able)
    label = f"{line}: register {last.task}"
    with kept(line, repr(last.task)):
        version: ModelVersion = run_now(steps.register, label, line, line, list(entries), *inputs)
    return version
