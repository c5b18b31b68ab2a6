"""Growing: one line of a chain, update by update: merge, write, evaluate, judge, commit, register."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from configs.chain import ChainConfig, LineConfig, Task
from flows import steps
from flows.continuation import Wanted, check_continuation, check_start
from flows.policy import run_now
from flows.registering import kept
from flows.workplace import here
from storage.errors import InvalidInput
from storage.lines import Entry, Fold, Line, after_fold
from storage.refs import CheckpointRef, ScoresRef, StateRef, UpdateRef
from storage.registry import ModelVersion
from tasks.evaluate import Summary, leading, outcomes_of, retention, summarise, with_abilities
from tasks.gate import Standing, Verdict, judge


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
    """One merge of a line. `verdict`: what the line's gate said of it, if it has one."""

    entry: Entry
    model: CheckpointRef
    scores: ScoresRef
    summary: Summary
    version: ModelVersion
    verdict: Verdict | None = None


@dataclass(frozen=True)
class _Tried:
    """A merge written by a factor: what it reaches, and what the gate says of that."""

    factor: float
    model: CheckpointRef
    scores: ScoresRef
    standing: Standing
    summary: Summary
    verdict: Verdict | None


@dataclass(frozen=True)
class Grown:
    """A line after the chain. `beyond`: updates that it holds after those of the chain; `left_out`: merges that its
    gate did not let in."""

    name: str
    steps: list[Step] = field(default_factory=list)
    beyond: tuple[str, ...] = ()
    left_out: list[Step] = field(default_factory=list)

    @property
    def last(self) -> Step:
        return self.steps[-1]


