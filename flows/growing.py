"""Growing: one line of a chain, update by update: merge, commit, write, evaluate, register."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from configs.chain import ChainConfig, LineConfig, Task
from flows import steps
from flows.continuation import Wanted, check_continuation, check_start
from flows.policy import run_now
from flows.workplace import here
from storage.lines import Entry, Fold, Line
from storage.refs import CheckpointRef, ScoresRef, StateRef, UpdateRef
from storage.registry import ModelVersion
from tasks.evaluate import Summary, leading, summarise


@dataclass(frozen=True)
class Prepared:
    """One update's way to the lines: the tuned model, its scores alone, and the update to merge.

    `name`: the task's, with the number of the round if it has several.
    """

    task: Task
    name: str
    tuned: CheckpointRef
    alone: ScoresRef
    update: UpdateRef

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.name, self.update, self.task.weight)


@dataclass(frozen=True)
class Step:
    """One merge of a line."""

    entry: Entry
    model: CheckpointRef
    scores: ScoresRef
    summary: Summary
    version: ModelVersion


@dataclass(frozen=True)
class Grown:
    """A line after the chain. `beyond`: updates that it holds after those of the chain."""

    name: str
    steps: list[Step] = field(default_factory=list)
    beyond: tuple[str, ...] = ()

    @property
    def last(self) -> Step:
        return self.steps[-1]


class Growing:
    """A line that a chain opens, or goes on with where an earlier run stopped."""

    def __init__(self, config: ChainConfig, line: LineConfig, base: CheckpointRef) -> None:
        self._experiment, self._line, self._base = config.name, line, base
        self._count = sum(len(task.updates) for task in config.tasks)
        self._head: Entry | None = None
        self._entries: list[Entry] = []
        self._prepared: list[Prepared] = []
        self._alone: dict[str, float] = {}
        self._matrix: list[dict[str, float]] = []
        self.grown = Grown(line.name)
        if line.name in Line.names(here().store.objects):  # a new one is not opened before there is an update for it
            self._open()

    def _open(self) -> Entry:
        journal = Line(here().store.objects, self._line.name)
        journal.open(self._base, self._line.recipe.spec())
        # read before the history: a merge that comes in between makes the commit fail, not vanish
        self._head = journal.head()
        self._entries = journal.history()
        beyond = self._entries[self._count :]
        self.grown = Grown(self._line.name, self.grown.steps, tuple(entry.task for entry in beyond))
        return self._head

    @property
    def model(self) -> CheckpointRef:
        """The merged model of the newest step, as it is written."""
        return self.grown.last.model

    def check(self, wanted: Sequence[Wanted]) -> None:
        """Refuse to merge these if the line holds another history."""
        if self._head is not None:
            check_continuation(self.grown.name, self._head, self._entries, wanted)

    def check_next(self, task: Task, name: str, config: ChainConfig) -> None:
        """Refuse, before it is trained, an update that cannot be the one that the line holds in its place."""
        done = len(self._prepared)
        later = [Wanted(one, None, each.weight) for each in config.tasks for one in each.updates][done:]
        self.check([*(one.wanted for one in self._prepared), *later])
        if done < len(self._entries) and not task.checkpoint:
            start = self.model if done else self._base
            check_start(self.grown.name, self._entries[done], start, here().store)

    def add(self, one: Prepared) -> None:
        """Merge an update, unless the line has it, and evaluate and register what came of it."""
        number, line, name = len(self._prepared), self._line, one.name
        self._prepared.append(one)
        head = self._head or self._open()
        self.check([each.wanted for each in self._prepared])
        self._alone[one.task.name] = leading(here().store.open(one.alone))[one.task.name]
        held = self._entries[number - 1].state if number else None
        weight = one.task.weight
        state = run_now(steps.fold, f"{line.name}: merge {name}", self._base, held, one.update, line.recipe, weight)
        if number == len(self._entries):
            # before the commit: a merge that was interrupted in its search is then done again, factor and all
            factor = self._factor(state)
            folded = Fold(name, one.update, state, weight, factor)
            self._head = run_now(steps.commit, f"{line.name}: commit {name}", line.name, head, folded)
            self._entries.append(self._head)
        factor = self._entries[number].factor  # the journal's, also where the search would choose another one by now
        written = (self._base, state) if factor == 1 else (self._base, state, factor)
        model = run_now(steps.materialize, f"{line.name}: write {name}", *written)
        scores = run_now(steps.evaluate, f"{line.name}: evaluate {name}", model, self._seen, self._base)
        self._matrix.append(leading(here().store.open(scores)))
        summary = summarise(self._matrix, self._alone)
        so_far = self._entries[: number + 1]
        if number + 1 == self._count == len(self._entries):
            # a head that went back to an older state is a new version all the same, so that the alias can follow it
            so_far[-1] = replace(so_far[-1], number=(self._head or head).number)
        label = f"{line.name}: register {name}"
        version = run_now(steps.register, label, self._experiment, line.name, so_far, model, scores, summary)
        self.grown.steps.append(Step(self._entries[number], model, scores, summary, version))

    @property
    def _seen(self) -> list[Task]:
        """The tasks of the updates so far, each once."""
        return list({one.task.name: one.task for one in self._prepared}.values())

    def _factor(self, state: StateRef) -> float:
        """How much of the merged delta to write, if the line searches for it."""
        if self._line.search is None:
            return 1.0
        label = f"{self._line.name}: search {self._prepared[-1].name}"
        scores = run_now(steps.search, label, self._base, state, self._seen, self._line.search)
        return float(here().store.open(scores).manifest.facts["factor"])
