"""Series: the checkpoints of one training in the order they were published, as a journal (storage/journal.py).

A version is stored as what changed since the one before it, or whole: an anchor. How the tensors of either are written
is tasks/snapshot.py's business. Of two who publish at the same time one wins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from storage.errors import Conflict, Damaged
from storage.journal import Journal
from storage.objects import ObjectStore
from storage.refs import CheckpointRef, short
from storage.trust import check_version

_FOLDER = "series"


@dataclass(frozen=True)
class Version:
    """One checkpoint of a series. `since_anchor`: how many versions lie after the last whole one; 0 for an anchor."""

    number: int
    checkpoint: CheckpointRef
    since_anchor: int
    at: str = ""


class Series:
    """The journal of one series."""

    def __init__(self, objects: ObjectStore, name: str) -> None:
        self._journal = Journal(objects, _FOLDER, name)
        self.name = name

    @staticmethod
    def names(objects: ObjectStore) -> list[str]:
        return Journal.names(objects, _FOLDER)

    def versions(self) -> Iterator[Version]:
        """All versions, oldest first."""
        number = 0
        while (found := self._read(number)) is not None:
            yield found
            number += 1

    def newest(self) -> Version | None:
        """The version that was published last; None if there is none yet."""
        number = self._journal.newest()
        return None if number is None else self._read(number)

    def head(self) -> Version:
        """The newest version. Missing if there is no such series."""
        found = self.newest()
        if found is None:
            raise self._journal.absent()
        return found

    def append(self, after: Version | None, checkpoint: CheckpointRef, *, anchor: bool) -> Version:
        """Publish `checkpoint` as the version after `after`. Conflict if another one came first."""
        number = 0 if after is None else after.number + 1
        since = 0 if anchor or after is None else after.since_anchor + 1
        version = Version(number, checkpoint, since, datetime.now(UTC).isoformat(timespec="seconds"))
        if self._journal.create(number, asdict(version)):
            return version
        found = self._read(number)
        if found is None or replace(found, at=version.at) != version:
            holds = short(found.checkpoint) if found else "nothing readable"
            raise Conflict(
                f"series {self.name!r}: version {number} already holds {holds}",
                remedy="Somebody else published at the same time: look at the new head, and publish after that",
            )
        return found  # our own write whose answer was lost, or a twin's of the same checkpoint

    def _read(self, number: int) -> Version | None:
        data = self._journal.read(number)
        return None if data is None else decode_version(data, number, self._journal.key(number))


def decode_version(data: bytes, number: int, source: str) -> Version:
    """The version in these bytes, which `source` holds."""
    try:
        found = Version(**json.loads(data))
        check_version(found, number, source)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(f"{source} is not a version of a series: {error}") from error
    return found
