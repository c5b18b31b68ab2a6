"""Contains: which merges and versions hold an update, whatever name it is asked by.

An update is meant by its own ref, by that of the update that it was compressed from, by the checkpoint that was tuned
for it, or by the name of its task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from storage.artifacts import ArtifactStore
from storage.index import Row
from storage.lines import Entry
from storage.refs import Ref, UpdateRef
from storage.registry_lines import LineVersion
from storage.roots import LineJournal
from tasks.lineage.versions import entries_of


@dataclass(frozen=True)
class Holds:
    """A version, or a line without versions, that holds an update as its merge number `step`, from 1."""

    line: str
    update: UpdateRef
    task: str
    step: int
    version: int | None = None
    aliases: tuple[str, ...] = ()
    left_out: bool = False  # by the gate of its line: nobody merged onto it
    in_head: bool = False  # whether the line holds it now


def meant(what: str, store: ArtifactStore, rows: Mapping[Ref, Row], lines: Sequence[LineJournal]) -> set[Ref]:
    """The updates that `what` means. Raises as `ArtifactStore.resolve` for a ref that nothing has."""
    if "/" not in what:
        return {ref for line in lines for entry in line.entries for task, ref in _folds(entry) if task == what}
    named = store.resolve(what)
    found = {named}
    while True:  # what was extracted from a checkpoint, and compressed from that
        more = {ref for ref, row in rows.items() if row["kind"] == "update" and found & _made_from(row)}
        if more <= found:
            return {ref for ref in found if ref.startswith("update/")}
        found |= more


def holding(
    updates: set[Ref], lines: Sequence[LineJournal], versions: Mapping[str, Sequence[LineVersion]]
) -> Iterator[Holds]:
    """Every version that holds one of them, by line and number; of lines without versions, the head."""
    for name in sorted({line.name for line in lines} | set(versions)):
        journal = next((line for line in lines if line.name == name), None)
        now = {(str(one.update), one.task) for one in journal.history} if journal else set()
        known = versions.get(name, ())
        for version in known:
            merged = entries_of(version, known, journal.entries if journal else ())
            for step, entry in enumerate(merged, 1):
                if entry.update in updates and entry.update is not None:
                    current = (str(entry.update), entry.task) in now
                    yield Holds(
                        name, entry.update, entry.task, step, version.number, version.aliases, version.left_out, current
                    )
        if not known and journal is not None:
            for step, entry in enumerate(journal.history, 1):
                if entry.update in updates and entry.update is not None:
                    yield Holds(name, entry.update, entry.task, step, in_head=True)


def _folds(entry: Entry) -> Iterator[tuple[str, Ref]]:
    if entry.update is not None:
        yield entry.task, entry.update
    yield from ((one.task, one.update) for one in entry.folds)


def _made_from(row: Row) -> set[Ref]:
    inputs = row["inputs"]
    return {Ref(inputs[role]) for role in ("update", "tuned") if role in inputs}
