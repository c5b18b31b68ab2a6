"""Tables of what the store holds: journals and artifacts. Light, so that looking something up does not take long."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from flows.plan import Plan
from storage.artifacts import Artifact, ArtifactStore
from storage.lines import Entry
from storage.manifest import TensorRecord
from storage.refs import StateRef, short


def recipe_text(spec: Mapping[str, Any]) -> str:
    """A line's recipe in one line: `ties density 0.2, scale 1.0; sparsify dare density 0.1, seed 0`."""
    plain = {key: value for key, value in spec.items() if not isinstance(value, Mapping)}
    parts = [_settings(plain)]
    parts += [f"{kind} {_settings(value)}" for kind, value in spec.items() if isinstance(value, Mapping)]
    return "; ".join(parts)


def recipe_name(spec: Mapping[str, Any]) -> str:
    """Its choices alone: `ties (dare, lines)`."""
    others = [str(value["name"]) for value in spec.values() if isinstance(value, Mapping)]
    return f"{spec['name']} ({', '.join(others)})" if others else str(spec["name"])


def journal_table(title: str, entries: list[Entry]) -> Table:
    """Entries of a line, oldest first. Refs are cut to what `deltaworks show` needs to find them."""
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("#", "action", "step", "task", "update", "state", "when (UTC)", "why"):
        table.add_column(
            column,
            no_wrap=column in ("#", "action", "step", "update", "state"),
            min_width={"task": 8, "when (UTC)": 10}.get(column),  # before these are cut, reasons are folded
        )
    before = None
    for entry in entries:
        refs = [short(ref, 8) if ref else "" for ref in (entry.update, entry.state)]
        when = entry.at[:16].replace("T", " ")
        tasks = ", ".join(weighted(one.task, one.weight) for one in entry.folds or [entry])
        if entry.factor != 1:
            tasks += f", written x{entry.factor:g}"
        if entry.action == "rebuild" or dict(entry.merger) != before:
            tasks = f"{tasks} by {recipe_name(entry.merger)}".strip()
        before = dict(entry.merger)
        table.add_row(str(entry.number), entry.action, str(entry.step), tasks, *refs, when, escape(entry.why))
    return table


def weighted(task: str, weight: float) -> str:
    """A task, and how much it counts if that is not 1."""
    return task if weight == 1 else f"{task} x{weight:g}"


def origin_text(store: ArtifactStore, entry: Entry) -> str:
    """What is special about where an update comes from."""
    if entry.update is None or not store.has(entry.update):
        return ""
    manifest = store.open(entry.update).manifest
    start = manifest.lineage.inputs.get("start")
    words = ["external: trained elsewhere"] if manifest.facts.get("external") else []
    return ", ".join([*words, *([f"against {short(start, 8)}"] if start else [])])


def plan_table(plan: Plan, found: Sequence[StateRef] = ()) -> Iterator[str | Table]:
    """What a rebuild would do; `found` are the states of its first steps that are there already."""
    old, new = dict(plan.head.merger), plan.recipe.spec()
    yield f"line    {plan.line}, {len(plan.held)} updates"
    yield f"merger  {recipe_text(new)}"
    if old != new:
        yield f"before  {recipe_text(old)}"
    table = Table(box=SIMPLE, pad_edge=False)
    for column in ("step", "was", "task", "update", "state"):
        table.add_column(column, justify="right" if column in ("step", "was") else "left")
    for step, one in enumerate(plan.folds, 1):
        state = f"found: {short(found[step - 1], 8)}" if step <= len(found) else "to be merged"
        table.add_row(str(step), str(one.step), weighted(one.task, one.weight), short(one.update or "", 8), state)
    for one in plan.dropped:
        table.add_row("-", str(one.step), one.task, short(one.update or "", 8), "left out", style="dim")
    yield table


def show_artifact(artifact: Artifact) -> Iterator[str | Table]:
    """Everything a manifest says: lineage, settings, facts, tensors by role, files."""
    manifest = artifact.manifest
    yield f"{artifact.ref}\nat {artifact.store.address(artifact.ref)}"
    origin = Table(title=f"made by {manifest.lineage.step}", title_justify="left", show_header=False)
    for role, ref in manifest.lineage.inputs.items():
        origin.add_row(f"input {role}", ref)
    for name, value in _flat(manifest.lineage.spec):
        origin.add_row(f"setting {name}", str(value))
    for name, value in _flat(manifest.facts):
        origin.add_row(f"fact {name}", f"{value:,}" if isinstance(value, int) else str(value))
    yield origin
    tensors = Table(title="tensors", title_justify="left")
    lossy = any(record.error is not None for record in manifest.tensors)
    for column in ("role", "codec", "tensors", "numbers", "bytes", *(["bits each", "error"] if lossy else [])):
        tensors.add_column(column, justify="left" if column in ("role", "codec") else "right")
    groups: dict[tuple[str, str], list[TensorRecord]] = {}
    for record in manifest.tensors:
        codec = record.codec if record.rank is None else f"{record.codec}, rank {record.rank}"
        groups.setdefault((record.role, codec), []).append(record)
    for (role, codec), records in sorted(groups.items()):
        numbers = sum(record.elements for record in records)
        size = sum(record.bytes for record in records)
        measured = [_bits_each(size, numbers), _largest_error(records)] if lossy else []
        tensors.add_row(role, codec, str(len(records)), f"{numbers:,}", f"{size:,}", *measured)
    yield tensors if manifest.tensors else "no tensors of its own"
    if lossy:
        yield "bytes are those of whole files; error: what the codec lost of a tensor's norm, the worst of each row"
    for name, asset in sorted(manifest.assets.items()):
        yield f"file {name}: {asset.bytes:,} bytes"


def _bits_each(size: int, numbers: int) -> str:
    return f"{8 * size / numbers:.2f}" if numbers else "-"


def _largest_error(records: Sequence[TensorRecord]) -> str:
    errors = [record.error for record in records if record.error is not None]
    return f"{max(errors):.1%}" if errors else "none"


def _settings(choice: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in sorted(choice.items()) if key not in ("name", "version"))
    return f"{choice['name']} {settings}".rstrip()


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as dotted names, members of a list numbered from 1."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)) and value:
            yield from ((f"{prefix}{name} {number}", one) for number, one in enumerate(value, 1))
        else:
            yield f"{prefix}{name}", value
