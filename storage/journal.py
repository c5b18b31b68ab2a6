"""Journals: numbered objects under `<folder>/<name>/`, each written once. What lines and series are kept in.

Entry n is created only if its key is free: creating it is the commit, and of two writers at the same time exactly one
wins. Nothing is ever changed or removed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from storage.errors import Damaged, InvalidInput, Missing
from storage.manifest import canonical
from storage.objects import ObjectStore

_NAME = re.compile(r"[a-z0-9][a-z0-9_\-]*")


class Journal:
    """The entries of one journal as mappings. `folder` is also what it is called in messages: `line`, `series`."""

    def __init__(self, objects: ObjectStore, folder: str, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise InvalidInput(f"{name!r} is not a {folder} name", remedy="Use lower-case letters, digits, - and _")
        self._objects = objects
        self._folder = folder
        self.name = name

    @staticmethod
    def names(objects: ObjectStore, folder: str) -> list[str]:
        return sorted({key.split("/")[1] for key in objects.list(f"{folder}/")})

    def key(self, number: int) -> str:
        return f"{self._folder}/{self.name}/{number:08d}"

    def newest(self) -> int | None:
        """The number of the last entry."""
        tails = (key.rpartition("/")[2] for key in self._objects.list(f"{self._folder}/{self.name}/"))
        return max((int(tail) for tail in tails if tail.isdecimal()), default=None)

    def read(self, number: int) -> dict[str, Any] | None:
        """The values of an entry; None if there is none. Damaged if it is no mapping."""
        try:
            data = self._objects.get(self.key(number))
        except Missing:
            return None
        try:
            return dict(json.loads(data))
        except (ValueError, TypeError) as error:
            raise Damaged(f"{self.key(number)} is not a journal entry: {error}") from error

    def create(self, number: int, values: Mapping[str, Any]) -> bool:
        """Whether the entry is there now and holds these values: False if others came first."""
        return self._objects.create(self.key(number), canonical(dict(values)))

    def absent(self) -> Missing:
        """The error of a journal that has no entries."""
        known = ", ".join(self.names(self._objects, self._folder)) or "none yet"
        return Missing(f"there is no {self._folder} {self.name!r} in {self._objects.url}", remedy=f"There are: {known}")
