"""Growing: one line of a chain, update by update: merge, write, evaluate, judge, commit, register."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from configs.chain import ChainConfig, LineConfig, Task
from flows import steps
from flows.continuation import Wanted, check_continuation, check_start
from flows.folding import fold_all
from flows.judging import Ground, Judging, Tried
from flows.policy import run_now
from flows.registering import kept
from flows.retrying import alternatives, commit
from flows.tables import recipe_name
from flows.workplace import here
from storage.errors import InvalidInput
from storage.lines import Entry, Fold, Line, after_fold
from storage.refs import CheckpointRef, ScoresRef, UpdateRef
from storage.registry import ModelVersion
from tasks.evaluate import Summary
from tasks.gate import Verdict
from tasks.recipe import Recipe


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
    """A line that a chain opens, or goes on with where an earlier run stopped."""

    def __init__(self, config: ChainConfig, line: LineConfig, ground: Ground) -> None:
        self._experiment, self._line, self._base, self._base_scores = config.name, line, ground.base, ground.scores
        self._judging = Judging(config, line, ground)
        self._count = sum(len(task.updates) for task in config.tasks)
        self._leaves_out = line.gate is not None and line.gate.on_failure == "leave_out"
        self._head: Entry | None = None
        self._entries: list[Entry] = []
        self._merged: list[Prepared] = []
        self.grown = Grown(line.name)
        if line.name in Line.names(here().store.objects):  # a new one is not opened before there is an update for it
            self._open()

    def _open(self) -> Entry:
        journal = Line(here().store.objects, self._line.name)
        first, *others = (recipe.spec() for recipe in self._line.recipes)
        journal.open(self._base, first, others)
        # read before the history: a merge that comes in between makes the commit fail, not vanish
        self._head = journal.head()
        self._entries = journal.steps()
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
        self._judging.alone(one.task.name, one.alone)
        known = self._known(number, one)
        seen = self._seen(one)
        beside = [self._base_scores, one.alone]
        if self._merged and one.task.name not in {each.task.name for each in self._merged}:
            beside.append(self._judging.look_ahead(name, one.task, self.model))
        # the journal's recipe and factor, also where the search or the gate would choose others by now
        tried = self._again(name, known, seen) if known else self._newly(one, head, seen)
        model, scores, summary, verdict = tried.model, tried.scores, tried.summary, tried.verdict
        able = self._judging.able(model)
        if self._refused(verdict) and verdict is not None and known is None:
            # numbered by its place, and not by what the line has come to since: the same version in every run
            place = self._entries[number - 1].number if number else 0
            candidate = [*self._entries[:number], replace(tried.entry, number=place + 1)]
            version = self._register(name, candidate, model, scores, summary, verdict, True, beside, able)
            self.grown.left_out.append(Step(candidate[-1], model, scores, summary, version, verdict))
            if not self._leaves_out:
                raise _stopped(version, name, verdict)
            return
        if known is None:
            self._check_place(number, one)
            self._head = commit(line.name, head, tried.entry)
            self._entries.append(self._head)
        self._merged.append(one)
        self._judging.accept(tried)
        so_far = self._entries[: number + 1]
        if number + 1 == self._count == len(self._entries):
            # a head that went back to an older state is a new version all the same, so that the alias can follow it
            so_far[-1] = replace(so_far[-1], number=(self._head or head).number)
        version = self._register(name, so_far, model, scores, summary, verdict, False, beside, able)
        self.grown.steps.append(Step(self._entries[number], model, scores, summary, version, verdict))

    def _again(self, name: str, known: Entry, seen: list[Task]) -> Tried:
        """A merge that the line holds, found done."""
        line, number, recipe = self._line.name, len(self._merged), _recipe(known)
        if known.action == "rebuild":
            label = f" by {recipe_name(known.merger)}"
            state = fold_all(line, self._base, known.folds, recipe, {}, label)[-1].state
        else:
            held = self._entries[number - 1].state if number else None
            state = run_now(steps.fold, f"{line}: merge {name}", self._base, held, known.update, recipe, known.weight)
        return self._judging.ask(name, replace(known, state=state), seen)

    def _newly(self, one: Prepared, head: Entry, seen: list[Task]) -> Tried:
        """A merge that the line does not hold: as it is, or the first of what its gate lists that passes."""
        number, line, name, weight = len(self._merged), self._line, one.name, one.task.weight
        if number == len(self._entries):
            onto = head
        else:  # the line went on without it
            onto = self._entries[number - 1] if number else Entry(0, "open", self._base, line.recipe.spec())
        label = f"{line.name}: merge {name}"
        state = run_now(steps.fold, label, self._base, onto.state, one.update, _recipe(onto), weight)
        entry = after_fold(onto, Fold(name, one.update, state, weight, self._judging.factor(name, state, seen)))
        first = self._judging.ask(name, entry, seen)
        if line.gate is None or first.verdict is None or first.verdict.passed:
            return first
        others = alternatives(
            line.name,
            entry,
            self._entries[:number],
            line.gate.retry,
            first.verdict.reasons,
            lambda said, state: self._judging.factor(f"{name} {said}", state, seen),
        )
        tried = (self._judging.ask(f"{name} {other.said}", other.entry, seen) for other in others)
        return next((one for one in tried if one.verdict and one.verdict.passed), first)

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

    def _seen(self, one: Prepared) -> list[Task]:
        """The tasks of the updates that are merged with this one, each once."""
        return list({each.task.name: each.task for each in (*self._merged, one)}.values())


def _recipe(entry: Entry) -> Recipe:
    return Recipe.from_spec(entry.merger, f"entry {entry.number}")


def _stopped(version: ModelVersion, name: str, verdict: Verdict) -> InvalidInput:
    return InvalidInput(
        f"the gate of line {version.name!r} stops the chain at {name!r}: {'; '.join(verdict.reasons)}",
        remedy=f"Nothing entered the line; look at version {version.version}. Then change the gate, or the task, or "
        "leave it out, and run again",
    )
