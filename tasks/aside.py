"""Aside: a place for results that are looked at once and that nobody will keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from storage.artifacts import ArtifactStore
from storage.directory import DirectoryObjects
from storage.overlay import Overlay


@contextmanager
def aside(store: ArtifactStore) -> Iterator[ArtifactStore]:
    """A store that reads from `store` and writes into a folder that goes away."""
    with TemporaryDirectory() as folder:
        yield ArtifactStore(Overlay(store.objects, DirectoryObjects(Path(folder))))
