"""Lines: named streams of merges, kept as an append-only journal.

Entry n lives under `line/<name>/<n as eight digits>` and is created only if that key is free: creating it is the
commit of a merge, and of two concurrent merges exactly one wins. The head is the newest entry. Nothing is ever
changed or removed; going back is one more entry. Entries, unlike manifests, carry the time: they record events.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from storage.errors import Conflict, Damaged, InvalidInput, Missing
from storage.manifest import canonical
from storage.objects import ObjectStore
from storage.refs import CheckpointRef, StateRef, UpdateRef, short

_NAME = re.compile(r"[a-z0-9][a-z0-9_\-]*")


@dataclass(frozen=True)
class Entry:
    """One event of a line. `step` is the number of updates in `state`; `open` entries have neither."""

    number: int
    action: Literal["open", "fold", "rollback"]
    base: CheckpointRef
    merger: Mapping[str, Any]
    step: int = 0
    task: str = ""
    update: UpdateRef | None = None
    state: StateRef | None = None
    why: str = ""
    at: str = ""


class Line:
    """The journal of one line."""

    def __init__(self, objects: ObjectStore, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise InvalidInput(f"{name!r} is not a line name", remedy="Use lower-case letters, digits, - and _")
        self._objects = objects
        self.name = name

    @staticmethod
    def names(objects: ObjectStore) -> list[str]:
        return sorted({key.split("/")[1] for key in objects.list("line/")})

    def entries(self) -> Iterator[Entry]:
        """All entries, oldest first."""
        number = 0
        while (entry := self._read(number)) is not None:
            yield entry
            number += 1

    def head(self) -> Entry:
        """The newest entry."""
        keys = list(self._objects.list(f"line/{self.name}/"))
        newest = self._read(int(keys[-1].rpartition("/")[2])) if keys else None
        if newest is None:
            known = ", ".join(self.names(self._objects)) or "none yet"
            raise Missing(f"there is no line {self.name!r} in {self._objects.url}", remedy=f"Lines here: {known}")
        return newest

    def open(self, base: CheckpointRef, merger: Mapping[str, Any]) -> Entry:
        """Start the line, or find that it was started with the same base and merger."""
        first = Entry(0, "open", base, merger)
        if self._append(first):
            return first
        found = self._read(0)
        assert found is not None
        for what, wanted, has in (("base", base, found.base), ("merger", dict(merger), dict(found.merger))):
            if wanted != has:
                raise Conflict(
                    f"line {self.name!r} was opened with {what} {has}, not {wanted}",
                    remedy="A line keeps its base and merger for life: give the new one another name",
                )
        return found

    def fold(self, after: Entry, task: str, update: UpdateRef, state: StateRef) -> Entry:
        """Append the merge of `update` onto entry `after`. Conflict if another entry came first."""
        entry = Entry(after.number + 1, "fold", after.base, after.merger, after.step + 1, task, update, state)
        return self._commit(entry)

    def rollback(self, to: Entry, why: str) -> Entry:
        """Append an entry whose state is that of the older entry `to`."""
        number = self.head().number + 1
        return self._commit(Entry(number, "rollback", to.base, to.merger, to.step, to.task, to.update, to.state, why))

    def history(self) -> list[Entry]:
        """The folds that made the head's state, oldest first: the journal with rolled-back entries taken out."""
        kept: list[Entry] = []
        made: dict[StateRef | None, list[Entry]] = {None: kept}  # a rollback may also go back to what was rolled back
        for entry in self.entries():
            if entry.action == "fold":
                kept = [*kept, entry]
                made[entry.state] = kept
            elif entry.action == "rollback":
                kept = made[entry.state]
        return kept

    def _commit(self, entry: Entry) -> Entry:
        if not self._append(entry):
            found = self._read(entry.number)
            same = found is not None and (found.update, found.state) == (entry.update, entry.state)
            if not same:  # the same content is our own write whose answer was lost, or a twin run: both are success
                holds = short(found.update) if found and found.update else "another entry"
                raise Conflict(
                    f"line {self.name!r}: entry {entry.number} already holds {holds}",
                    remedy=f"Somebody else merged at the same time: see `deltaworks line log {self.name}`",
                )
        return entry

    def _append(self, entry: Entry) -> bool:
        stamped = {**asdict(entry), "merger": dict(entry.merger), "at": datetime.now(UTC).isoformat(timespec="seconds")}
        return self._objects.create(self._key(entry.number), canonical(stamped))

    def _read(self, number: int) -> Entry | None:
        try:
            data = self._objects.get(self._key(number))
        except Missing:
            return None
        try:
            return Entry(**json.loads(data))
        except (ValueError, TypeError) as error:
            raise Damaged(f"{self._key(number)} is not a journal entry: {error}") from error

    def _key(self, number: int) -> str:
        return f"line/{self.name}/{number:08d}"
