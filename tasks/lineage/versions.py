"""Which merges made a version: from the journal of its line, or from its parents where the journal does not say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from storage.artifacts import ArtifactStore
from storage.errors import DeltaworksError, InvalidInput, Missing
from storage.lines import Entry, history_of
from tasks.lineage.graph import lineage_of, merges_of
from tasks.lineage.nodes import Known, Lineage, Merge
from tasks.lineage.scored import Scored

if TYPE_CHECKING:
    from storage.registry_lines import LineVersion

COST, MEASURED, ABLE = "cost", "measured", "able"  # tags of a version, see tasks/register.py
_GATE, _REASONS = "gate", "gate.reasons"


def version_lineage(
    version: LineVersion,
    versions: Sequence[LineVersion],
    journal: Sequence[Entry],
    store: ArtifactStore,
    pages: Mapping[int, Mapping[str, str]] | None = None,
    scored: Scored | None = None,
    newest: int | None = None,
) -> Lineage:
    """The graph of a registered version. `versions`: all of its line; `journal`: all entries, none if it is gone.

    `pages`: number -> where a browser finds the version, `""`, and the runs of its stages. Without `scored` the scores
    are those that the registry names. `newest`: draw no more merges than these. Raises Missing if nothing says what was
    merged.
    """
    known = {one.number: _known(one, (pages or {}).get(one.number, {})) for one in versions}
    entries = entries_of(version, versions, journal)
    merges = merges_of(entries, [known[one.number] for one in versions if not one.left_out or one == version])
    before = _models_before(version, versions)
    merges = [one if one.model else replace(one, before=before.get(one.entry.step)) for one in merges]
    states = {one.entry.state for one in merges}
    for one in versions:
        parent = _numbered(versions, one.tags.get("parent_version"))
        after = parent.tags["state"] if parent else None
        if one.left_out and one != version and (parent is None or after in states) and one.state not in states:
            number = entries[-1].number + 1
            merges.append(Merge(_entry(one, number), after, (known[one.number],), aside=True))
    seen = scored or registered_scores(versions, store)
    able = Scored(store, _named(versions, ABLE))
    return lineage_of(version.name, merges, store, seen, costs_of(versions), known[version.number], newest, able)


def entry_lineage(line: str, entries: Sequence[Entry], store: ArtifactStore, scored: Scored) -> Lineage:
    """The graph of an entry that no registry knows, from the store alone. `entries`: the folds that made it."""
    models = _written(entries, store)
    merges = [
        replace(one, written=models.get((str(one.entry.state), one.entry.factor))) for one in merges_of(entries, [])
    ]
    return lineage_of(line, merges, store, scored, {})


def entries_of(version: LineVersion, versions: Sequence[LineVersion], journal: Sequence[Entry]) -> list[Entry]:
    """The merges that made a version, oldest first."""
    factor = float(version.tags.get("factor", 1))
    places = [at for at, one in enumerate(journal) if one.state == version.state and one.factor == factor]
    if places:
        return history_of(journal[: places[-1] + 1], version.name)
    for at, one in enumerate(journal):
        if any(fold.state == version.state and fold.factor == factor for fold in one.folds):  # inside a rebuild
            entries = history_of(journal[: at + 1], version.name)
            return entries[: 1 + [entry.state for entry in entries].index(version.state)]
    parent = _numbered(versions, version.tags.get("parent_version"))
    before = entries_of(parent, versions, journal) if parent else []
    if len(before) != version.step - 1:
        raise Missing(
            f"{version} holds {version.step} updates, which the journal of line {version.name!r} does not list",
            remedy="Look at the store in which it was made: its tag `store` names it",
        )
    number = before[-1].number + 1 if before else 1
    return [*before, _entry(version, number)]


def registered_scores(versions: Sequence[LineVersion], store: ArtifactStore, everything: bool = False) -> Scored:
    """The scores that versions name; or these and all others of the store, which is one read for each."""
    of = {one.tags["model"]: one.tags["scores"] for one in versions if "scores" in one.tags and "model" in one.tags}
    return Scored(store, store.refs("scores") if everything else _named(versions, MEASURED), of)


def _named(versions: Sequence[LineVersion], tag: str) -> list[str]:
    """The scores that a tag of the versions names, each once."""
    return list(dict.fromkeys(ref for one in versions for ref in one.tags.get(tag, "").split()))


def costs_of(versions: Sequence[LineVersion]) -> dict[str, dict[str, Any]]:
    """Ref, cut short -> what making it cost, as the versions say: `seconds` and `device`."""
    found: dict[str, dict[str, Any]] = {}
    for one in versions:
        try:
            told = json.loads(one.tags.get(COST, "{}"))
            found |= {str(ref): _cost(*cost) for ref, cost in told.items()}
        except (ValueError, TypeError, IndexError, AttributeError):  # cut short, because it was too long for a tag
            continue
    return found


def _cost(seconds: float | None, device: str | None) -> dict[str, Any]:
    found = {"seconds": None if seconds is None else float(seconds), "device": device}
    return {name: value for name, value in found.items() if value is not None}


def _known(version: LineVersion, pages: Mapping[str, str]) -> Known:
    tags = version.tags
    return Known(
        version.number,
        tags["state"],
        float(tags.get("factor", 1)),
        tags.get("model"),
        version.aliases,
        tags.get(_GATE, ""),
        tags.get(_REASONS, ""),
        version.left_out,
        pages,
    )


def entries_at(line: str, which: str | None, journal: Sequence[Entry]) -> tuple[int, list[Entry]]:
    """The number of a journal entry that was typed, without one the newest, and the merges that made its state.

    For a line that no registry knows. Raises Missing if there is no such entry, InvalidInput if it has merged nothing.
    """
    number = journal[-1].number if which is None else int(which) if which.isdecimal() else -1
    if not 0 <= number < len(journal):
        raise Missing(
            f"MLflow has no model {line!r}, and its line no entry {which!r}",
            remedy=f"Entries: 0 to {journal[-1].number}, see `deltaworks line log {line}`",
        )
    entries = history_of(journal[: number + 1], line)
    if not entries:
        raise InvalidInput(f"line {line!r} has merged nothing by entry {number}", remedy="Name a later entry")
    return number, entries


def _models_before(version: LineVersion, versions: Sequence[LineVersion]) -> dict[int, str]:
    """Step -> the model of the version that the line had after it, of those that led to this one."""
    found: dict[int, str] = {}
    parent = _numbered(versions, version.tags.get("parent_version"))
    while parent is not None and parent.step not in found:
        if "model" in parent.tags:
            found[parent.step] = parent.tags["model"]
        parent = _numbered(versions, parent.tags.get("parent_version"))
    return found


def _numbered(versions: Sequence[LineVersion], number: str | None) -> LineVersion | None:
    return next((one for one in versions if str(one.number) == number), None)


def _entry(version: LineVersion, number: int) -> Entry:
    """The entry that a version's tags tell of."""
    tags = version.tags
    merger = json.loads(tags["merger"])
    factor = float(tags.get("factor", 1))
    return Entry(
        number, "fold", version.base, merger, version.step, tags["task"], version.update, version.state, factor=factor
    )


def _written(entries: Sequence[Entry], store: ArtifactStore) -> dict[tuple[str, float], str]:
    """State and factor -> the model that was written of it, among the checkpoints of the store."""
    states = {str(one.state) for one in entries}
    found: dict[tuple[str, float], str] = {}
    for ref in store.refs("checkpoint"):
        try:
            lineage = store.open(ref).manifest.lineage
        except DeltaworksError:
            continue
        state = lineage.inputs.get("state", "")
        if lineage.step == "materialize" and state in states:
            found[state, float(lineage.spec.get("factor", 1))] = ref
    return found
