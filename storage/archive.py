"""Archive: a line with all it needs in one tar, for places without a network.

    deltaworks.json      the format, the line's name, and every object that follows: key, bytes, sha256
    blob/<sha256>        then the blobs,
    update/<sha256>      the manifests, each after those it needs,
    line/<name>/<n>      and the journal

A plain tar of plain files, which any tar unpacks into the layout of a store. The same line gives the same bytes. What
is read may come from anywhere: only what was announced is taken, under names that the format knows, with the digest
that names it. Blobs are written as they come, because nobody sees a blob that no manifest names. Everything else waits
until the last byte has been read and nothing is lacking.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from storage.artifacts import ArtifactStore
from storage.errors import Damaged, InvalidInput
from storage.files import whole_file
from storage.histories import append_entries, check_same_history
from storage.lines import Line, decode_entry, history_of
from storage.manifest import canonical, decode_manifest, digest
from storage.many import Report, silent
from storage.needs import Needs, needed_by
from storage.refs import KINDS, Ref, parse_ref, short
from storage.roots import LineJournal, read_journal
from storage.tar import end, members_of, read_exactly, write_member
from storage.transfer import put_checked

FORMAT = "deltaworks-line/1"
_INDEX = "deltaworks.json"
_MOST = 1 << 30  # bytes of index, manifests and entries together: they wait in memory
_KEY = re.compile(rf"(?:blob|{'|'.join(KINDS)})/[0-9a-f]{{64}}|line/[a-z0-9][a-z0-9_\-]*/[0-9]{{8}}")
_REMEDY = "Export the line again, and carry the file over again; nothing of this one became visible"


@dataclass(frozen=True)
class Carried:
    """What an archive holds: how many of each, and the bytes of all objects. `entries`: of the journal; of an import,
    those that are new."""

    line: str
    blobs: int
    artifacts: int
    entries: int
    bytes: int


def export_line(
    store: ArtifactStore, name: str, file: Path, report: Report = silent, *, states: bool = False
) -> Carried:
    """Write the line to `file`, which must not exist: base, updates, the head's state and, with `states`, those older
    ones that are there. The file gets its name when it is whole."""
    journal = read_journal(store.objects, name)
    needs = Needs(store)
    older = {ref for ref in journal.states() if store.has(ref)} if states else set()
    closure = needs.closure(journal.refs(states=False) | older)
    problem = next((needs.problems[ref] for ref in sorted(closure) if ref in needs.problems), None)
    if problem is not None:
        raise problem
    blobs = sorted(f"blob/{blob}" for blob in needs.blobs(closure))
    entries = [f"line/{name}/{entry.number:08d}" for entry in journal.entries]
    small = {key: store.objects.get(key) for key in (*needs.ordered(closure), *entries)}
    listed = [(key, store.objects.size(key) or 0, key.partition("/")[2]) for key in blobs]
    listed += [(key, len(data), digest(data)) for key, data in small.items()]
    index = canonical({"format": FORMAT, "line": name, "objects": listed})
    with whole_file(file) as out:
        write_member(out, _INDEX, index)
        for number, (key, size, sha256) in enumerate(listed, 1):
            data = small[key] if key in small else bytes(store.read_blob(sha256, what=f"of line {name}"))
            if len(data) != size:
                raise Damaged(f"{key} changed while it was read", remedy="Run it again")
            write_member(out, key, data)
            report(number, len(listed))
        end(out)
    return Carried(name, len(blobs), len(closure), len(entries), sum(size for _, size, _ in listed))


@dataclass
class _Waiting:
    """What has been read of an archive and is not visible yet."""

    manifests: dict[Ref, bytes] = field(default_factory=dict)
    entries: list[bytes] = field(default_factory=list)
    blobs: set[str] = field(default_factory=set)
    bytes: int = 0


def import_line(file: Path, store: ArtifactStore, report: Report = silent, *, name: str | None = None) -> Carried:
    """Read a line that `export_line` wrote. `name` is what to call it here, if not as it was called there.

    Damaged if anything is not as announced; Conflict if a line of that name has another history here.
    """
    found = _Waiting()
    try:
        with file.open("rb") as archive:
            members = members_of(archive)
            line, listed = _index(_announced(next(members, None), archive))
            for number, (key, size, sha256) in enumerate(listed, 1):
                member = next(members, None)
                if member != (key, size):
                    raise Damaged(f"expected {key} of {size:,} bytes, found {_told(member)}")
                _take(found, key, read_exactly(archive, size), sha256, store)
                report(number, len(listed))
            if (more := next(members, None)) is not None:
                raise Damaged(f"{_told(more)} was not announced")
        called = name or line
        needs = _check(found, called, store)
    except Damaged as error:
        raise Damaged(f"{file}: {error}", remedy=_REMEDY) from error
    except OSError as error:
        raise InvalidInput(f"cannot read {file}: {error.strerror}") from error
    check_same_history(store.objects, f"line/{called}", found.entries)
    for ref in needs.ordered(found.manifests):  # each after those it needs
        put_checked(store, ref, found.manifests[ref])
    new = append_entries(store.objects, f"line/{called}", found.entries)
    return Carried(called, len(found.blobs), len(found.manifests), new, sum(size for _, size, _ in listed))


def _index(data: bytes) -> tuple[str, list[tuple[str, int, str]]]:
    """The line's name and what follows, each once and under a key that the format knows."""
    try:
        found = json.loads(data)
        if found["format"] != FORMAT:
            raise Damaged(f"it has the format {ascii(found['format'])[:80]}, this version reads {FORMAT!r}")
        line, listed = found["line"], [(key, size, sha256) for key, size, sha256 in found["objects"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Damaged(f"{_INDEX} is not an index: {type(error).__name__}") from error
    seen = set()
    for key, size, sha256 in listed:
        if not isinstance(key, str) or not _KEY.fullmatch(key) or key in seen:
            raise Damaged(f"it announces {ascii(key)[:90]}, which no store holds, or holds once")
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise Damaged(f"it announces {ascii(size)[:40]} bytes of {key}")
        if not key.startswith("line/") and sha256 != key.partition("/")[2]:
            raise Damaged(f"it announces another sha256 for {key}")
        seen.add(key)
    if not isinstance(line, str) or not _KEY.fullmatch(f"line/{line}/00000000"):
        raise Damaged(f"it is of a line {ascii(line)[:80]}, which is no line's name")
    journal = [key for key in (one[0] for one in listed) if key.startswith("line/")]
    if journal != [f"line/{line}/{number:08d}" for number in range(len(journal))]:
        raise Damaged(f"it announces another journal than that of {line}, or not in order")
    return line, listed


def _take(found: _Waiting, key: str, data: bytes, sha256: str, store: ArtifactStore) -> None:
    kind = key.partition("/")[0]
    if digest(data) != sha256:
        raise Damaged(f"{key} is damaged: its bytes have another sha256 than its name says")
    if kind == "blob":
        found.blobs.add(store.write_blob(data))
        return
    found.bytes += len(data)
    if found.bytes > _MOST:
        raise Damaged(f"its manifests and entries are more than {_MOST:,} bytes")
    if kind == "line":
        found.entries.append(data)
    else:
        found.manifests[parse_ref(key)] = data


def _check(found: _Waiting, name: str, store: ArtifactStore) -> Needs:
    """Whether nothing is lacking: what manifests need, what entries name. Returns who needs what."""
    needs = _needs(found, store)
    for ref in found.manifests:
        needed = needs.of(ref)
        blobs = (
            blob for blob in needed.blobs if blob not in found.blobs and store.objects.size(f"blob/{blob}") is None
        )
        refs = (one for one in needed.refs if one not in found.manifests and not store.has(one))
        lacking = next(refs, None) or next(blobs, None)
        if lacking is not None:
            raise Damaged(f"{short(ref)} needs {lacking}, which it lacks")
    Line(store.objects, name)  # InvalidInput if that is no name
    entries = [decode_entry(data, number, f"entry {number}") for number, data in enumerate(found.entries)]
    if not entries:
        raise Damaged("it has no journal")
    history_of(entries, name)
    for ref in sorted(LineJournal(name, tuple(entries)).refs(states=False)):
        if ref not in found.manifests and not store.has(ref):
            raise Damaged(f"its journal names {short(ref)}, which it lacks")
    return needs


def _needs(found: _Waiting, store: ArtifactStore) -> Needs:
    needs = Needs(store)
    for ref, data in found.manifests.items():
        manifest = decode_manifest(data, source=short(ref))
        if manifest.kind != ref.partition("/")[0]:
            raise Damaged(f"{short(ref)} says it is a {manifest.kind!r}")
        needs.known[ref] = needed_by(ref, manifest)
    return needs


def _announced(member: tuple[str, int] | None, archive: BinaryIO) -> bytes:
    if member is None or member[0] != _INDEX or member[1] > _MOST:
        raise Damaged(f"expected {_INDEX}, found {_told(member)}")
    return read_exactly(archive, member[1])


def _told(member: tuple[str, int] | None) -> str:
    return "its end" if member is None else f"{ascii(member[0])[:90]} of {member[1]:,} bytes"
