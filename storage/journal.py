"""Journals: numbered objects under `<folder>/<name>/`, each written once. What lines and series are kept in.

Entry n is created only if its key is free: creating it is the commit, and of two writers at the same time exactly one
wins. Nothing is ever changed or removed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from storage.errors import Damaged, InvalidInput, Missing
from storage.manifest import canonical
from storage.objects import ObjectStore

_NAME = re.compile(r"[a-z0-9][a-z0-9_\-]*")
_NUMBER = re.compile(r"[0-9]{8}")


class Journal:
    """The entries of one journal, as bytes. `folder` is also what it is called in messages: `line`, `series`."""

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
        keys = list(self._objects.list(f"{self._folder}/{self.name}/"))
        return self._number(keys[-1]) if keys else None

    def read(self, number: int) -> bytes | None:
        """The entry; None if there is none."""
        try:
            return self._objects.get(self.key(number))
        except Missing:
            return None

    def create(self, number: int, values: Mapping[str, Any]) -> bool:
        """Whether the entry is there now and holds these values: False if others came first."""
        return self._objects.create(self.key(number), canonical(dict(values)))

    def absent(self) -> Missing:
        """The error of a journal that has no entries."""
        known = ", ".join(self.names(self._objects, self._folder)) or "none yet"
        return Missing(f"there is no {self._folder} {self.name!r} in {self._objects.url}", remedy=f"There are: {known}")

    def _number(self, key: str) -> int:
        number = key.rpartition("/")[2]
        if not _NUMBER.fullmatch(number):
            raise Damaged(f"{key} is not the key of a journal entry", remedy="Remove it: the journal does without it")
        return int(number)
