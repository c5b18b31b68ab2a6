"""Inventory: artifacts, updates, entries of lines and scores as tables with typed columns, in Parquet or CSV."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from storage.errors import InvalidInput
from storage.files import whole_file
from storage.index import Row
from storage.refs import Ref
from storage.roots import LineJournal

FORMS = (".parquet", ".csv")
_TEXT, _WHOLE, _NUMBER = pa.string(), pa.int64(), pa.float64()

_ARTIFACTS = {
    "ref": _TEXT,
    "kind": _TEXT,
    "step": _TEXT,
    "task": _TEXT,
    "base": _TEXT,
    "tensors": _WHOLE,
    "parameters": _WHOLE,
    "tensor_bytes": _WHOLE,
    "asset_bytes": _WHOLE,
    "codecs": _TEXT,
    "inputs": _TEXT,
    "spec": _TEXT,
    "facts": _TEXT,
}
_UPDATES = {
    "ref": _TEXT,
    "task": _TEXT,
    "base": _TEXT,
    "tuned": _TEXT,
    "start": _TEXT,  # what it is the difference to, if not the base
    "external": pa.bool_(),  # the model was trained elsewhere
    "update": _TEXT,  # what it was compressed from
    "codecs": _TEXT,
    "tensors": _WHOLE,
    "parameters": _WHOLE,
    "bytes": _WHOLE,
    "bf16_bytes": _WHOLE,
    "ratio": _NUMBER,
    "norm": _NUMBER,
    "worst_error": _NUMBER,
    "lines": _TEXT,
    "spec": _TEXT,
}
_ENTRIES = {
    "line": _TEXT,
    "number": _WHOLE,
    "place": _WHOLE,  # among the folds of a rebuild, from 1; 1 of others
    "head": pa.bool_(),
    "action": _TEXT,
    "step": _WHOLE,
    "task": _TEXT,
    "update": _TEXT,
    "state": _TEXT,
    "base": _TEXT,
    "weight": _NUMBER,
    "factor": _NUMBER,
    "merger": _TEXT,
    "recipe": _TEXT,
    "why": _TEXT,
    "at": pa.timestamp("ms", tz="UTC"),
}
_SCORES = {
    "ref": _TEXT,
    "step": _TEXT,
    "model": _TEXT,
    "state": _TEXT,
    "update": _TEXT,
    "base": _TEXT,
    "task": _TEXT,
    "metric": _TEXT,
    "value": _NUMBER,
    "samples": _WHOLE,
    "low": _NUMBER,
    "high": _NUMBER,
    "factor": _NUMBER,
    "about": _TEXT,
}


def artifacts(rows: Mapping[Ref, Row], journals: Sequence[LineJournal]) -> pa.Table:
    """One row per artifact; lineage, settings and facts as JSON."""
    return _table(_ARTIFACTS, ({**_flat(row), "base": row["inputs"].get("base")} for row in rows.values()))


def updates(rows: Mapping[Ref, Row], journals: Sequence[LineJournal]) -> pa.Table:
    """One row per update: what it was made from, what it costs, what it lost, and the lines that have it now."""
    lines: dict[str, list[str]] = {}
    for journal in journals:
        for ref in {entry.update for entry in journal.history if entry.update}:
            lines.setdefault(ref, []).append(journal.name)
    return _table(
        _UPDATES,
        (
            {
                **_flat(row),
                **{name: row["inputs"].get(name) for name in ("base", "tuned", "start", "update")},
                "external": row["facts"].get("external") is True,
                **{name: row["facts"].get(name) for name in ("bf16_bytes", "ratio", "norm")},
                "bytes": row["tensor_bytes"],
                "lines": ", ".join(lines.get(ref, [])),
            }
            for ref, row in rows.items()
            if row["kind"] == "update"
        ),
    )


def entries(rows: Mapping[Ref, Row], journals: Sequence[LineJournal]) -> pa.Table:
    """One row per entry of a line; of a rebuild one per update that it merged."""
    return _table(_ENTRIES, (row for journal in journals for row in _entry_rows(journal)))


def scores(rows: Mapping[Ref, Row], journals: Sequence[LineJournal]) -> pa.Table:
    """One row per score. `state` is what a model was merged as: entries of lines have the same."""

    def found() -> Iterator[dict[str, Any]]:
        for row in rows.values():
            inputs = row["inputs"]
            model = rows.get(inputs.get("model"), {})
            state = inputs.get("state") or model.get("inputs", {}).get("state")
            about = {name: inputs.get(name) for name in ("model", "update", "base")}
            for one in row["scores"]:
                extra = _json(one["about"])
                yield {"ref": row["ref"], "step": row["step"], "state": state, **about, **one, "about": extra}

    return _table(_SCORES, found())


TABLES: dict[str, Callable[[Mapping[Ref, Row], Sequence[LineJournal]], pa.Table]] = {
    "artifacts": artifacts,
    "updates": updates,
    "entries": entries,
    "scores": scores,
}


def write_table(table: pa.Table, file: Path) -> None:
    """Write a table as its file's name says. A file that is there is replaced once the new one is whole."""
    form = check_form(file)
    with whole_file(file, replace=True) as out:
        if form == ".csv":
            pyarrow.csv.write_csv(table, out)
        else:
            pyarrow.parquet.write_table(table, out, compression="zstd")


def check_form(file: Path) -> str:
    if file.suffix.lower() not in FORMS:
        raise InvalidInput(f"{file}: a table's name ends in one of {', '.join(FORMS)}")
    return file.suffix.lower()


def _entry_rows(journal: LineJournal) -> Iterator[dict[str, Any]]:
    for entry in journal.entries:
        about = {
            "line": journal.name,
            "number": entry.number,
            "head": entry is journal.head,
            "action": entry.action,
            "base": entry.base,
            "merger": entry.merger.get("name"),
            "recipe": _json(entry.merger),
            "why": entry.why,
            "at": _time(entry.at),
        }
        if not entry.folds:
            merge = {name: getattr(entry, name) for name in ("step", "task", "update", "state", "weight", "factor")}
            yield {**about, **merge, "place": 1}
        for place, one in enumerate(entry.folds, 1):
            yield {**about, **one.__dict__, "step": place, "place": place}


def _flat(row: Row) -> dict[str, Any]:
    return {**row, **{name: _json(row[name]) for name in ("inputs", "spec", "facts")}}


def _table(columns: Mapping[str, pa.DataType], rows: Iterator[dict[str, Any]]) -> pa.Table:
    """Rows as a table of these columns. A value of another type is left empty: facts may be anything."""
    listed = list(rows)
    arrays = [pa.array([_fitting(row.get(name), kind) for row in listed], type=kind) for name, kind in columns.items()]
    return pa.table(arrays, schema=pa.schema(list(columns.items())))


def _fitting(value: Any, kind: pa.DataType) -> Any:
    if kind == _TEXT:
        return value if isinstance(value, str) else None
    if kind == _WHOLE:
        return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63 else None
    if kind == _NUMBER:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    return value


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None
