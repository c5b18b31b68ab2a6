"""An overlay: one store seen through another that takes the writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from storage.keys import Listed
from storage.objects import Known, ObjectStore
from storage.streams import Bytes, Content


class Overlay:
    """Reads of one store, with writes that go to another: for results that nobody will keep."""

    def __init__(self, below: ObjectStore, above: ObjectStore) -> None:
        self._below, self._above = below, above
        self.url = above.url

    def ready(self) -> None:
        self._below.ready()
        self._above.ready()

    def get(self, key: str) -> bytes:
        return self._holder(key).get(key)

    def view(self, key: str) -> memoryview:
        return self._holder(key).view(key)

    def read(self, key: str) -> Iterator[memoryview]:
        return self._holder(key).read(key)

    def put(self, key: str, data: bytes) -> None:
        self._above.put(key, data)

    def write(self, key: str, size: int, pieces: Iterable[Bytes]) -> None:
        self._above.write(key, size, pieces)

    def add(self, folder: str, content: Content, known: Known) -> str:
        return self._above.add(folder, content, known)

    def create(self, key: str, data: bytes) -> bool:
        return self.size(key) is None and self._above.create(key, data)

    def size(self, key: str) -> int | None:
        return self._holder(key).size(key)

    def stat(self, key: str) -> Listed | None:
        return self._holder(key).stat(key)

    def list(self, prefix: str) -> Iterator[str]:
        return iter(sorted({*self._below.list(prefix), *self._above.list(prefix)}))

    def listed(self, prefix: str) -> Iterator[Listed]:
        found = {one.key: one for store in (self._below, self._above) for one in store.listed(prefix)}
        return iter(sorted(found.values()))

    def delete(self, key: str) -> None:
        """Remove what was written above; what is below stays, and is seen again."""
        self._above.delete(key)

    def _holder(self, key: str) -> ObjectStore:
        return self._below if self._above.size(key) is None else self._above
