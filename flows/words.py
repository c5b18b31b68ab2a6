"""Words that several commands share: times as people write them, stores by address, what is registered."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from storage.errors import InvalidInput

if TYPE_CHECKING:
    from flows.workplace import Workplace
    from storage.artifacts import ArtifactStore
    from storage.refs import Ref

_UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 24 * 3600, "w": 7 * 24 * 3600}


def seconds(text: str) -> float:
    """`7d`, `12h`, `30m`, `0`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw]?)", text.strip())
    if match is None or (not match[2] and float(match[1]) != 0):
        raise InvalidInput(f"{text!r} is not a time", remedy="Write it like 7d, 12h or 30m; 0 for none")
    return float(match[1]) * _UNITS[match[2] or "s"]


def interval(text: str) -> float:
    """`5s`, `500ms` or `2m` in seconds, more than none; a plain number is seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h)?", text.strip())
    if found is None or float(found[1]) == 0:
        raise InvalidInput(f"{text!r} is no time", remedy="Write it like 5s, 500ms or 2m")
    return float(found[1]) * _UNITS[found[2] or "s"]


def other_store(url: str) -> ArtifactStore:
    """The store at an address that somebody typed."""
    from storage.address import open_objects
    from storage.artifacts import ArtifactStore

    return ArtifactStore(open_objects(url))


def registered(place: Workplace) -> frozenset[Ref]:
    """What models in MLflow name. An embedded database that is not there yet holds none; a server must answer."""
    from pathlib import Path

    tracking = place.settings.tracking
    if tracking.startswith("sqlite:///") and not Path(tracking.removeprefix("sqlite:///")).exists():
        return frozenset()
    return place.registry.refs()
