"""Index: one row per artifact, kept in a local file, so that a table of all of them reads only what is new.

Manifests are written once, so that a row is true for ever; what is pruned is left out when the index is read. The file
is a copy of what the store says, made again from it at any time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.artifacts import Artifact, ArtifactStore
from storage.errors import Damaged, Missing
from storage.files import whole_file
from storage.manifest import canonical, digest
from storage.many import Report, each, silent
from storage.refs import Ref, parse_ref
from storage.tables import read_rows

VERSION = 2  # of the rows; another one in the file, and it is made again
_SCORES = "scores.parquet"
_KNOWN = ("task", "metric", "value", "samples", "low", "high", "factor")
_MOST = 2**63 - 1  # what a column of whole numbers holds

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Indexed:
    """`rows` of all artifacts, by ref; `read`: how many manifests had to be read; `unread`: those that are damaged."""

    rows: Mapping[Ref, Row]
    read: int
    unread: tuple[Ref, ...] = ()


def index_file(folder: Path, url: str) -> Path:
    """The file of the store at `url` among those in `folder`."""
    return folder / f"{digest(url.encode())[:16]}.jsonl"


def indexed(store: ArtifactStore, file: Path, report: Report = silent, *, rebuild: bool = False) -> Indexed:
    """Bring the index up to date and return it. With `rebuild` every manifest is read again."""
    known = {} if rebuild else _load(file)
    refs = set(store.refs())
    new = sorted(refs - known.keys())
    made = each(new, lambda ref: _row(store, ref), report=report)
    rows = {ref: row for ref, row in zip(new, made, strict=True) if row is not None}
    if rebuild or known.keys() - refs or not file.exists():
        known = {ref: row for ref, row in known.items() if ref in refs}
        _save(file, {**known, **rows}.values())
    elif rows:
        _append(file, rows.values())
    found = {**known, **rows}
    return Indexed({ref: found[ref] for ref in sorted(found)}, len(new), tuple(ref for ref in new if ref not in rows))


def _row(store: ArtifactStore, ref: Ref) -> Row | None:
    """What tables say of an artifact; None if it is damaged, or was removed in this moment."""
    try:
        artifact = store.open(ref)
        scores = _scores(artifact) if ref.startswith("scores/") else []
    except (Damaged, Missing):
        return None
    manifest = artifact.manifest
    tensors = manifest.tensors
    return {
        "ref": ref,
        "kind": manifest.kind,
        "step": manifest.lineage.step,
        "task": _text(manifest.facts.get("task")),
        "inputs": dict(manifest.lineage.inputs),
        "spec": dict(manifest.lineage.spec),
        "facts": dict(manifest.facts),
        "tensors": len(tensors),
        "parameters": min(manifest.parameters, _MOST),
        "tensor_bytes": min(manifest.tensor_bytes, _MOST),
        "asset_bytes": min(sum(asset.bytes for asset in manifest.assets.values()), _MOST),
        "codecs": ", ".join(sorted({record.codec for record in tensors})),
        "worst_error": max((record.error for record in tensors if record.error is not None), default=None),
        "scores": scores,
    }


def _scores(artifact: Artifact) -> list[dict[str, Any]]:
    """The rows of a table of scores, whichever step made it."""
    if _SCORES not in artifact.manifest.assets:
        return []
    found = []
    for row in read_rows(artifact.asset(_SCORES)):
        known = {name: row.pop(name, None) for name in _KNOWN}
        score = row.pop("score", None)  # what a search for a codec calls it
        value = known["value"] if known["value"] is not None else score
        rest = {name: one for name, one in row.items() if isinstance(one, (str, int, float))}
        found.append({**known, "value": value, "about": rest})
    return found


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _load(file: Path) -> dict[Ref, Row]:
    """The rows of the file; none if it is of another version. Half a line, of a process that was killed, is no row."""
    try:
        first, *lines = file.read_text().splitlines() or [""]
    except (OSError, UnicodeDecodeError):
        return {}
    if first != _first():
        return {}
    rows: dict[Ref, Row] = {}
    for line in lines:
        try:
            row = json.loads(line)
            rows[parse_ref(row["ref"])] = row
        except (ValueError, TypeError, KeyError):
            continue
    return rows


def _save(file: Path, rows: Iterable[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file, replace=True) as out:
        out.write(_first().encode() + b"\n")
        out.writelines(_line(row) for row in rows)


def _append(file: Path, rows: Iterable[Row]) -> None:
    with file.open("ab") as out:
        out.write(b"\n")  # ends the half line of a process that was killed
        out.writelines(_line(row) for row in rows)


def _line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


def _first() -> str:
    return canonical({"index": VERSION}).decode()
