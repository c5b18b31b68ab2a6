"""Lines: named streams of merges, each kept as a journal (storage/journal.py).

Creating an entry is the commit of a merge, and of two concurrent merges exactly one wins. The head is the newest
entry. Going back is one more entry, and so is merging the updates again in another way. Entries, unlike manifests,
carry the time: they record events.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from storage.errors import Conflict, Damaged, InvalidInput, Missing
from storage.journal import Journal
from storage.objects import ObjectStore
from storage.options import rebuild_options
from storage.refs import CheckpointRef, StateRef, UpdateRef, short
from storage.trust import check_entry

Action = Literal["open", "fold", "rollback", "rebuild"]

_FOLDER = "line"
_ACTIONS = get_args(Action)


@dataclass(frozen=True)
class Fold:
    """One update's place in a line: `state` is what merging `update` gave, `weight` how much it counted, `factor` how
    much of the merged delta is written as a model."""

    task: str
    update: UpdateRef
    state: StateRef
    weight: float = 1.0
    factor: float = 1.0


@dataclass(frozen=True)
class Entry:
    """One event of a line. `step` is the number of updates in `state`; `open` entries have neither.

    `task`, `update`, `weight` and `factor` are of the update merged last. A `rebuild` lists all that it merged in
    `folds`, oldest first. `merger` is the recipe of the state, as it is given to whoever merges next.
    """

    number: int
    action: Action
    base: CheckpointRef
    merger: Mapping[str, Any]
    step: int = 0
    task: str = ""
    update: UpdateRef | None = None
    state: StateRef | None = None
    why: str = ""
    at: str = ""
    weight: float = 1.0
    factor: float = 1.0
    folds: tuple[Fold, ...] = ()

    @property
    def fold(self) -> Fold:
        """What this entry merged last."""
        assert self.update is not None and self.state is not None
        return Fold(self.task, self.update, self.state, self.weight, self.factor)


class Line:
    """The journal of one line."""

    def __init__(self, objects: ObjectStore, name: str) -> None:
        self._journal = Journal(objects, _FOLDER, name)
        self.name = name

    @staticmethod
    def names(objects: ObjectStore) -> list[str]:
        return Journal.names(objects, _FOLDER)

    def entries(self) -> Iterator[Entry]:
        """All entries, oldest first."""
        number = 0
        while (entry := self._read(number)) is not None:
            yield entry
            number += 1

    def head(self) -> Entry:
        """The newest entry."""
        number = self._journal.newest()
        newest = None if number is None else self._read(number)
        if newest is None:
            raise self._journal.absent()
        return newest

    def open(self, base: CheckpointRef, merger: Mapping[str, Any], others: Sequence[Mapping[str, Any]] = ()) -> Entry:
        """Start the line, or find that it has the same base and, at its head, the same merger, or one of `others`."""
        first = self._append(Entry(0, "open", base, merger))
        if first is not None:
            return first
        head = self.head()
        if head.base != base:
            raise Conflict(
                f"line {self.name!r} was opened with base {head.base}, not {base}",
                remedy="A line keeps its base for life: give the new one another name",
            )
        if dict(head.merger) not in [dict(one) for one in (merger, *others)]:
            command = f"deltaworks line rebuild {self.name} {rebuild_options(head.merger, merger)}".rstrip()
            raise Conflict(
                f"line {self.name!r} merges with {dict(head.merger)}, not with {dict(merger)}",
                remedy=f"Give the new line another name, or merge the updates of this one again: `{command}`",
            )
        found = self._read(0)
        assert found is not None
        return found

    def fold(
        self,
        after: Entry,
        task: str,
        update: UpdateRef,
        state: StateRef,
        weight: float = 1.0,
        factor: float = 1.0,
    ) -> Entry:
        """Append the merge of `update` onto entry `after`. Conflict if another entry came first."""
        return self._commit(after_fold(after, Fold(task, update, state, weight, factor)))

    def rollback(self, to: Entry, why: str, after: Entry | None = None) -> Entry:
        """Append an entry whose state is that of the older entry `to`. Conflict if one came after entry `after`."""
        number = (after or self.head()).number + 1
        back = Entry(number, "rollback", to.base, to.merger, to.step, to.task, to.update, to.state, why)
        return self._commit(replace(back, weight=to.weight, factor=to.factor))

    def rebuild(self, after: Entry, merger: Mapping[str, Any], folds: Sequence[Fold], why: str = "") -> Entry:
        """Append an entry that takes the place of all merges before it: `folds`, by `merger`, onto the base.

        `after` is the head that was read before anything was merged. Conflict if another entry came after it.
        """
        if not folds:
            raise InvalidInput(f"line {self.name!r}: a rebuild needs at least one update")
        return self._commit(after_rebuild(after, merger, folds, why))

    def history(self, until: int | None = None) -> list[Entry]:
        """The folds that made the head's state, or that of the older entry `until`, oldest first."""
        return history_of((one for one in self.entries() if until is None or one.number <= until), self.name)

    def steps(self) -> list[Entry]:
        """The entries by which the head's updates came in, oldest first: see `steps_of`."""
        return steps_of(self.entries(), self.name)

    def entry(self, number: int) -> Entry:
        """The entry of this number. Raises Missing if the line has none."""
        found = self._read(number)
        if found is None:
            raise Missing(f"line {self.name!r} has no entry {number}")
        return found

    def holding(self, update: UpdateRef) -> Entry | None:
        """The first entry that ever merged `update`, whatever became of it since; None if none did."""
        return next(
            (one for one in self.entries() if update == one.update or any(update == f.update for f in one.folds)), None
        )

    def _commit(self, entry: Entry) -> Entry:
        stamped = self._append(entry)
        if stamped is not None:
            return stamped
        found = self._read(entry.number)
        if found is None or replace(found, at="", why=entry.why) != entry:
            holds = short(found.update) if found and found.update else "another entry"
            raise Conflict(
                f"line {self.name!r}: entry {entry.number} already holds {holds}",
                remedy=f"Somebody else changed the line at the same time: see `deltaworks line log {self.name}`",
            )
        return found  # the same content is our own write whose answer was lost, or a twin run: both are success

    def _append(self, entry: Entry) -> Entry | None:
        """The entry as it was written, with the time; None if its number is taken."""
        stamped = replace(entry, merger=dict(entry.merger), at=datetime.now(UTC).isoformat(timespec="seconds"))
        check_entry(stamped, entry.number, f"line {self.name!r}, entry {entry.number}")  # or no one could read the line
        return stamped if self._journal.create(entry.number, asdict(stamped)) else None

    def _read(self, number: int) -> Entry | None:
        data = self._journal.read(number)
        if data is None:
            return None
        return decode_entry(data, number, self._journal.key(number))


