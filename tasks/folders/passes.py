"""The passes of a one-shot merge over the tensors of several folders, with the mergers that lines use.

A line folds one update after the other over the whole model, because a fold may need numbers of the whole state
before it. Here every tensor goes through all its folds at once, as long as nobody asks for such a number; who does
(`Unknown`) waits until it is there, and is done again. So most methods read every folder once and some twice, and the
numbers are those of a line.

Methods that see each entry alone take tensors in pieces that stay in a core's cache.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from storage.errors import InvalidInput
from tasks.folders.pieces import PIECE, Piece
from tasks.folders.scratch import Scratch
from tasks.folders.unknown import Unknown, UnknownError
from tasks.mergers import Facts, Joint, Parts, Sequential, Sums
from tasks.mergers.base import Mix
from tasks.mergers.vectors import kept
from tasks.parallel import Budget, Report, in_order
from tasks.recipe import Recipe
from tasks.scalings import AnyScaling
from tasks.stored import added

_JOB = 8 * PIECE  # entries that one thread takes at a time of tensors that come in pieces: whole pieces
_SURVEYED = 1 << 20  # entries of the pieces that a survey sees of such tensors

Finish = Callable[[Piece, Tensor], Sums]  # what is done with a piece and its merged delta [elements]
Deltas = Callable[[Piece, int], Tensor]  # the update of this index, of one piece


@dataclass
class _Outcome:
    """What came of one job: the sums of every fold that could be done, and those of the finish if all could."""

    folds: list[Sums] = field(default_factory=list)
    shares: list[Sums] = field(default_factory=list)  # the scaling's sums, fold by fold
    finished: bool = False
    found: Sums = field(default_factory=dict)


class Passes:
    """All passes of one merge over `wholes`, the parameters in the order of their names."""

    def __init__(self, recipe: Recipe, wholes: Sequence[Piece], budget: Budget, scratch: Scratch) -> None:
        self._recipe, self._wholes, self._budget, self._scratch = recipe, wholes, budget, scratch
        self._sources = wholes[0].sources
        self._count = len(self._sources.tuned)
        self.in_pieces = recipe.entrywise
        self._jobs = [part for one in wholes for part in one.split(_JOB)] if self.in_pieces else list(wholes)
        self._facts: list[Facts] = [{}] + [Unknown() for _ in range(self._count)]
        self._surveys: list[Facts] = []
        self._looks: dict[str, list[Facts]] = {}  # of every parameter, update by update
        self._mixes: dict[str, Mix] = {}
        self._early: dict[int, _Outcome] = {}  # jobs that were done while their parameter was looked at

    def run(self, write: Finish, report: Callable[[str], Report | None] = lambda label: None) -> None:
        """Merge everything. `write` gets every piece with its merged delta, in any order, from any thread, and
        sometimes again. `report` is asked for the progress of each pass."""
        self._surveys = self._survey(report("surveying"))
        self._foresee()
        self._look(write, report("looking"))
        scaling = self._recipe.scaling
        if scaling is None:
            self._pass(write, report("merging"))
            return
        outcomes = self._pass(lambda _, merged: scaling.measure(merged), report("measuring"), again=True)
        facts: Facts = {}
        for step in range(self._count):
            shares = added(one.shares[step] for one in outcomes)
            facts = scaling.close(facts, shares, self._sources.weights[step])
        names = [one.parameter.target.name for one in self._wholes]
        factors = scaling.factors(names, float(self._count), facts, added(one.found for one in outcomes))
        self._pass(lambda piece, merged: write(piece, merged * factors[piece.parameter.target.name]), report("writing"))

    def _survey(self, report: Report | None) -> list[Facts]:
        """What the merger wants to know of every whole update: of several updates at once."""
        merger, weights = self._recipe.merger, self._sources.weights
        if isinstance(merger, Joint):
            return []

        def one(index: int) -> Facts:
            seen = merger.survey(lambda: self._stream(index), self._refuse_merged if index else None)
            return {**seen, "weight": weights[index]}

        largest = max(one.elements for one in self._wholes)
        return list(in_order(range(self._count), one, lambda _: 8 * 4.0 * largest, self._budget, report))

    def _look(self, finish: Finish, report: Report | None) -> None:
        """What a tensor that is merged in pieces must be known for as a whole. One whose deltas are held in memory for
        that is merged at once, before they are gone."""
        merger, weights = self._recipe.merger, self._sources.weights
        if not self.in_pieces:
            return

        def one(parameter: Piece) -> None:
            held = self._held(parameter) <= self._budget.memory / 2
            name = parameter.parameter.target.name
            if isinstance(merger, Joint):
                columns = kept(held, lambda: self._columns(parameter))
                self._mixes[name] = merger.mix(columns, weights, held)
                if held:
                    rows = list(columns())
                    early(name, lambda piece, index: rows[piece.start // PIECE][index])
                    del self._mixes[name]  # nobody asks again, and it may know something of every entry
                return
            streams = [kept(held, partial(self._entries, parameter, index)) for index in range(self._count)]
            self._looks[name] = [merger.look(stream) for stream in streams]
            if held and any(self._looks[name]) and not self._unknown:
                updates = [list(stream()) for stream in streams]
                early(name, lambda piece, index: updates[index][piece.start // PIECE])

        def early(name: str, deltas: Deltas) -> None:
            for number in [number for number, job in enumerate(self._jobs) if job.parameter.target.name == name]:
                self._early[number] = self._job(number, _Outcome(), finish, again=False, deltas=deltas)

        def cost(parameter: Piece) -> float:
            held = self._held(parameter)
            return self._space(parameter.dtype, PIECE) + (held if held <= self._budget.memory / 2 else 0)

        largest_first = sorted(self._wholes, key=lambda one: -one.elements)
        deque(in_order(largest_first, one, cost, self._budget, report), maxlen=0)

    def _held(self, parameter: Piece) -> float:
        """Bytes of one parameter's deltas, and of what a look may make of them: a number in float64 per entry."""
        return (self._count + 2) * 1.0 * parameter.elements * parameter.dtype.itemsize

    def _columns(self, parameter: Piece) -> Iterator[list[Tensor]]:
        for part in parameter.split(PIECE):
            piece = replace(part)
            yield [self._delta(piece, index) for index in range(self._count)]

    def _entries(self, parameter: Piece, index: int) -> Iterator[Tensor]:
        return (self._delta(replace(part), index) for part in parameter.split(PIECE))

    def _stream(self, index: int) -> Iterator[Tensor]:
        for one in self._wholes:
            for part in one.split(_SURVEYED if self.in_pieces else one.elements):
                yield self._delta(replace(part), index)

    def _refuse_merged(self) -> NoReturn:
        name = self._recipe.merger.name
        said = f"merger {name!r} looks at what was merged before, one update after the other"
        raise InvalidInput(said, remedy=f"Merge in a line, whose state is kept: a chain with a line of merger {name}")

    def _delta(self, piece: Piece, index: int) -> Tensor:
        """An update as the merger sees it: thinned."""
        delta, thin = piece.shaped(piece.delta(index)), self._recipe.sparsify
        return delta if thin is None else thin.thin(delta, self._sources.keys[index], piece.parameter.base, piece.start)

    def _pass(self, finish: Finish, report: Report | None, again: bool = False) -> list[_Outcome]:
        """Do all jobs, those that must wait for a fact as often as needed. `again`: another pass will follow."""
        outcomes = [self._early.get(index) or _Outcome() for index in range(len(self._jobs))]
        largest_first = sorted(range(len(self._jobs)), key=lambda index: -self._jobs[index].elements)
        waiting = [index for index in largest_first if not outcomes[index].finished]
        while waiting:

            def one(index: int) -> _Outcome:
                return self._job(index, outcomes[index], finish, again)

            for index, outcome in zip(waiting, in_order(waiting, one, self._cost, self._budget, report), strict=True):
                outcomes[index] = outcome
            unknown = self._unknown
            self._learn(outcomes)
            waiting = [index for index in waiting if not outcomes[index].finished]
            assert not waiting or self._unknown < unknown, "every round learns at least one state"
        return outcomes

    @property
    def _unknown(self) -> int:
        return sum(isinstance(one, Unknown) for one in self._facts)

    def _foresee(self) -> None:
        """Close the states whose facts do not depend on sums at all."""
        merger = self._recipe.merger
        for step, survey in enumerate(self._surveys):
            try:
                assert isinstance(merger, Sequential)
                self._facts[step + 1] = merger.close(self._facts[step], Unknown(), survey)
            except UnknownError:
                return

    def _cost(self, index: int) -> float:
        job = self._jobs[index]
        return self._space(job.dtype, PIECE if self.in_pieces else job.elements)

    def _space(self, dtype: torch.dtype, elements: int) -> float:
        """Bytes that work on so many elements takes."""
        merger = self._recipe.merger
        space = self._recipe.workspace(merger.workspace(self._count) if isinstance(merger, Joint) else 0)
        return space * elements * dtype.itemsize

    def _learn(self, outcomes: Sequence[_Outcome]) -> None:
        """Close every state whose folds are all done."""
        merger = self._recipe.merger
        if isinstance(merger, Joint):
            return
        for step in range(min(len(one.folds) for one in outcomes)):
            if isinstance(self._facts[step + 1], Unknown):
                sums = added(one.folds[step] for one in outcomes)
                self._facts[step + 1] = merger.close(self._facts[step], sums, self._surveys[step])

    def _job(self, index: int, before: _Outcome, finish: Finish, again: bool, deltas: Deltas | None = None) -> _Outcome:
        """Try one job. `before` is what came of it in the round before; `deltas`: the updates, if they are at hand."""
        job = self._jobs[index]
        if not self.in_pieces:
            return self._whole(replace(job), str(index), before, finish, again)
        done = [self._fresh(replace(part), finish, deltas or self._delta) for part in job.split(PIECE)]
        steps = min(len(one.folds) for one in done)
        folds: list[Sums] = [added(one.folds[step] for one in done) for step in range(steps)]
        return _Outcome(folds, [], all(one.finished for one in done), added(one.found for one in done))

    def _fresh(self, piece: Piece, finish: Finish, deltas: Deltas) -> _Outcome:
        outcome = _Outcome()
        try:
            if isinstance(self._recipe.merger, Joint):
                merged = self._mixed(piece, deltas)
            else:
                merged = self._delta_of(self._fold(piece, outcome, deltas), piece)
        except UnknownError:
            return outcome
        return replace(outcome, finished=True, found=finish(piece, merged.reshape(-1)))

    def _whole(self, piece: Piece, key: str, before: _Outcome, finish: Finish, again: bool) -> _Outcome:
        """Like `_fresh`, for a parameter whose parts or merged delta may lie in the scratch folder."""
        outcome, start = replace(before), time.perf_counter()
        merged = self._scratch.take(f"{key}.merged")
        if merged is None:
            parts = self._scratch.take(f"{key}.parts")
            try:
                if isinstance(self._recipe.merger, Joint):
                    outcome = _Outcome()
                    merged = {"": self._combine(piece, outcome)}
                else:
                    if parts is None:
                        outcome = _Outcome()
                        parts = self._fold(piece, outcome, self._delta)
                    merged = {"": self._delta_of(parts, piece)}
            except UnknownError:
                self._scratch.offer(f"{key}.parts", parts or {}, time.perf_counter() - start)
                return outcome
            if again:
                self._scratch.offer(f"{key}.merged", merged, time.perf_counter() - start)
        return replace(outcome, finished=True, found=finish(piece, merged[""].reshape(-1)))

    def _delta_of(self, parts: Parts, piece: Piece) -> Tensor:
        assert isinstance(self._recipe.merger, Sequential)
        return self._recipe.merger.delta(parts, self._facts[-1], piece.parameter.target)

    def _fold(self, piece: Piece, outcome: _Outcome, deltas: Deltas) -> Parts:
        merger, scaling, target = self._recipe.merger, self._recipe.scaling, piece.parameter.target
        assert isinstance(merger, Sequential)
        state, total = None, None
        looks = self._looks.get(target.name)
        for step, survey in enumerate(self._surveys):
            delta = deltas(piece, step)
            if looks is not None:
                survey = {**survey, **looks[step], "start": piece.start}
            state, sums = merger.fold(state, delta, target, self._facts[step], survey)
            outcome.folds.append(sums)
            if scaling is not None:
                if scaling.needs_total:
                    share = delta * self._sources.weights[step]
                    total = share if total is None else total + share
                outcome.shares.append(scaling.share(delta, total))
        assert state is not None
        return state

    def _mixed(self, piece: Piece, deltas: Deltas) -> Tensor:
        updates = [deltas(piece, index) for index in range(self._count)]
        return self._mixes[piece.parameter.target.name](updates, piece.start)

    def _shares(self, scaling: AnyScaling, deltas: Sequence[Tensor]) -> Iterator[Sums]:
        """What the scaling finds in each of one parameter's updates, and in their sum up to it."""
        total = None
        for delta, weight in zip(deltas, self._sources.weights, strict=True):
            if scaling.needs_total:
                total = delta * weight if total is None else total + delta * weight
            yield scaling.share(delta, total)

    def _combine(self, piece: Piece, outcome: _Outcome) -> Tensor:
        merger, scaling = self._recipe.merger, self._recipe.scaling
        assert isinstance(merger, Joint)
        deltas = [self._delta(piece, index) for index in range(self._count)]
        if scaling is not None:
            outcome.shares.extend(self._shares(scaling, deltas))
        if not any(bool(delta.any()) for delta in deltas):
            return deltas[0]
        base = piece.shaped(piece.base)
        return merger.combine(base, deltas, self._sources.weights, piece.parameter.target)
