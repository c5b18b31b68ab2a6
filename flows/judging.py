"""Judging: what the merges of a chain's line reach, one after the other, and what the line's gate says of that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from configs.chain import ChainConfig, LineConfig, Task
from flows import steps
from flows.policy import run_now
from flows.workplace import here
from storage.lines import Entry
from storage.refs import CheckpointRef, ScoresRef, StateRef
from tasks.evaluate import Summary, leading, outcomes_of, retention, summarise, with_abilities
from tasks.gate import Standing, Verdict, judge


@dataclass(frozen=True)
class Tried:
    """A merge as it would enter the journal: what it reaches, and what the gate says of that."""

    entry: Entry
    model: CheckpointRef
    scores: ScoresRef
    standing: Standing
    summary: Summary
    verdict: Verdict | None


@dataclass(frozen=True)
class Ground:
    """The base of a chain and what it reaches: on the chain's tasks, and on its abilities, if the chain names any."""

    base: CheckpointRef
    scores: ScoresRef
    able: ScoresRef | None


class Judging:
    """Asks the merges of one line of a chain."""

    def __init__(self, config: ChainConfig, line: LineConfig, ground: Ground) -> None:
        self._line, self._base, self._abilities = line, ground.base, list(config.retained)
        self._able = {} if ground.able is None else {ground.base: ground.able}  # models on the base's abilities
        self._unmet = leading(here().store.open(ground.scores))
        self._ahead: dict[str, float] = {}  # task -> what the model reached on it right before it was merged
        self._alone: dict[str, float] = {}
        self._matrix: list[dict[str, float]] = []
        self._champion: tuple[CheckpointRef, Standing] | None = None

    def alone(self, task: str, scores: ScoresRef) -> None:
        """Take note of what the task's own model reaches; of several rounds, the newest counts."""
        self._alone[task] = leading(here().store.open(scores))[task]

    def able(self, model: CheckpointRef) -> tuple[ScoresRef, ...]:
        """Scores of the base and of a model that was asked on what the base can do, if the chain names anything."""
        return tuple(self._able[one] for one in (self._base, model)) if self._able else ()

    def look_ahead(self, name: str, task: Task, model: CheckpointRef) -> ScoresRef:
        """Evaluate the line's model on a task that it has not met: what forward transfer is made of."""
        label = f"{self._line.name}: evaluate ahead of {name}"
        scores: ScoresRef = run_now(steps.evaluate, label, model, [task], self._base)
        found = here().store.open(scores)
        self._ahead |= leading(found)
        if self._champion is not None and self._champion[0] == model:  # so that the gate need not ask again
            self._champion = (model, self._champion[1].joined(Standing(leading(found), outcomes_of(found))))
        return scores

    def ask(self, name: str, entry: Entry, seen: list[Task]) -> Tried:
        """Write the state of an entry as a model, evaluate it on the tasks that are merged in it, and judge it."""
        line = self._line.name
        inputs: tuple[Any, ...] = (self._base, entry.state)
        written = inputs if entry.factor == 1 else (*inputs, entry.factor)
        model = run_now(steps.materialize, f"{line}: write {name}", *written)
        scores = run_now(steps.evaluate, f"{line}: evaluate {name}", model, seen, self._base)
        standing = self._standing(name, model, scores)
        summary = summarise([*self._matrix, standing.scores], self._alone, self._ahead, self._unmet)
        summary = with_abilities(summary, standing.abilities, self._left(self._base))
        return Tried(entry, model, scores, standing, summary, self._judge(name, seen, standing))

    def accept(self, tried: Tried) -> None:
        """The merge is in the line: what comes after is compared with it."""
        self._matrix.append(dict(tried.standing.scores))
        if tried.verdict and tried.verdict.passed:
            self._champion = (tried.model, tried.standing)

    def factor(self, name: str, state: StateRef, seen: list[Task]) -> float:
        """How much of the merged delta to write, if the line searches for it."""
        if self._line.search is None:
            return 1.0
        label = f"{self._line.name}: search {name}"
        scores = run_now(steps.search, label, self._base, state, seen, self._line.search)
        return float(here().store.open(scores).manifest.facts["factor"])

    def _standing(self, name: str, model: CheckpointRef, scores: ScoresRef) -> Standing:
        found = here().store.open(scores)
        if not self._able:
            return Standing(leading(found), outcomes_of(found))
        label = f"{self._line.name}: evaluate abilities after {name}"
        self._able[model] = run_now(steps.evaluate, label, model, self._abilities, self._base)
        left = self._left(model)
        return Standing(leading(found), outcomes_of(found), retention(left, self._left(self._base)), left)

    def _left(self, model: CheckpointRef) -> dict[str, float]:
        """What a model reaches on what the base can do."""
        return leading(here().store.open(self._able[model])) if self._able else {}

    def _judge(self, name: str, seen: list[Task], standing: Standing) -> Verdict | None:
        """What the gate says, after the champion was measured on tasks that it has not met yet."""
        if self._line.gate is None:
            return None
        champion = None
        if self._champion is not None:
            model, known = self._champion
            new = [task for task in seen if task.name not in known.scores]
            if new:
                label = f"{self._line.name}: evaluate the champion on {name}"
                found = here().store.open(run_now(steps.evaluate, label, model, new, self._base))
                known = known.joined(Standing(leading(found), outcomes_of(found)))
                self._champion = (model, known)
            champion = known
        return judge(self._line.gate, standing, champion, self._alone)
