"""Tables of what the store holds: journals and artifacts. Light, so that looking something up does not take long."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE
from rich.table import Table

from storage.artifacts import Artifact
from storage.lines import Entry
from storage.manifest import TensorRecord
from storage.refs import short


def journal_table(name: str, entries: list[Entry]) -> Table:
    """The journal of a line, oldest first. Refs are cut to what `deltaworks show` needs to find them."""
    table = Table(title=f"line {name}", title_justify="left", box=SIMPLE)
    for column in ("#", "action", "merged", "task", "update", "state", "when (UTC)", "why"):
        table.add_column(column)
    for entry in entries:
        refs = [short(ref, 8) if ref else "" for ref in (entry.update, entry.state)]
        when = entry.at[:16].replace("T", " ")
        table.add_row(str(entry.number), entry.action, str(entry.step), entry.task, *refs, when, entry.why)
    return table


def show_artifact(artifact: Artifact) -> Iterator[str | Table]:
    """Everything a manifest says: lineage, settings, facts, tensors by role, files."""
    manifest = artifact.manifest
    yield f"{artifact.ref}\nat {artifact.store.address(artifact.ref)}"
    origin = Table(title=f"made by {manifest.lineage.step}", title_justify="left", show_header=False)
    for role, ref in manifest.lineage.inputs.items():
        origin.add_row(f"input {role}", ref)
    for name, value in manifest.lineage.spec.items():
        origin.add_row(f"setting {name}", str(value))
    for name, value in manifest.facts.items():
        origin.add_row(f"fact {name}", f"{value:,}" if isinstance(value, int) else str(value))
    yield origin
    tensors = Table(title="tensors", title_justify="left")
    for column in ("role", "codec", "tensors", "numbers", "bytes"):
        tensors.add_column(column, justify="left" if column in ("role", "codec") else "right")
    groups: dict[tuple[str, str], list[TensorRecord]] = {}
    for record in manifest.tensors:
        codec = record.codec if record.rank is None else f"{record.codec}, rank {record.rank}"
        groups.setdefault((record.role, codec), []).append(record)
    for (role, codec), records in sorted(groups.items()):
        numbers = sum(record.elements for record in records)
        size = sum(record.bytes for record in records)
        tensors.add_row(role, codec, str(len(records)), f"{numbers:,}", f"{size:,}")
    yield tensors
    for name, asset in sorted(manifest.assets.items()):
        yield f"file {name}: {asset.bytes:,} bytes"