def after_fold(after: Entry, fold: Fold) -> Entry:
    """The entry that a merge onto entry `after` would be."""
    number, step = after.number + 1, after.step + 1
    merged = Entry(number, "fold", after.base, after.merger, step, fold.task, fold.update, fold.state)
    return replace(merged, weight=fold.weight, factor=fold.factor)


def after_rebuild(after: Entry, merger: Mapping[str, Any], folds: Sequence[Fold], why: str = "") -> Entry:
    """The entry that a rebuild after entry `after` would be."""
    last = folds[-1]
    rebuilt = Entry(after.number + 1, "rebuild", after.base, merger, len(folds), last.task, last.update, last.state)
    return replace(rebuilt, why=why, weight=last.weight, factor=last.factor, folds=tuple(folds))


def history_of(entries: Iterable[Entry], name: str) -> list[Entry]:
    """The folds that made the state of the last of `entries`, oldest first: the journal with what was taken back left
    out.

    What a rebuild merged is given as fold entries under the rebuild's number, except for those states that were
    there before: they keep the entry that made them. A state may have been committed with several factors; what a
    rollback goes back to has the factor that the rollback names.
    """
    return _course(entries, name, as_merged_again=True)


def steps_of(entries: Iterable[Entry], name: str) -> list[Entry]:
    """The entries by which the updates of the last of `entries` came in, one for each, oldest first.

    They are those of `history_of`, with one difference: a rebuild that brought a new update, because the gate of the
    line refused it by the recipe before, is the entry of that update, and the steps before it stay what they were, by
    that recipe.
    """
    return _course(entries, name, as_merged_again=False)


def _course(entries: Iterable[Entry], name: str, *, as_merged_again: bool) -> list[Entry]:
    kept: list[Entry] = []
    # a rollback may also go back to what was rolled back
    made: dict[tuple[StateRef | None, float], list[Entry]] = {(None, 1.0): kept}
    for entry in entries:
        if entry.action == "fold":
            kept = made[entry.state, entry.factor] = [*kept, entry]
        elif entry.action == "rebuild":
            before, kept = kept, []
            for one in _replayed(entry):
                known = made.get((one.state, one.factor), [])
                same = [*(old.fold for old in known)] == [*(old.fold for old in kept), one.fold]
                brought = bool(known) and known[-1].action == "rebuild" and _counted(known) == _counted([*kept, one])
                kept = made[one.state, one.factor] = known if same or brought else [*kept, one]
            if not as_merged_again and _counted(entry.folds[:-1]) == _counted(before):
                kept = made[entry.state, entry.factor] = [*before, entry]
        elif entry.action == "rollback":
            if (entry.state, entry.factor) not in made:
                raise Damaged(
                    f"line/{name}/{entry.number:08d} goes back to {entry.state}, which no entry before it made"
                )
            kept = made[entry.state, entry.factor]
    return kept


def decode_entry(data: bytes, number: int, source: str) -> Entry:
    """The entry in these bytes, which `source` holds. Entries of earlier versions lack the last three fields."""
    try:
        values = json.loads(data)
        folds = tuple(Fold(**one) for one in values.get("folds", ()))
        found = Entry(**{**values, "folds": folds})
        if found.action not in _ACTIONS:
            raise Damaged(f"{source} holds the action {found.action!r}, which this version does not know")
        check_entry(found, number, source)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{source} is not a journal entry: {error}") from error
    return found


def _counted(some: Sequence[Entry | Fold]) -> list[tuple[UpdateRef | None, float]]:
    """The updates, and how much each counts: what a rebuild by another recipe leaves as it is."""
    return [(one.update, one.weight) for one in some]


def _replayed(entry: Entry) -> Iterator[Entry]:
    """The folds of a rebuild as entries of their own."""
    for step, one in enumerate(entry.folds, 1):
        yield replace(
            entry,
            action="fold",
            step=step,
            task=one.task,
            update=one.update,
            state=one.state,
            weight=one.weight,
            factor=one.factor,
            folds=(),
        )
