"""Verify: read everything an artifact is made of and hold it against the digests that name it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from storage.artifacts import ArtifactStore
from storage.cache import uncached
from storage.errors import Damaged, InvalidInput, Missing
from storage.lines import Line
from storage.refs import Ref, parse_ref, short

_READERS = 4  # blobs read at once, in pieces


@dataclass(frozen=True)
class Finding:
    """One damaged or missing object, and the artifacts and lines that need it."""

    object: str
    problem: str
    needed_by: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    artifacts: int
    blobs: int
    bytes: int
    findings: tuple[Finding, ...]


def verify(
    store: ArtifactStore, refs: Iterable[Ref], report: Callable[[int, int], None] = lambda done, total: None
) -> Verdict:
    """Check the manifests of `refs`, every artifact that their facts name, and every blob, each once. Reads all bytes.

    What facts name is needed as blobs are: a joint merger's state is the list of its updates.
    """
    store = ArtifactStore(uncached(store.objects))  # what is there, not what was
    needs = _Needs(store)
    artifacts = 0
    for ref in refs:
        artifacts += 1
        for one in (ref, *needs.named_in(ref)):
            needs.note(one, by=short(ref))
    findings = [Finding(ref, problem, tuple(sorted(by))) for ref, (problem, by) in needs.problems.items()]
    size = 0
    blobs = sorted(needs.blobs.items())
    with ThreadPoolExecutor(_READERS) as pool:
        waiting = [pool.submit(store.check_blob, blob, what=f"of {min(needed_by)}") for blob, needed_by in blobs]
        try:
            for done, ((blob, needed_by), checking) in enumerate(zip(blobs, waiting, strict=True)):
                try:
                    size += checking.result()
                except (Damaged, Missing) as error:
                    findings.append(Finding(f"blob/{blob}", str(error), tuple(sorted(needed_by))))
                report(done + 1, len(blobs))
        finally:
            pool.shutdown(cancel_futures=True)
    return Verdict(artifacts, len(needs.blobs), size, tuple(findings))


class _Needs:
    """Which artifacts need which blobs, and which manifests are not as they should be. Each manifest is read once."""

    def __init__(self, store: ArtifactStore) -> None:
        self.blobs: dict[str, set[str]] = {}
        self.problems: dict[Ref, tuple[str, set[str]]] = {}
        self._store = store
        self._manifests: dict[Ref, tuple[frozenset[str], tuple[Ref, ...]]] = {}

    def named_in(self, ref: Ref) -> tuple[Ref, ...]:
        """The artifacts that the facts of `ref` name."""
        found = self._read(ref)
        return found[1] if found else ()

    def note(self, ref: Ref, by: str) -> None:
        """`by` needs the artifact `ref`."""
        found = self._read(ref)
        if found is None:
            self.problems[ref][1].add(by)
            return
        for blob in found[0]:
            self.blobs.setdefault(blob, set()).add(by)

    def _read(self, ref: Ref) -> tuple[frozenset[str], tuple[Ref, ...]] | None:
        if ref in self.problems:
            return None
        if ref not in self._manifests:
            try:
                manifest = self._store.open(ref).manifest
            except (Damaged, Missing) as error:
                self.problems[ref] = (str(error), set())
                return None
            self._manifests[ref] = frozenset(manifest.blobs()), tuple(_refs_in(manifest.facts))
        return self._manifests[ref]


def _refs_in(value: Any) -> Iterator[Ref]:
    """Every ref among facts, in lists and mappings too."""
    if isinstance(value, str):
        with suppress(InvalidInput):
            yield parse_ref(value)
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _refs_in(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _refs_in(one)


def verify_lines(store: ArtifactStore) -> list[Finding]:
    """Journals that cannot be read, or whose entries name artifacts that are not there."""
    findings = []
    for name in Line.names(store.objects):
        line = Line(store.objects, name)
        try:
            for entry in line.entries():
                replayed = [ref for one in entry.folds for ref in (one.update, one.state)]
                for ref in dict.fromkeys([entry.base, entry.update, entry.state, *replayed]):
                    if ref and not store.has(ref):
                        what = f"line {name!r} entry {entry.number}"
                        findings.append(Finding(ref, f"{short(ref)} is not in the store", (what,)))
        except Damaged as error:
            findings.append(Finding(f"line/{name}", str(error), (f"line {name!r}",)))
    return findings
