"""Queues: the checkpoints that wait to be merged into a line, kept as a journal of events (storage/journal.py).

    queue/<line>/<00000000, ...>

Event n+1 is created only if its number is free and only if it fits the events before it; whoever comes second reads on
and looks again. So a content is submitted once however many submit it at the same time, the order is the same for all,
and a state is never in doubt. Nobody holds a lock: a run that dies leaves its submission `running`, and the next run
takes it up. What is in a line is decided by the line's own journal; the queue only repeats it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from storage.errors import Damaged
from storage.events import Action, Book, Event, Submission, check_event, decode_event, refuse_move
from storage.journal import Journal
from storage.many import each
from storage.objects import ObjectStore
from storage.refs import CheckpointRef
from storage.trust import printable

FOLDER = "queue"
_WHY = 1000  # characters of a reason


class Queue:
    """The queue of one line."""

    def __init__(self, objects: ObjectStore, line: str) -> None:
        self._journal = Journal(objects, FOLDER, line)
        self._book = Book()
        self.line = line

    @staticmethod
    def names(objects: ObjectStore) -> list[str]:
        return Journal.names(objects, FOLDER)

    def submissions(self) -> list[Submission]:
        """Every submission that ever came, in the order of merging."""
        return self._read().ordered()

    def next(self) -> Submission | None:
        """The first one that is still to be merged: pending, or left by a run that did not end it."""
        return next((one for one in self.submissions() if one.state in ("pending", "running")), None)

    @property
    def count(self) -> int:
        """How many events were read."""
        return self._book.count

    def find(self, content: str) -> Submission | None:
        return self._read().known.get(content)

    def policy(self) -> Mapping[str, Any]:
        """How submissions become updates; empty if nobody has said."""
        return self._read().policy

    def set_policy(self, policy: Mapping[str, Any]) -> None:
        """From now on, `policy`. What is in the line already stays as it is."""
        self._append("policy", lambda book: None if dict(book.policy) == dict(policy) else {"policy": dict(policy)})

    def keep_policy(self, policy: Mapping[str, Any]) -> Mapping[str, Any]:
        """`policy`, unless there is one: then that one."""
        self._append("policy", lambda book: None if book.policy else {"policy": dict(policy)})
        return self._book.policy

    def submit(
        self, content: str, reference: str, base: CheckpointRef, task: str, weight: float = 1.0
    ) -> tuple[Submission, bool]:
        """Put what has the digest `content` at the end of the queue. False if it came before, whatever became of it."""
        values = {"content": content, "reference": reference, "base": base, "task": task, "weight": weight}
        is_new = self._append("submit", lambda book: None if content in book.known else values)
        return self._book.known[content], is_new

    def announce(self, content: str) -> bool:
        """Note that others were told of a submission. False if they had been."""
        return self._append("announce", self._unless("announce", content))

    def start(self, content: str, by: str = "") -> Submission:
        """Note that `by` works on it. Conflict unless it is pending or running."""
        self._move("start", content, {"by": by})
        return self._book.known[content]

    def release(self, content: str, why: str) -> bool:
        """Give it back, to be tried again: nothing was wrong with it. False if it is no longer running."""
        return self._append("release", self._unless("release", content, {"why": _short(why)}))

    def merge(self, content: str, entry: int, kind: str = "", why: str = "") -> bool:
        """Note that entry `entry` of the line holds it, and what the line's gate said. False if that was known."""
        said = {"kind": kind, "why": _short(why)}
        return self._append("merge", self._unless("merge", content, {"entry": entry, **said}))

    def quarantine(self, content: str, kind: str, why: str) -> bool:
        """Put it aside: it can never be merged as it is. False if it is merged, or put aside already."""
        return self._append("quarantine", self._unless("quarantine", content, {"kind": kind, "why": _short(why)}))

    def requeue(self, content: str, why: str = "", reference: str = "") -> None:
        """Put what was set aside at the end of the queue, as if it came now. Conflict if it was not set aside."""
        self._move("requeue", content, {"why": _short(why), "reference": reference})

    def discard(self, content: str, why: str = "") -> None:
        """Give it up for good; a requeue brings it back. Conflict if it is merged, or given up already."""
        self._move("discard", content, {"why": _short(why)})

    def _unless(
        self, action: Action, content: str, values: Mapping[str, Any] | None = None
    ) -> Callable[[Book], dict[str, Any] | None]:
        """Values of an event that is left out where it no longer applies."""
        return lambda book: {"content": content, **(values or {})} if book.allows(action, content) else None

    def _move(self, action: Action, content: str, values: Mapping[str, Any]) -> None:
        if not self._append(action, self._unless(action, content, values)):
            raise refuse_move(self.line, action, content, self._book.known.get(content))

    def _append(self, action: Action, values: Callable[[Book], dict[str, Any] | None]) -> bool:
        """Add an event with what `values` makes of all events so far; None: there is nothing to add.

        Whoever is second to a number looks again, at one event more. That ends, because a lost race is an event of
        somebody else.
        """
        while True:
            book = self._read()
            found = values(book)
            if found is None:
                return False
            event = replace(Event(book.count, action, **found), at=datetime.now(UTC).isoformat(timespec="seconds"))
            check_event(event, f"{action} in the queue of line {self.line!r}")
            if self._journal.create(event.number, event.as_json()):
                book.add(event)
                return True

    def _read(self) -> Book:
        """The book, with the events that came since it was last read."""
        book = self._book
        if not book.count and (newest := self._journal.newest()) is not None:
            events = each(range(newest + 1), self._event)
            for number, event in enumerate(events):
                if event is None:
                    raise Damaged(f"{self._journal.key(number)} is missing, but later events are there")
                book.add(event)
        while (event := self._event(book.count)) is not None:
            book.add(event)
        return book

    def _event(self, number: int) -> Event | None:
        data = self._journal.read(number)
        return None if data is None else decode_event(data, number, self._journal.key(number))


def _short(why: str) -> str:
    return printable(" ".join(why.split()))[:_WHY]
