"""Verify: read everything an artifact is made of and hold it against the digests that name it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from storage.artifacts import ArtifactStore
from storage.errors import Damaged, Missing
from storage.lines import Line
from storage.refs import Ref, short


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
    """Check the manifests of `refs` and every blob they name, each blob once. Reads all bytes."""
    users: dict[str, list[str]] = {}
    findings: list[Finding] = []
    artifacts = 0
    for ref in refs:
        artifacts += 1
        try:
            for blob in store.open(ref).manifest.blobs():
                users.setdefault(blob, []).append(short(ref))
        except (Damaged, Missing) as error:
            findings.append(Finding(ref, str(error), (short(ref),)))
    size = 0
    for done, (blob, needed_by) in enumerate(sorted(users.items())):
        try:
            size += len(store.read_blob(blob, what=f"of {needed_by[0]}"))
        except (Damaged, Missing) as error:
            findings.append(Finding(f"blob/{blob}", str(error), tuple(sorted(needed_by))))
        report(done + 1, len(users))
    return Verdict(artifacts, len(users), size, tuple(findings))


def verify_lines(store: ArtifactStore) -> list[Finding]:
    """Journals that cannot be read, or whose entries name artifacts that are not there."""
    findings = []
    for name in Line.names(store.objects):
        line = Line(store.objects, name)
        try:
            for entry in line.entries():
                for ref in (entry.base, entry.update, entry.state):
                    if ref and not store.has(ref):
                        what = f"line {name!r} entry {entry.number}"
                        findings.append(Finding(ref, f"{short(ref)} is not in the store", (what,)))
        except Damaged as error:
            findings.append(Finding(f"line/{name}", str(error), (f"line {name!r}",)))
    return findings
