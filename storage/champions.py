"""Champions: which version of a registered model is served, and how that came to be.

MLflow's aliases say who it is now: `champion`, `previous`, and `challenger` for the newest version that was not let
through. A tag of the registered model keeps the history, so that going back is explained as well as going on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from storage.errors import InvalidInput, Missing

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
GATE, REASONS = "gate", "gate.reasons"  # tags of a version: what the gate said of it
_HISTORY = "champions"
_REMEMBERED = 30  # changes: a tag has room for a few thousand characters

Action = Literal["gate", "promote", "rollback"]


@dataclass(frozen=True)
class Change:
    """One change of the champion."""

    version: int
    before: int | None
    action: Action
    why: str
    at: str


class Champions:
    """The champion of one registered model, seen through an MLflow client (storage/registry.py)."""

    def __init__(self, client: Any, name: str) -> None:
        self._client, self._name = client, name

    def version(self, alias: str = CHAMPION) -> int | None:
        found = self._client.get_registered_model(self._name).aliases.get(alias)
        return None if found is None else int(found)

    def history(self) -> list[Change]:
        """Changes, oldest first; of very many the newest."""
        text = self._client.get_registered_model(self._name).tags.get(_HISTORY)
        return [Change(**one) for one in json.loads(text)] if text else []

    def move(self, version: int, action: Action, why: str) -> None:
        """Make a version the champion, and the former one `previous`. Nothing happens if it is the champion already."""
        before = self.version()
        if before == version:
            return
        at = datetime.now(UTC).isoformat(timespec="seconds")
        changes = [*self.history(), Change(version, before, action, why[:80], at)]
        if before is not None:
            self._client.set_registered_model_alias(self._name, PREVIOUS, str(before))
        self._client.set_registered_model_alias(self._name, CHAMPION, str(version))
        told = json.dumps([asdict(one) for one in changes[-_REMEMBERED:]])
        self._client.set_registered_model_tag(self._name, _HISTORY, told)

    def promote(self, version: int, why: str) -> None:
        """Make a version the champion by hand, whatever the gate said of it. Missing if there is no such version."""
        known = sorted(int(one.version) for one in self._client.search_model_versions(f"name = '{self._name}'"))
        if version not in known:
            raise Missing(
                f"model {self._name!r} has no version {version}", remedy=f"Its versions: {', '.join(map(str, known))}"
            )
        self.move(version, "promote", why)

    def rollback(self, why: str) -> int:
        """Make the former champion the champion again; its version."""
        before = self.version(PREVIOUS)
        if before is None:
            raise InvalidInput(
                f"model {self._name!r} has had no other champion",
                remedy=f"Name a version: deltaworks promote {self._name} VERSION",
            )
        self.move(before, "rollback", why)
        return before

    def judged(self, version: int, reasons: Sequence[str]) -> None:
        """What the gate said of a version: let through, or the reasons why not. Said once: later changes by hand stay.

        The tag is written last, so that a run that is interrupted in between does the rest when it is run again.
        """
        if GATE in self._client.get_model_version(self._name, str(version)).tags:
            return
        if reasons:
            self._client.set_model_version_tag(self._name, str(version), REASONS, "; ".join(reasons)[:5000])
            self._client.set_registered_model_alias(self._name, CHALLENGER, str(version))
        else:
            self.move(version, "gate", "passed")
        self._client.set_model_version_tag(self._name, str(version), GATE, "failed" if reasons else "passed")
