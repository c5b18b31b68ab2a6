"""Needs: what an artifact cannot be used without. The one answer that verify, du, prune, copy and export share.

An artifact needs its blobs: those of its tensors, those that tensors are stated against, its assets. It needs the
artifacts that its facts name: a joint merger's state is the list of its updates. Updates and states need the
checkpoint that they are stated against, their base: without it nobody can make a model of them. The other inputs of a
lineage are where an artifact came from; it can do without them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from storage.artifacts import ArtifactStore
from storage.errors import Damaged, InvalidInput, Missing
from storage.manifest import Manifest
from storage.many import Report, each, silent
from storage.refs import Ref, parse_ref

_STATED_AGAINST = "base"  # the input of a lineage that is needed


@dataclass(frozen=True)
class Needed:
    """`blobs`: sha256 -> bytes, as far as the manifest says. `sources`: the rest of the lineage, not needed."""

    blobs: Mapping[str, int]
    refs: tuple[Ref, ...]
    sources: tuple[Ref, ...]
    tensor_blobs: frozenset[str] = frozenset()


def needed_by(ref: Ref, manifest: Manifest) -> Needed:
    """What `manifest`, of the artifact `ref`, says that it needs."""
    blobs = dict.fromkeys(manifest.blobs(), 0)
    blobs |= {record.blob: record.bytes for record in manifest.tensors}
    tensors = frozenset(record.blob for record in manifest.tensors)
    blobs |= {asset.blob: asset.bytes for asset in manifest.assets.values()}
    inputs = {role: one for role, text in manifest.lineage.inputs.items() for one in refs_in(text)}
    refs = dict.fromkeys(refs_in(manifest.facts))
    if ref.startswith(("update/", "state/")) and _STATED_AGAINST in inputs:
        refs[inputs[_STATED_AGAINST]] = None
    refs.pop(ref, None)
    return Needed(blobs, tuple(refs), tuple(one for one in inputs.values() if one not in refs), tensors)


def refs_in(value: Any) -> Iterator[Ref]:
    """Every ref among facts, in lists and mappings too, however deep."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            with suppress(InvalidInput):
                yield parse_ref(one)
        elif isinstance(one, Mapping):
            waiting.extend(reversed(list(one.values())))
        elif isinstance(one, (list, tuple)):
            waiting.extend(reversed(one))


class Needs:
    """The graph of who needs what. Every manifest is read once, and checked; what cannot be read is in `problems`."""

    def __init__(self, store: ArtifactStore) -> None:
        self.store = store
        self.known: dict[Ref, Needed] = {}
        self.problems: dict[Ref, Damaged | Missing] = {}
        self._lock = threading.Lock()

    def closure(self, refs: Iterable[Ref], *, sources: bool = False, report: Report = silent) -> set[Ref]:
        """`refs` and all that they need, those included that are damaged or missing; with `sources`, also where
        updates and checkpoints came from, which are not missed if they are gone."""
        seen = set(refs)
        layer = set(seen)
        while layer:
            self._read_all(layer, report)
            found = {ref for one in layer for ref in self.of(one).refs}
            if sources:
                found |= {ref for one in layer for ref in self.of(one).sources if not ref.startswith("state/")}
            layer = found - seen
            seen |= layer
        return seen

    def of(self, ref: Ref) -> Needed:
        """What `ref` needs; nothing, as far as one can tell, if it cannot be read."""
        return self.known.get(ref, _NOTHING)

    def forget(self, refs: Iterable[Ref]) -> None:
        """Read these again when they are asked for: they were repaired."""
        for ref in refs:
            self.known.pop(ref, None)
            self.problems.pop(ref, None)

    def blobs(self, refs: Iterable[Ref]) -> dict[str, int]:
        """The blobs that `refs` need themselves, with their bytes as far as a manifest says."""
        found: dict[str, int] = {}
        for ref in refs:
            for blob, size in self.of(ref).blobs.items():
                found[blob] = max(size, found.get(blob, 0))
        return found

    def ordered(self, refs: Iterable[Ref]) -> list[Ref]:
        """`refs` with what is needed before who needs it: the order to write manifests in, and to delete backwards.

        A store whose digests are right has no circles; in one that lies, some order comes out all the same.
        """
        chosen = set(refs)
        done: dict[Ref, None] = {}
        for start in sorted(chosen):
            path = [(start, iter(self.of(start).refs))]
            entered = {start}
            while path:
                ref, needs = path[-1]
                below = next((one for one in needs if one in chosen and one not in done and one not in entered), None)
                if below is None:
                    done[ref] = None
                    path.pop()
                else:
                    entered.add(below)
                    path.append((below, iter(self.of(below).refs)))
        return list(done)

    def users(self, names: Mapping[str, Iterable[Ref]]) -> Users:
        """Who needs what, the other way round; `names` are others who need refs: entries of lines, pins."""
        return Users(self, names)

    def _read_all(self, refs: set[Ref], report: Report) -> None:
        before = len(self.known) + len(self.problems)
        unread = sorted(refs - self.known.keys() - self.problems.keys())
        each(unread, self._read, report=lambda done, total: report(before + done, before + total))

    def _read(self, ref: Ref) -> None:
        try:
            found = needed_by(ref, self.store.open(ref).manifest)
        except (Damaged, Missing) as error:
            with self._lock:
                self.problems[ref] = error
            return
        with self._lock:
            self.known[ref] = found


class Users:
    """For every object, the artifacts, lines and pins that cannot do without it, directly or through others."""

    def __init__(self, needs: Needs, names: Mapping[str, Iterable[Ref]]) -> None:
        self._direct: dict[str, set[str]] = {}
        for ref, found in needs.known.items():
            for needed in (*found.refs, *(f"blob/{blob}" for blob in found.blobs)):
                self._direct.setdefault(needed, set()).add(ref)
        for name, refs in names.items():
            for ref in refs:
                self._direct.setdefault(ref, set()).add(name)

    def first(self, key: str) -> str:
        """One of those that name `key` themselves, always the same one."""
        return min(self._direct.get(key, ()), default="")

    def of(self, key: str) -> set[str]:
        return self.of_all([key]) - {key}

    def of_all(self, keys: Iterable[str]) -> set[str]:
        """Everybody who needs one of `keys`."""
        found: set[str] = set()
        waiting = list(keys)
        while waiting:
            more = self._direct.get(waiting.pop(), set()) - found
            found |= more
            waiting.extend(more)
        return found


_NOTHING = Needed({}, (), ())
