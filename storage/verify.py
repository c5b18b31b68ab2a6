"""Verify: read everything an artifact is made of, hold it against the digests that name it, and repair it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from storage.artifacts import ArtifactStore
from storage.cache import uncached
from storage.checked import Checked
from storage.errors import Damaged, Missing
from storage.manifest import digest
from storage.many import Report, each, silent
from storage.needs import Needs, Users
from storage.refs import KINDS, Ref, parse_ref, short
from storage.roots import AnyJournal, read_journals


@dataclass(frozen=True)
class Finding:
    """One damaged or missing object, and the artifacts and lines that need it."""

    object: str
    problem: str
    needed_by: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """`pruned`: states that older entries of lines name and that are gone. They can be folded again from the updates.
    `resumed`: blobs that were not read, because an interrupted verify had found them good."""

    artifacts: int
    blobs: int
    bytes: int
    findings: tuple[Finding, ...]
    pruned: tuple[Finding, ...] = ()
    resumed: int = 0
    repaired: tuple[str, ...] = ()


def verify(
    store: ArtifactStore,
    refs: Iterable[Ref],
    report: Report = silent,
    *,
    journals: Sequence[AnyJournal] = (),
    checked: Checked | None = None,
    needs: Needs | None = None,
) -> Verdict:
    """Check `refs`, what the entries of `journals` name, and all that these need: manifests and blobs, each once.

    `checked` holds what was found good before, and is told what is found good now.
    """
    store = ArtifactStore(uncached(store.objects))  # what is there, not what was
    needs, good = needs or Needs(store), checked or Checked()
    before = good.found_before
    named = {name: refs for one in journals for name, refs in one.named().items()}
    wanted = {*refs, *(ref for some in named.values() for ref in some)}
    there, pruned = _older_states(store, journals, wanted)
    closure = needs.closure(wanted | there)
    users = needs.users(named)
    blobs = needs.blobs(closure - needs.problems.keys())
    todo = sorted(blob for blob in blobs if blob not in good)

    def check(blob: str) -> Finding | None:
        try:
            good.add(blob, store.check_blob(blob, what=f"of {_shown(users.first(f'blob/{blob}'))}"))
        except (Damaged, Missing) as error:
            return _finding(f"blob/{blob}", str(error), users)
        return None

    done = len(blobs) - len(todo)
    found = each(todo, check, size=lambda blob: blobs[blob], report=lambda some, _: report(done + some, len(blobs)))
    bad = [_finding(ref, str(needs.problems[ref]), users) for ref in sorted(closure & needs.problems.keys())]
    bad += [one for one in found if one is not None]
    size = sum(good.blobs[blob] for blob in blobs if blob in good)
    return Verdict(len(closure), len(blobs), size, tuple(bad), tuple(pruned), min(before, done))


def verify_and_repair(
    store: ArtifactStore,
    refs: Iterable[Ref],
    source: ArtifactStore,
    report: Report = silent,
    *,
    journals: Sequence[AnyJournal] = (),
    checked: Checked | None = None,
) -> Verdict:
    """Verify, fetch from `source` what is damaged or missing, and verify what that brought to light, until nothing
    more can be repaired. The findings are what is left; their problems say why."""
    store = ArtifactStore(uncached(store.objects))
    needs, good, todo = Needs(store), checked or Checked(), list(refs)
    repaired: list[str] = []
    while True:
        verdict = verify(store, todo, report, journals=journals, checked=good, needs=needs)
        failed: dict[str, str] = {}
        for one in verdict.findings:
            problem = _repair(one.object, store, source)
            if problem is None:
                repaired.append(one.object)
            else:
                failed[one.object] = problem
        needs.forget(parse_ref(one) for one in repaired if not one.startswith("blob/"))
        if len(failed) == len(verdict.findings):
            left = [replace(one, problem=f"{one.problem}. {failed[one.object]}") for one in verdict.findings]
            return replace(verdict, findings=tuple(left), repaired=tuple(repaired))


def _repair(key: str, store: ArtifactStore, source: ArtifactStore) -> str | None:
    """Put the bytes that `key` names into the store; if there are none, say why."""
    try:
        data = source.objects.get(key)
    except Missing:
        return f"Not repaired: it is not in {source.url} either"
    if digest(data) != key.partition("/")[2]:
        return f"Not repaired: it is damaged in {source.url} too"
    store.objects.put(key, data)
    return None


def verify_lines(store: ArtifactStore) -> list[Finding]:
    """Journals that cannot be read, or whose entries name artifacts that are not there and cannot be made again."""
    journals = read_journals(store.objects)
    missing: dict[Ref, list[str]] = {}
    for journal in journals.all:
        for name, refs in journal.named().items():
            for ref in dict.fromkeys(refs):
                if ref in missing or not store.has(ref):
                    missing.setdefault(ref, []).append(name)
    gone = [Finding(ref, f"{short(ref)} is not in the store", tuple(by)) for ref, by in missing.items()]
    return [*damaged_journals(journals.problems), *gone]


def damaged_journals(problems: Mapping[str, str]) -> tuple[Finding, ...]:
    """Findings about journals. They have no digest, so that no other store can prove what they were."""
    return tuple(Finding(key, problem, (_line_of(key),)) for key, problem in problems.items())


def _older_states(
    store: ArtifactStore, journals: Sequence[AnyJournal], wanted: set[Ref]
) -> tuple[set[Ref], list[Finding]]:
    """States that only older entries name: those that are there, and those that are not."""
    by: dict[Ref, set[str]] = {}
    for journal in journals:
        for ref in journal.states() - wanted:
            by.setdefault(ref, set()).add(f"line {journal.name!r}")
    refs = sorted(by)
    held = dict(zip(refs, each(refs, store.has), strict=True))
    why = "is not in the store; it can be folded again from the updates"
    gone = [Finding(ref, f"{short(ref)} {why}", tuple(sorted(by[ref]))) for ref in refs if not held[ref]]
    return {ref for ref in refs if held[ref]}, gone


def _finding(key: str, problem: str, users: Users) -> Finding:
    found = sorted(_shown(one) for one in users.of(key))
    return Finding(key, problem, tuple(found or [_shown(key)]))


def _shown(user: str) -> str:
    return short(user) if user.partition("/")[0] in KINDS else user


def _line_of(key: str) -> str:
    folder, _, name = key.partition("/")
    return f"{folder} {name!r}"
