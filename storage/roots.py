"""Roots: what people still want. The journals of the lines and what their entries name; pins are in pins.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from storage.errors import Damaged, InvalidInput
from storage.lines import Entry, Line, history_of
from storage.objects import ObjectStore
from storage.refs import Ref


@dataclass(frozen=True)
class Journal:
    """One line's entries, and the number that the next one will get."""

    name: str
    entries: tuple[Entry, ...]

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
class Journals:
    """All journals of a store; `problems` are those that cannot be read: key -> what is wrong."""

    lines: tuple[Journal, ...]
    problems: dict[str, str] = field(default_factory=dict)


def updates_of(entry: Entry) -> list[Ref]:
    return list(dict.fromkeys(one for one in (entry.update, *(fold.update for fold in entry.folds)) if one))


def states_of(entry: Entry) -> list[Ref]:
    return list(dict.fromkeys(one for one in (entry.state, *(fold.state for fold in entry.folds)) if one))


def read_journal(objects: ObjectStore, name: str) -> Journal:
    """The journal of a line, as one that can be trusted: no entry is lacking, every entry is what it should be."""
    line = Line(objects, name)
    newest = line.head().number  # first: entries that come while they are read do no harm
    entries = tuple(line.entries())
    if len(entries) <= newest:
        raise Damaged(
            f"line/{name}/{len(entries):08d} is not in {objects.url}, but later entries are",
            remedy="Restore it from a copy of the store",
        )
    history_of(entries, name)  # says so if an entry goes back to what was never made
    return Journal(name, entries)


def read_journals(objects: ObjectStore) -> Journals:
    lines, problems = [], {}
    for name in Line.names(objects):
        try:
            lines.append(read_journal(objects, name))
        except (Damaged, InvalidInput) as error:
            problems[f"line/{name}"] = str(error)
    return Journals(tuple(lines), problems)


def refuse_damaged(journals: Journals, what: str) -> None:
    """`what` must not go on while nobody can tell what a line needs."""
    for key, problem in journals.problems.items():
        raise Damaged(f"{what} stops, because {key} cannot be read: {problem}")
