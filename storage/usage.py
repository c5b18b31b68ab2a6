"""Usage: what takes the room. Bytes by kind, line and update, what sharing saves, and what nothing needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from storage.artifacts import ArtifactStore
from storage.keys import Listed
from storage.many import Report, silent
from storage.needs import Needs
from storage.refs import KINDS, Ref
from storage.roots import AnyJournal, read_journals
from storage.sweep import Wishes, mark


@dataclass(frozen=True)
class Share:
    """What some artifacts take. `bytes`: manifests and blobs, each once, as if nothing else were there. `alone`: of
    these, what nobody else uses, and what would be free without them."""

    artifacts: int
    bytes: int
    alone: int


@dataclass(frozen=True)
class Usage:
    """`objects` and `bytes`: everything in the store. `apart`: what its artifacts would take if each had its blobs for
    itself. `unneeded`: what a prune without a grace period would remove. `unread`: manifests that cannot be read."""

    objects: int
    bytes: int
    apart: int
    shared: int
    kinds: Mapping[str, Share]
    lines: Mapping[str, Share]
    series: Mapping[str, Share]
    updates: Mapping[Ref, Share]
    others: Mapping[str, int]
    unneeded_objects: int
    unneeded_bytes: int
    unread: tuple[Ref, ...] = ()


def usage(
    store: ArtifactStore, registered: frozenset[Ref] = frozenset(), report: Report = silent, *, now: float = 0.0
) -> Usage:
    """Read every manifest, no blob. Sizes are those of the objects that are there, not those that manifests claim."""
    needs = Needs(store)
    objects = {one.key: one for one in store.objects.listed("")}
    refs = sorted(store.refs())
    needs.closure(refs, report=report)
    there = [ref for ref in refs if ref in needs.known]
    count = _Count(needs, objects, there)
    journals = read_journals(store.objects)
    loose = mark(store, Wishes(grace=0, registered=registered), needs=needs, now=now)
    apart = sum(count.size({ref}) for ref in there)
    return Usage(
        objects=len(objects),
        bytes=sum(one.bytes for one in objects.values()),
        apart=apart,
        shared=apart - count.size(there),
        kinds={kind: count.share([ref for ref in there if ref.startswith(f"{kind}/")]) for kind in KINDS},
        lines={one.name: count.share(_of_journal(needs, one, objects)) for one in journals.lines},
        series={one.name: count.share(_of_journal(needs, one, objects)) for one in journals.series},
        updates={ref: count.share([ref]) for ref in there if ref.startswith("update/")},
        others=_others(objects),
        unneeded_objects=len(loose),
        unneeded_bytes=loose.bytes,
        unread=tuple(ref for ref in refs if ref not in needs.known),
    )


class _Count:
    """Bytes of artifacts, by the objects they are made of: their manifest, and the blobs it names."""

    def __init__(self, needs: Needs, objects: Mapping[str, Listed], refs: Iterable[Ref]) -> None:
        self._needs = needs
        self._sizes = {key: one.bytes for key, one in objects.items()}
        self._users: dict[str, int] = {}
        for ref in refs:
            for key in self._keys(ref):
                self._users[key] = self._users.get(key, 0) + 1

    def size(self, refs: Iterable[Ref]) -> int:
        return sum(self._sizes.get(key, 0) for key in {key for ref in refs for key in self._keys(ref)})

    def share(self, refs: Iterable[Ref]) -> Share:
        chosen = list(refs)
        users: dict[str, int] = {}
        for ref in chosen:
            for key in self._keys(ref):
                users[key] = users.get(key, 0) + 1
        total = sum(self._sizes.get(key, 0) for key in users)
        alone = sum(self._sizes.get(key, 0) for key, count in users.items() if count == self._users.get(key))
        return Share(len(chosen), total, alone)

    def _keys(self, ref: Ref) -> list[str]:
        return [ref, *(f"blob/{blob}" for blob in self._needs.of(ref).blobs)]


def _of_journal(needs: Needs, journal: AnyJournal, objects: Mapping[str, Listed]) -> set[Ref]:
    """What a line or series is made of, older states included as far as they are there."""
    found = needs.closure(journal.refs(states=False))
    found |= needs.closure(ref for ref in journal.states() if ref in objects)
    return {ref for ref in found if ref in needs.known}


def _others(objects: Mapping[str, Listed]) -> dict[str, int]:
    """Bytes of what is no artifact, by the first word of the key: journals, memos, pins, whatever else there is."""
    found: dict[str, int] = {}
    for key, one in objects.items():
        word = key.partition("/")[0]
        if word not in (*KINDS, "blob"):
            found[word] = found.get(word, 0) + one.bytes
    return found
