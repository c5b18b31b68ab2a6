"""Sweep: what nobody wants any more is found, and removed. Mark and sweep, for a store that others write to meanwhile.

Wanted are: every base and update that an entry of a line names, what these updates came from, and the states; every
version of a series; what registered models name; pins; all scores, which are results and small; and whatever any of
these needs.

Others may be at work. Nothing younger than the grace period is removed, nor what it needs. A blob that is written again
is written anew if it is older than a day, and a step that is found done renews its memo, so that what is in use is
young (`ArtifactStore.write_blob`, flows/policy.py). Every object is looked at again right before it goes. Manifests go
before blobs, and what is wanted is worked out again between the two: a sweep that is killed leaves blobs that nothing
names, never a manifest without its blobs. What is left is a writer that lists an old blob of another artifact without
writing it while the sweep runs, or writes it in the instant between that last look and the removal. So the sweep ends
with a look at the manifests that came meanwhile, says which of them it has harmed, and lets their steps be done again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from storage.artifacts import ArtifactStore
from storage.errors import Damaged, InvalidInput, Missing
from storage.keys import Listed
from storage.many import Report, each, silent
from storage.measured import PREFIX as MEASURED
from storage.measured import model_of
from storage.needs import Needs
from storage.pins import pins
from storage.refs import KINDS, Ref, parse_ref, short
from storage.roots import Journals, read_journals, refuse_damaged, updates_of

GRACE = 7 * 24 * 3600.0
_BATCH = 2000  # blobs that are removed between two looks at what others wrote
_FIRST = ("scores", "state", "update", "checkpoint")  # none needs one of a kind before it


@dataclass(frozen=True)
class Wishes:
    """What shall be kept beside what must be.

    grace:      seconds for which whatever was written stays
    states:     of lines: those of older entries too; without them a rollback folds them again
    sources:    what the updates of lines came from: tuned checkpoints, updates before they were compressed. A chain
                that goes on without them trains again
    registered: the refs that registered models name
    """

    grace: float = GRACE
    states: bool = True
    sources: bool = True
    registered: frozenset[Ref] = frozenset()


@dataclass(frozen=True)
class Condemned:
    """What would go. `memos`: with the saves of trainings that were given up. `young`: objects that stay only because
    of the grace period."""

    memos: tuple[Listed, ...]
    manifests: tuple[Listed, ...]
    blobs: tuple[Listed, ...]
    young: tuple[Listed, ...] = ()
    missing: tuple[Ref, ...] = ()  # wanted, but not there

    @property
    def bytes(self) -> int:
        return sum(one.bytes for one in (*self.memos, *self.manifests, *self.blobs))

    def __len__(self) -> int:
        return len(self.memos) + len(self.manifests) + len(self.blobs)


@dataclass(frozen=True)
class Swept:
    """What went. `harmed`: artifacts that were written meanwhile and lack a blob that went."""

    objects: int
    bytes: int
    harmed: tuple[Ref, ...] = ()


@dataclass
class _Store:
    """What a store holds at one moment, by what it is. The objects are listed before the journals are read: what an
    entry names that came in between is then not among what could be condemned."""

    manifests: dict[Ref, Listed] = field(default_factory=dict)
    blobs: dict[str, Listed] = field(default_factory=dict)
    memos: dict[str, Listed] = field(default_factory=dict)
    saves: list[Listed] = field(default_factory=list)
    measured: list[Listed] = field(default_factory=list)
    remembered: dict[str, Ref | None] = field(default_factory=dict)
    journals: Journals = field(default_factory=lambda: Journals(()))

    @classmethod
    def read(cls, store: ArtifactStore) -> _Store:
        found = cls()
        for one in store.objects.listed(""):
            kind = one.key.partition("/")[0]
            if kind in KINDS:
                try:
                    found.manifests[parse_ref(one.key)] = one
                except InvalidInput:
                    continue  # a stray file: not ours to judge
            elif kind == "blob":
                found.blobs[one.key.partition("/")[2]] = one
            elif kind == "memo":
                found.memos[one.key] = one
            elif kind == "training":
                found.saves.append(one)
            elif one.key.startswith(MEASURED):
                found.measured.append(one)
        keys = list(found.memos)
        found.remembered = dict(zip(keys, each(keys, lambda key: _remembered(store, key)), strict=True))
        found.journals = read_journals(store.objects)
        refuse_damaged(found.journals, "the prune")
        return found


def mark(
    store: ArtifactStore, wishes: Wishes, report: Report = silent, *, needs: Needs | None = None, now: float = 0.0
) -> Condemned:
    """What nobody wants. Nothing is changed. Damaged if something that is wanted cannot be read."""
    since = (now or time.time()) - wishes.grace
    graph = needs or Needs(store)
    graph.problems.clear()  # what was not there at the last look may have come
    there = _Store.read(store)
    roots = _wanted(there, store, wishes)
    firm = graph.closure(roots, report=report)
    if wishes.sources:
        updates = {ref for one in there.journals.lines for entry in one.entries for ref in updates_of(entry)}
        firm |= graph.closure(updates, sources=True, report=report)
    kept = firm | graph.closure(_fresh(there, since), report=report)
    _refuse_unreadable(graph, graph.closure(roots))
    needed, firmly = graph.blobs(kept), graph.blobs(firm)
    gone = {ref for ref in there.manifests if ref not in kept}
    stale = [
        one
        for key, one in there.memos.items()
        if (gave := there.remembered[key]) is None or gave in gone or gave not in there.manifests
    ]
    stale += there.saves  # of trainings that were given up: one that is under way writes a new save in time
    orphans = [one for one in there.measured if (model := model_of(one.key)) not in there.manifests or model in gone]
    stale += orphans
    loose = [one for blob, one in there.blobs.items() if blob not in needed]
    return Condemned(
        tuple(one for one in stale if one.modified < since),
        tuple(there.manifests[ref] for ref in sorted(gone)),
        tuple(one for one in loose if one.modified < since),
        (
            *(one for ref, one in there.manifests.items() if ref in kept and ref not in firm),
            *(one for blob, one in there.blobs.items() if blob in needed and blob not in firmly),
            *(one for one in (*loose, *there.saves, *orphans) if one.modified >= since),
        ),
        tuple(sorted(ref for ref in roots if ref not in there.manifests)),
    )


def sweep(
    store: ArtifactStore, wishes: Wishes, report: Report = silent, *, needs: Needs | None = None, now: float = 0.0
) -> Swept:
    """Remove what nobody wants: memos, then manifests, then the blobs that no manifest names any more."""
    graph = needs or Needs(store)
    first = mark(store, wishes, needs=graph, now=now)
    total, done = len(first), 0

    def remove(some: Sequence[Listed]) -> list[Listed]:
        nonlocal done
        before = done
        gone = each(some, lambda one: _remove(store, one), report=lambda count, _: report(before + count, total))
        done += len(some)
        return [one for one, went in zip(some, gone, strict=True) if went]

    swept = remove(first.memos)
    for kind in _FIRST:
        swept += remove([one for one in first.manifests if one.key.startswith(f"{kind}/")])
    second = mark(store, wishes, needs=graph, now=now)  # what is wanted now, by whoever came meanwhile
    known = set(store.refs())
    for start in range(0, len(second.blobs), _BATCH):
        spared = graph.blobs(_newcomers(store, graph, known))
        going = [one for one in second.blobs[start : start + _BATCH] if one.key.partition("/")[2] not in spared]
        swept += remove(going)
    harmed = _harmed(store, graph, _newcomers(store, graph, known), {one.key for one in swept})
    return Swept(len(swept), sum(one.bytes for one in swept), harmed)


def _remove(store: ArtifactStore, listed: Listed) -> bool:
    """Remove an object, unless somebody wrote it again since it was listed."""
    now = store.objects.stat(listed.key)
    if now is None or now.modified > listed.modified + 1:  # S3 tells whole seconds in one answer, less in another
        return False
    store.objects.delete(listed.key)
    return True


def _wanted(there: _Store, store: ArtifactStore, wishes: Wishes) -> set[Ref]:
    """The roots: what is kept for its own sake."""
    found: set[Ref] = set(wishes.registered & there.manifests.keys())  # they may be of other stores, too
    for journal in there.journals.all:
        found |= journal.refs(states=False)
        if wishes.states:
            found |= journal.states() & there.manifests.keys()
    found |= {one.ref for one in pins(store)}
    return found | {ref for ref in there.manifests if ref.startswith("scores/")}


def _fresh(there: _Store, since: float) -> set[Ref]:
    """What is kept because it was written or remembered lately: by somebody who may be at work."""
    found = {ref for ref, one in there.manifests.items() if one.modified >= since}
    fresh = {one for key, one in there.remembered.items() if one and there.memos[key].modified >= since}
    return found | (fresh & there.manifests.keys())


def _refuse_unreadable(graph: Needs, wanted: set[Ref]) -> None:
    for ref in sorted(wanted & graph.problems.keys()):
        if isinstance(graph.problems[ref], Damaged):
            raise Damaged(
                f"the prune stops, because nobody can tell what {short(ref)} needs: {graph.problems[ref]}",
                remedy="`deltaworks verify --all --repair-from URL` takes it from a copy of the store",
            )


def _remembered(store: ArtifactStore, key: str) -> Ref | None:
    try:
        return parse_ref(json.loads(store.objects.get(key))["ref"])
    except (ValueError, KeyError, TypeError, RecursionError, Missing):
        return None


def _newcomers(store: ArtifactStore, graph: Needs, known: set[Ref]) -> set[Ref]:
    """Manifests that were written since `known` was listed, with what they need."""
    return graph.closure(ref for ref in store.refs() if ref not in known)


def _harmed(store: ArtifactStore, graph: Needs, newcomers: Iterable[Ref], lost: set[str]) -> tuple[Ref, ...]:
    """Of the newcomers, those that lack what was removed. Their memos go, so that the next run makes them again."""
    found = []
    for ref in newcomers:
        needed = graph.of(ref)
        names = {*needed.refs, *(f"blob/{blob}" for blob in needed.blobs)} & lost
        if any(store.objects.size(name) is None for name in names):
            found.append(ref)
    if found:
        for key in store.objects.list("memo/"):
            if _remembered(store, key) in found:
                store.objects.delete(key)
    return tuple(sorted(found))