class Growing:
    """A line that a chain opens, or goes on with where an earlier run stopped.

    `base_scores`: of the base on the chain's tasks; `able`: of the base on its abilities, if the chain names any."""

    def __init__(
        self,
        config: ChainConfig,
        line: LineConfig,
        base: CheckpointRef,
        able: ScoresRef | None,
        base_scores: ScoresRef,
    ) -> None:
        self._experiment, self._line, self._base, self._base_scores = config.name, line, base, base_scores
        self._abilities, self._able_scores = list(config.retained), able
        self._able = leading(here().store.open(able)) if able else {}
        self._unmet = leading(here().store.open(base_scores))
        self._ahead: dict[str, float] = {}  # task -> what the model reached on it right before it was merged
        self._after: dict[CheckpointRef, ScoresRef] = {}  # models on the base's abilities
        self._count = sum(len(task.updates) for task in config.tasks)
        self._leaves_out = line.gate is not None and line.gate.on_failure == "leave_out"
        self._head: Entry | None = None
        self._entries: list[Entry] = []
        self._merged: list[Prepared] = []
        self._alone: dict[str, float] = {}
        self._matrix: list[dict[str, float]] = []
        self._champion: tuple[CheckpointRef, Standing] | None = None
        self.grown = Grown(line.name)
        if line.name in Line.names(here().store.objects):  # a new one is not opened before there is an update for it
            self._open()

    def _open(self) -> Entry:
        journal = Line(here().store.objects, self._line.name)
        journal.open(self._base, self._line.recipe.spec())
        # read before the history: a merge that comes in between makes the commit fail, not vanish
        self._head = journal.head()
        self._entries = journal.history()
        if not self._leaves_out:
            beyond = self._entries[self._count :]
            self.grown = replace(self.grown, beyond=tuple(entry.task for entry in beyond))
        return self._head

    @property
    def model(self) -> CheckpointRef:
        """The merged model of the newest step, as it is written; the base before the first."""
        return self.grown.last.model if self.grown.steps else self._base

    def check(self, wanted: Sequence[Wanted]) -> None:
        """Refuse to merge these if the line holds another history.

        A gate that leaves updates out decides only when they are merged: then they are looked at one by one.
        """
        if self._head is not None and not self._leaves_out:
            check_continuation(self.grown.name, self._head, self._entries, wanted)

    def check_next(self, task: Task, name: str, config: ChainConfig) -> None:
        """Refuse, before it is trained, an update that cannot be the one that the line holds in its place."""
        if self._leaves_out:
            return
        done = len(self._merged)
        later = [Wanted(one, None, each.weight) for each in config.tasks for one in each.updates][done:]
        self.check([*(one.wanted for one in self._merged), *later])
        if done < len(self._entries) and not task.checkpoint:
            check_start(self.grown.name, self._entries[done], self.model, here().store)

    def add(self, one: Prepared) -> None:
        """Merge an update and evaluate what came of it; commit and register it unless the line has it, or its gate
        leaves it out."""
        number, line, name = len(self._merged), self._line, one.name
        head = self._head or self._open()
        self.check([each.wanted for each in (*self._merged, one)])
        self._alone[one.task.name] = leading(here().store.open(one.alone))[one.task.name]
        held = self._entries[number - 1].state if number else None
        weight = one.task.weight
        state = run_now(steps.fold, f"{line.name}: merge {name}", self._base, held, one.update, line.recipe, weight)
        known = self._known(number, one)
        seen = self._seen(one)
        beside = (self._base_scores, one.alone, *self._look_ahead(one))
        # the journal's factor, also where the search or the gate would choose another one by now
        factor = known.factor if known else self._factor(name, state, seen)
        tried = self._try(name, state, seen, factor)
        if known is None and line.gate is not None:
            tried = self._retried(name, state, seen, tried, line.gate.retry)
        model, scores, summary, verdict = tried.model, tried.scores, tried.summary, tried.verdict
        folded = Fold(name, one.update, state, weight, tried.factor)
        able = (self._able_scores, self._after[model]) if self._able_scores else ()
        if self._refused(verdict) and verdict is not None and known is None:
            candidate = [*self._entries[:number], after_fold(head, folded)]
            version = self._register(name, candidate, model, scores, summary, verdict, True, beside, able)
            self.grown.left_out.append(Step(candidate[-1], model, scores, summary, version, verdict))
            if not self._leaves_out:
                raise _stopped(version, name, verdict)
            return
        if known is None:
            self._check_place(number, one)
            self._head = run_now(steps.commit, f"{line.name}: commit {name}", line.name, head, folded)
            self._entries.append(self._head)
        self._merged.append(one)
        self._matrix.append(dict(tried.standing.scores))
        if verdict and verdict.passed:
            self._champion = (model, tried.standing)
        so_far = self._entries[: number + 1]
        if number + 1 == self._count == len(self._entries):
            # a head that went back to an older state is a new version all the same, so that the alias can follow it
            so_far[-1] = replace(so_far[-1], number=(self._head or head).number)
        version = self._register(name, so_far, model, scores, summary, verdict, False, beside, able)
        self.grown.steps.append(Step(self._entries[number], model, scores, summary, version, verdict))

    def _try(self, name: str, state: StateRef, seen: list[Task], factor: float) -> _Tried:
        """Write a state as a model, evaluate and judge it."""
        line = self._line.name
        written = (self._base, state) if factor == 1 else (self._base, state, factor)
        model = run_now(steps.materialize, f"{line}: write {name}", *written)
        scores = run_now(steps.evaluate, f"{line}: evaluate {name}", model, seen, self._base)
        standing = self._standing(name, model, scores)
        summary = summarise([*self._matrix, standing.scores], self._alone, self._ahead, self._unmet)
        summary = with_abilities(summary, standing.abilities, self._able)
        return _Tried(factor, model, scores, standing, summary, self._judge(name, seen, standing))

    def _retried(self, name: str, state: StateRef, seen: list[Task], first: _Tried, factors: Sequence[float]) -> _Tried:
        """The first of these factors that passes, where the merge as it is does not; otherwise that."""
        if first.verdict is None or first.verdict.passed:
            return first
        others = (self._try(f"{name} at {factor:g}", state, seen, factor) for factor in factors)
        return next((one for one in others if one.verdict and one.verdict.passed), first)

    def _refused(self, verdict: Verdict | None) -> bool:
        """Whether the gate keeps a merge out of the line."""
        gate = self._line.gate
        return gate is not None and gate.on_failure != "keep" and verdict is not None and not verdict.passed

    def finish(self) -> Grown:
        """The line after its last update. Raises InvalidInput if its gate let none of them in."""
        if not self.grown.steps:
            said = "; ".join(reason for step in self.grown.left_out if step.verdict for reason in step.verdict.reasons)
            raise InvalidInput(
                f"the gate of line {self.grown.name!r} left out every update: {said}",
                remedy="Loosen the gate, or look at the versions that it refused",
            )
        return self.grown

    def _known(self, number: int, one: Prepared) -> Entry | None:
        """The line's own entry for this update, if it has it in this place."""
        held = self._entries[number] if number < len(self._entries) else None
        same = held is not None and held.update == one.update and held.weight == one.task.weight
        return held if same else None

    def _check_place(self, number: int, one: Prepared) -> None:
        """Refuse an update where the line holds another one; it could not be known before the gate let it through."""
        if number < len(self._entries) and self._head is not None:
            wanted = [each.wanted for each in (*self._merged, one)]
            check_continuation(self.grown.name, self._head, self._entries, wanted)

    def _register(self, name: str, entries: list[Entry], *facts: Any) -> ModelVersion:
        label = f"{self._line.name}: register {name}"
        with kept(self._line.name, repr(name)):
            version: ModelVersion = run_now(steps.register, label, self._experiment, self._line.name, entries, *facts)
        return version

    def _standing(self, name: str, model: CheckpointRef, scores: ScoresRef) -> Standing:
        store = here().store
        found = store.open(scores)
        if not self._abilities:
            return Standing(leading(found), outcomes_of(found))
        label = f"{self._line.name}: evaluate abilities after {name}"
        self._after[model] = run_now(steps.evaluate, label, model, self._abilities, self._base)
        left = leading(store.open(self._after[model]))
        return Standing(leading(found), outcomes_of(found), retention(left, self._able), left)

    def _look_ahead(self, one: Prepared) -> tuple[ScoresRef, ...]:
        """Evaluate the model of the step before on a task that it has not met: what forward transfer is made of."""
        if not self._merged or one.task.name in {each.task.name for each in self._merged}:
            return ()
        label, model = f"{self._line.name}: evaluate ahead of {one.name}", self.model
        scores = run_now(steps.evaluate, label, model, [one.task], self._base)
        found = here().store.open(scores)
        self._ahead |= leading(found)
        if self._champion is not None and self._champion[0] == model:  # so that the gate need not ask again
            self._champion = (model, self._champion[1].joined(Standing(leading(found), outcomes_of(found))))
        return (scores,)

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

    def _seen(self, one: Prepared) -> list[Task]:
        """The tasks of the updates that are merged with this one, each once."""
        return list({each.task.name: each.task for each in (*self._merged, one)}.values())

    def _factor(self, name: str, state: StateRef, seen: list[Task]) -> float:
        """How much of the merged delta to write, if the line searches for it."""
        if self._line.search is None:
            return 1.0
        label = f"{self._line.name}: search {name}"
        scores = run_now(steps.search, label, self._base, state, seen, self._line.search)
        return float(here().store.open(scores).manifest.facts["factor"])


def _stopped(version: ModelVersion, name: str, verdict: Verdict) -> InvalidInput:
    return InvalidInput(
        f"the gate of line {version.name!r} stops the chain at {name!r}: {'; '.join(verdict.reasons)}",
        remedy=f"Nothing entered the line; look at version {version.version}. Then change the gate, or the task, or "
        "leave it out, and run again",
    )
