"""Transfer: artifacts, or everything, from one store into another. Only what is missing, and only what is proven.

Every object is held against the digest that names it before it is written. Blobs go first, then manifests, each after
those it needs, the journals last: a transfer that is killed leaves nothing that dangles, and the same one again goes on
where it stopped. Nothing is ever replaced, but for an object whose size is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from storage.artifacts import ArtifactStore
from storage.errors import Damaged, Missing
from storage.histories import append_entries, check_same_history, read_entries
from storage.manifest import digest
from storage.many import Report, Room, each, silent
from storage.measured import PREFIX as MEASURED
from storage.measured import model_of
from storage.needs import Needs
from storage.pins import PREFIX
from storage.refs import Ref, short
from storage.roots import read_journals, refuse_damaged


@dataclass(frozen=True)
class Sent:
    """`objects` and `bytes` that were written; `held`: objects that were there. `entries`: of journals. `left_out`:
    what could not be sent, and why."""

    objects: int = 0
    bytes: int = 0
    held: int = 0
    entries: int = 0
    left_out: tuple[tuple[str, str], ...] = ()


def copy(refs: Iterable[Ref], source: ArtifactStore, target: ArtifactStore, report: Report = silent) -> Sent:
    """`refs` with everything they need. Damaged or Missing at the first thing that is not as named; what was written
    before that is whole."""
    needs = Needs(source)
    closure = needs.closure(refs)
    problem = next((needs.problems[ref] for ref in sorted(closure) if ref in needs.problems), None)
    if problem is not None:
        raise problem
    sent, failed = _send(needs, closure, source, target, report)
    if failed:
        key = min(failed)
        raise Damaged(f"{len(failed)} objects could not be copied, and nothing that needs them was. {failed[key]}")
    return sent


def mirror(source: ArtifactStore, target: ArtifactStore, report: Report = silent) -> Sent:
    """All artifacts, pins, memos and journals. Conflict, before anything is written, if a journal has another history
    in `target`. What is damaged is left out, with all that needs it."""
    found = read_journals(source.objects)
    refuse_damaged(found, "the mirror")
    journals = [(one, read_entries(source.objects, one.path, len(one))) for one in found.all]
    for journal, raw in journals:
        check_same_history(target.objects, journal.path, raw)
    needs = Needs(source)
    refs = set(source.refs())
    closure = needs.closure(refs)
    sent, failed = _send(needs, closure, source, target, report)
    failed |= {ref: str(problem) for ref, problem in needs.problems.items()}
    bad = set(failed) | needs.users({}).of_all(failed)
    extra = _notes(source, target, bad)
    entries = 0
    for journal, raw in journals:
        lacking = sorted(journal.refs(states=False) & bad)
        if lacking:
            failed[journal.path] = f"it needs {short(lacking[0])}, which was left out"
        else:
            entries += append_entries(target.objects, journal.path, raw)
    return replace(sent, objects=sent.objects + extra, entries=entries, left_out=tuple(sorted(failed.items())))


def _send(
    needs: Needs, refs: set[Ref], source: ArtifactStore, target: ArtifactStore, report: Report
) -> tuple[Sent, dict[str, str]]:
    """Blobs, then manifests; and what failed. What needs something that failed is not sent, and is not a failure."""
    readable = {ref for ref in refs if ref in needs.known}
    blobs = {f"blob/{blob}": size for blob, size in needs.blobs(readable).items()}
    sizes = _sizes(target, [*blobs, *readable])
    todo = sorted(key for key, size in blobs.items() if sizes.get(key) is None or size not in (0, sizes[key]))
    manifests = [ref for ref in needs.ordered(readable) if ref not in sizes]
    total, failed, written = len(todo) + len(manifests), {}, 0

    def send(key: str) -> int | str:
        try:
            return put_checked(target, key, source.objects.get(key))
        except (Damaged, Missing) as error:
            return str(error)

    found = each(todo, send, size=lambda key: blobs[key], report=lambda done, _: report(done, total), room=Room())
    for key, outcome in zip(todo, found, strict=True):
        if isinstance(outcome, str):
            failed[key] = outcome
        else:
            written += outcome
    bad = {*failed, *needs.problems}
    bad |= needs.users({}).of_all(bad)
    good = [ref for ref in manifests if ref not in bad]
    for number, ref in enumerate(good, 1):  # in order: a manifest must not be there before what it needs
        written += put_checked(target, ref, source.objects.get(ref))
        report(len(todo) + number, total)
    sent = len(todo) - len(failed) + len(good)
    return Sent(sent, written, len(blobs) + len(readable) - total), failed


def put_checked(target: ArtifactStore, key: str, data: bytes) -> int:
    """Write an object under the digest that it has; Damaged if its name is another."""
    if digest(data) != key.partition("/")[2]:
        raise Damaged(f"{key} is damaged: its {len(data):,} bytes have another sha256 than its name says")
    target.objects.put(key, data)
    return len(data)


def _sizes(target: ArtifactStore, keys: Sequence[str]) -> dict[str, int]:
    """Sizes of those keys that are there: from one listing where many are asked for, one by one otherwise."""
    if len(keys) > 500:
        wanted = set(keys)
        return {one.key: one.bytes for one in target.objects.listed("") if one.key in wanted}
    found = zip(keys, each(keys, target.objects.size), strict=True)
    return {key: size for key, size in found if size is not None}


def _notes(source: ArtifactStore, target: ArtifactStore, bad: set[str]) -> int:
    """Pins, memos, and what was measured. They prove nothing, so that what the target has already stays."""
    prefixes = (PREFIX, "memo/", MEASURED)
    there = {key for prefix in prefixes for key in target.objects.list(prefix)}
    keys = [key for prefix in prefixes for key in source.objects.list(prefix) if key not in there]

    def send(key: str) -> int:
        named = (
            key.removeprefix(PREFIX) if key.startswith(PREFIX) else model_of(key) if key.startswith(MEASURED) else ""
        )
        if named is None or named in bad:
            return 0
        try:
            return int(target.objects.create(key, source.objects.get(key)))
        except Missing:
            return 0  # unpinned, or pruned, in this moment

    return sum(each(keys, send))
