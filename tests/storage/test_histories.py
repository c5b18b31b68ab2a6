"""Random journals: whatever is folded, rolled back and rebuilt, the history is that of the head's state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from storage.errors import Conflict
from storage.lines import Entry, Fold, Line
from storage.objects import MemoryObjects
from storage.refs import StateRef, UpdateRef
from tests.storage.test_lines import BASE, MERGER, TIES, ref, state_of

Spec = Mapping[str, Any]
tasks = st.sampled_from("abcde")
weights = st.sampled_from([1.0, 0.5])
factors = st.sampled_from([1.0, 2.0])
mergers = st.sampled_from([MERGER, TIES])


def folded(before: StateRef | None, task: str, weight: float, merger: Spec, factor: float = 1.0) -> Fold:
    return Fold(task, UpdateRef(ref("update", task)), state_of(before, task, weight, merger), weight, factor)


class Journal(RuleBasedStateMachine):
    """The model: after each entry, the folds that make its state, and its merger."""

    @initialize(merger=mergers)
    def begin(self, merger: Spec) -> None:
        self.line = Line(MemoryObjects(), "main")
        self.line.open(BASE, merger)
        self.model: list[tuple[tuple[Fold, ...], Spec]] = [((), merger)]

    @rule(task=tasks, weight=weights, factor=factors)
    def fold(self, task: str, weight: float, factor: float) -> None:
        held, merger = self.model[-1]
        new = folded(held[-1].state if held else None, task, weight, merger, factor)
        self.line.fold(self.line.head(), task, new.update, new.state, weight, factor)
        self.model.append(((*held, new), merger))

    @rule(data=st.data())
    def roll_back_to_an_entry(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.model) - 1))
        self.line.rollback(list(self.line.entries())[number], "")
        self.model.append(self.model[number])

    @precondition(lambda self: self.model[-1][0])
    @rule(data=st.data())
    def roll_back_to_a_step(self, data: st.DataObject) -> None:
        held, merger = self.model[-1]
        step = data.draw(st.integers(0, len(held)))
        first = replace(next(self.line.entries()), merger=merger)
        to = self.line.history()[step - 1] if step else first
        self.line.rollback(to, "")
        self.model.append(((*held[: step - 1], to.fold) if step else (), merger))

    @precondition(lambda self: self.model[-1][0])
    @rule(data=st.data(), merger=mergers)
    def rebuild(self, data: st.DataObject, merger: Spec) -> None:
        held, _ = self.model[-1]
        chosen = data.draw(st.permutations(held))[: data.draw(st.integers(1, len(held)))]
        folds: list[Fold] = []
        for one in chosen:
            before = folds[-1].state if folds else None
            folds.append(folded(before, one.task, data.draw(weights), merger, data.draw(factors)))
        self.line.rebuild(self.line.head(), merger, folds)
        self.model.append((tuple(folds), merger))

    @precondition(lambda self: len(self.model) > 1)
    @rule(data=st.data())
    def come_too_late(self, data: st.DataObject) -> None:
        after = list(self.line.entries())[data.draw(st.integers(0, len(self.model) - 2))]
        new = folded(after.state, "late", 1.0, after.merger)
        with pytest.raises(Conflict):
            self.line.rebuild(after, after.merger, [new])
        with pytest.raises(Conflict):
            self.line.fold(after, "late", new.update, new.state)

    @invariant()
    def the_history_is_that_of_the_head(self) -> None:
        held, merger = self.model[-1]
        history, head = self.line.history(), self.line.head()
        assert [replace(entry.fold, factor=1.0) for entry in history] == [replace(one, factor=1.0) for one in held]
        # where a state was reached with several factors, those before it are of the newest time
        assert head.factor == (held[-1].factor if held else 1.0)
        assert not held or history[-1].factor == head.factor
        assert [entry.step for entry in history] == list(range(1, len(held) + 1))
        assert all(dict(entry.merger) == merger for entry in history)
        assert (head.number, head.step, dict(head.merger)) == (len(self.model) - 1, len(held), merger)
        assert head.state == (held[-1].state if held else None)

    @invariant()
    def a_state_belongs_to_an_entry_that_made_it(self) -> None:
        made = {number: set(states) for number, states in map(_made, self.line.entries())}
        assert all(entry.state in made[entry.number] for entry in self.line.history())


def _made(entry: Entry) -> tuple[int, list[StateRef | None]]:
    """What an entry merged itself."""
    return entry.number, [entry.state] if entry.action == "fold" else [one.state for one in entry.folds]


Journal.TestCase.settings = settings(max_examples=150, stateful_step_count=15, deadline=None)
TestJournal = Journal.TestCase
