"""The workplace of a process: its settings, its store and its registry, opened once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch

from configs.settings import Settings
from storage.address import open_objects
from storage.artifacts import ArtifactStore

if TYPE_CHECKING:
    from storage.registry import Registry


@dataclass(frozen=True)
class Workplace:
    settings: Settings

    @cached_property
    def store(self) -> ArtifactStore:
        wanted = self.settings
        return ArtifactStore(open_objects(wanted.store, wanted.cache, wanted.cache_size))

    @cached_property
    def registry(self) -> Registry:
        from storage.registry import Registry  # mlflow takes seconds to import: only for those who register

        return Registry(self.settings.tracking, self.settings.home / "mlflow-artifacts")


def here() -> Workplace:
    """The workplace that the environment describes. Workers on other machines find the same store in theirs."""
    settings = Settings.from_environment()
    torch.set_num_threads(settings.threads)
    return _open(settings)


@lru_cache(maxsize=8)
def _open(settings: Settings) -> Workplace:
    return Workplace(settings)
