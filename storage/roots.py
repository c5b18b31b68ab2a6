"""Roots: what people still want. The journals of lines, series and queues, and what their entries name; pins are in
pins.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from storage.errors import Damaged, InvalidInput
from storage.events import Submission
from storage.lines import Entry, Line, history_of
from storage.objects import ObjectStore
from storage.queue import FOLDER, Queue
from storage.refs import Ref, parse_ref
from storage.series import Series, Version

Read = TypeVar("Read")


@dataclass(frozen=True)
class LineJournal:
    """One line's entries, and the number that the next one will get."""

    name: str
    entries: tuple[Entry, ...]

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def path(self) -> str:
        return f"line/{self.name}"

    @property
    def head(self) -> Entry:
        return self.entries[-1]

    @property
    def history(self) -> list[Entry]:
        """The folds that made the head's state."""
        return history_of(self.entries, self.name)

    def named(self) -> dict[str, list[Ref]]:
        """What each entry cannot do without, under the entry's name for people: its base, its updates, and of the
        head the state. Older states are cache: they can be folded again from the updates."""
        found = {}
        for entry in self.entries:
            state = [entry.state] if entry is self.head and entry.state else []
            found[f"line {self.name!r} entry {entry.number}"] = [entry.base, *updates_of(entry), *state]
        return found

    def states(self) -> set[Ref]:
        """Every state that the entries name."""
        return {ref for entry in self.entries for ref in states_of(entry)}

    def refs(self, *, states: bool) -> set[Ref]:
        """What all entries name together: with `states` all of them, otherwise the head's only."""
        found = {ref for refs in self.named().values() for ref in refs}
        return found | self.states() if states else found


@dataclass(frozen=True)
class SeriesJournal:
    """One series' versions, all of which are wanted."""

    name: str
    versions: tuple[Version, ...]

    def __len__(self) -> int:
        return len(self.versions)

    @property
    def path(self) -> str:
        return f"series/{self.name}"

    def named(self) -> dict[str, list[Ref]]:
        return {f"series {self.name!r} version {one.number}": [one.checkpoint] for one in self.versions}

    def states(self) -> set[Ref]:
        return set()

    def refs(self, *, states: bool) -> set[Ref]:
        return {one.checkpoint for one in self.versions}


@dataclass(frozen=True)
class QueueJournal:
    """One line's queue. What is not merged or given up yet is wanted, as far as it is in the store; and the base."""

    name: str
    submissions: tuple[Submission, ...]
    events: int

    def __len__(self) -> int:
        return self.events

    @property
    def path(self) -> str:
        return f"{FOLDER}/{self.name}"

    def named(self) -> dict[str, list[Ref]]:
        found = {}
        for one in self.submissions:
            if one.state in ("pending", "running", "quarantined"):
                refs = [parse_ref(one.base)]
                with suppress(InvalidInput):  # a folder, or an address elsewhere
                    refs.append(parse_ref(one.reference))
                found[f"queue of line {self.name!r}, {one.task!r}"] = refs
        return found

    def states(self) -> set[Ref]:
        return set()

    def refs(self, *, states: bool) -> set[Ref]:
        return {ref for refs in self.named().values() for ref in refs}


AnyJournal = LineJournal | SeriesJournal | QueueJournal


@dataclass(frozen=True)
class Journals:
    """All journals of a store; `problems` are those that cannot be read: key -> what is wrong."""

    lines: tuple[LineJournal, ...]
    series: tuple[SeriesJournal, ...] = ()
    problems: dict[str, str] = field(default_factory=dict)
    queues: tuple[QueueJournal, ...] = ()

    @property
    def all(self) -> tuple[AnyJournal, ...]:
        return (*self.lines, *self.series, *self.queues)


def updates_of(entry: Entry) -> list[Ref]:
    return list(dict.fromkeys(one for one in (entry.update, *(fold.update for fold in entry.folds)) if one))


def states_of(entry: Entry) -> list[Ref]:
    return list(dict.fromkeys(one for one in (entry.state, *(fold.state for fold in entry.folds)) if one))


def read_journal(objects: ObjectStore, name: str) -> LineJournal:
    """The journal of a line, as one that can be trusted: no entry is lacking, every entry is what it should be."""
    line = Line(objects, name)
    newest = line.head().number  # first: entries that come while they are read do no harm
    entries = tuple(line.entries())
    _refuse_gap(objects, f"line/{name}", len(entries), newest)
    history_of(entries, name)  # says so if an entry goes back to what was never made
    return LineJournal(name, entries)


def read_series(objects: ObjectStore, name: str) -> SeriesJournal:
    """The same of a series."""
    series = Series(objects, name)
    newest = series.head().number
    versions = tuple(series.versions())
    _refuse_gap(objects, f"series/{name}", len(versions), newest)
    return SeriesJournal(name, versions)


def read_queue(objects: ObjectStore, name: str) -> QueueJournal:
    """The same of a queue; a gap is Damaged when it is read."""
    queue = Queue(objects, name)
    return QueueJournal(name, tuple(queue.submissions()), queue.count)


def read_journals(objects: ObjectStore) -> Journals:
    problems: dict[str, str] = {}
    lines = _readable(objects, "line", Line.names(objects), read_journal, problems)
    series = _readable(objects, "series", Series.names(objects), read_series, problems)
    queues = _readable(objects, FOLDER, Queue.names(objects), read_queue, problems)
    return Journals(tuple(lines), tuple(series), problems, tuple(queues))


def _readable(
    objects: ObjectStore,
    folder: str,
    names: list[str],
    read: Callable[[ObjectStore, str], Read],
    problems: dict[str, str],
) -> Iterator[Read]:
    for name in names:
        try:
            yield read(objects, name)
        except (Damaged, InvalidInput) as error:
            problems[f"{folder}/{name}"] = str(error)


def _refuse_gap(objects: ObjectStore, path: str, count: int, newest: int) -> None:
    if count <= newest:
        raise Damaged(
            f"{path}/{count:08d} is not in {objects.url}, but later entries are",
            remedy="Restore it from a copy of the store",
        )


def refuse_damaged(journals: Journals, what: str) -> None:
    """`what` must not go on while nobody can tell what a line or series needs."""
    for key, problem in journals.problems.items():
        raise Damaged(f"{what} stops, because {key} cannot be read: {problem}")
