"""Pins: artifacts that somebody wants to keep, whatever the lines do. Small objects `pin/<kind>/<sha256>`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime

from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput, Missing
from storage.manifest import canonical
from storage.refs import Ref, parse_ref, short
from storage.trust import printable

PREFIX = "pin/"


@dataclass(frozen=True)
class Pin:
    """A pin holds the time: it records an event, as the entries of a journal do."""

    ref: Ref
    why: str = ""
    at: str = ""


def pin(store: ArtifactStore, ref: Ref, why: str = "") -> Pin:
    """Keep `ref` and all that it needs. Pinning again replaces the reason."""
    if not store.has(ref):
        raise Missing(f"{short(ref)} is not in {store.url}", remedy="Only what is there can be kept")
    made = Pin(ref, why, datetime.now(UTC).isoformat(timespec="seconds"))
    store.objects.put(f"{PREFIX}{ref}", canonical({"why": made.why, "at": made.at}))
    return made


def unpin(store: ArtifactStore, ref: Ref) -> None:
    """Let go of `ref`; it stays until a prune, and for as long as something else needs it."""
    if store.objects.size(f"{PREFIX}{ref}") is None:
        raise Missing(f"{short(ref)} is not pinned", remedy="`deltaworks pins` lists what is")
    store.objects.delete(f"{PREFIX}{ref}")


def pins(store: ArtifactStore) -> list[Pin]:
    """All pins. One whose note cannot be read still keeps what its name says."""
    found = []
    for key in store.objects.list(PREFIX):
        try:
            ref = parse_ref(key.removeprefix(PREFIX))
        except InvalidInput:
            continue
        found.append(_read(store, ref))
    return found


def _read(store: ArtifactStore, ref: Ref) -> Pin:
    try:
        note = json.loads(store.objects.get(f"{PREFIX}{ref}"))
        return Pin(ref, printable(str(note["why"])), printable(str(note["at"])))
    except (ValueError, TypeError, KeyError, RecursionError):
        return Pin(ref, "its note cannot be read")
    except Missing:
        return Pin(ref)  # unpinned in this moment
