"""Continuation: whether a chain may go on with a line as it is; if not, what differs, and how they could agree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from storage.artifacts import ArtifactStore
from storage.errors import Conflict
from storage.lines import Entry
from storage.refs import CheckpointRef, UpdateRef, short
from tasks.fine_tune import trained_from


@dataclass(frozen=True)
class Wanted:
    """What a chain would merge as one step of a line. `update` is None while it is still to be made."""

    task: str
    update: UpdateRef | None
    weight: float = 1.0


def check_continuation(line: str, head: Entry, held: Sequence[Entry], wanted: Sequence[Wanted]) -> None:
    """A line is a history: a chain may go on with it, but not tell another one. Conflict at the first difference.

    `held` are the folds that made `head`, `wanted` those of the chain; one of the two begins with the other.
    """
    for step, (old, new) in enumerate(zip(held, wanted, strict=False), 1):
        if old.update == new.update and old.weight == new.weight:
            continue
        if new.update is None and old.task == new.task:
            continue  # it may turn out to be the same
        if old.update == new.update:
            raise Conflict(
                f"line {line!r} holds {old.task!r} with weight {old.weight:g}, this chain gives it {new.weight:g}",
                remedy=f"`deltaworks line rebuild {line} --weight {new.task}={new.weight:g}` merges again, or change "
                "the weight in the config back",
            )
        raise Conflict(
            f"line {line!r} already holds {old.task!r} ({short(old.update or '')}) as its step {step}, this chain "
            f"would merge {new.task!r} ({_ref(new)}). The line{_since(head)}: {_names(held)}. "
            f"The chain: {_names(wanted)}",
            remedy=_remedy(line, held, wanted, old, new),
        )


def _remedy(line: str, held: Sequence[Entry], wanted: Sequence[Wanted], old: Entry, new: Wanted) -> str:
    """How the line could become like the chain, or the chain like the line."""
    ways = []
    if old.task == new.task:
        changes = "data, tuner, codec, or of what it starts from"
        ways.append(f"{new.task!r} gives another update than it did: undo what was changed of its {changes}")
    place = {one.update: number for number, one in enumerate(wanted)}
    common = [entry for entry in held if entry.update in place]
    ordered = sorted(common, key=lambda entry: place[entry.update])  # folds have an update
    options = [f"--drop {entry.task}" for entry in held if entry not in common]
    if ordered != common:
        options.append(f"--order {','.join(entry.task for entry in ordered)}")
    if common and options:
        ways.append(f"`deltaworks line rebuild {line} {' '.join(options)}` makes the line like the chain")
    known = {entry.update for entry in common}
    early = [one.task for one in wanted[: len(common)] if one.update not in known]
    if early:
        ways.append(f"take {', '.join(early)} out of the chain's tasks, or move it to their end: the line lacks it")
    ways.append("give the line a new name in the config")
    text = "; or ".join(ways)
    return text if text[0] in "'`" else text[0].upper() + text[1:]


def _since(head: Entry) -> str:
    """Why a line may not be what its chain made of it."""
    if head.action not in ("rebuild", "rollback"):
        return ""
    return f" since {head.action} {head.number}{f' ({head.why})' if head.why else ''}"


def _ref(new: Wanted) -> str:
    return short(new.update) if new.update else "not yet trained"


def check_start(line: str, held: Entry, start: CheckpointRef, store: ArtifactStore) -> None:
    """Refuse to train a task again that the line holds, trained from another model: its update would be another one.

    Only if the line's update says what it was trained from: then this is known before the training.
    """
    if held.update is None or not store.has(held.update):
        return
    update = store.open(held.update, "update")
    tuned = update.manifest.lineage.inputs.get("tuned")
    if tuned is None or not store.has(tuned):
        return
    before = trained_from(store.open(tuned, "checkpoint").manifest.lineage)
    if before not in (None, start):
        raise Conflict(
            f"line {line!r} holds {held.task!r} as its step {held.step}, trained from {short(str(before))}; this chain "
            f"would train it from {short(start)}",
            remedy="With start: head a training depends on all merges before it: undo what was changed of them, or of "
            "start, or give the line a new name in the config",
        )


def _names(some: Sequence[Entry] | Sequence[Wanted]) -> str:
    return ", ".join(one.task for one in some)
