"""Versions of a registered model that others made, as checkpoints to be had: the source `models:/NAME` of a watcher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from mlflow.artifacts import download_artifacts

from storage.registry import _KEY, Registry
from storage.registry_errors import mapped

SCHEME = "models:/"


@dataclass(frozen=True)
class Offered:
    """A version that is ready. `source`: where MLflow says that its files are."""

    name: str
    version: int
    source: str

    @property
    def address(self) -> str:
        return f"{SCHEME}{self.name}/{self.version}"


class Versions:
    """The versions of registered model `name`, without those that Deltaworks registered itself."""

    def __init__(self, registry: Registry, name: str) -> None:
        self._registry, self.name = registry, name

    @property
    def url(self) -> str:
        return f"{SCHEME}{self.name}"

    def ready(self) -> list[Offered]:
        """Oldest first; none if there is no such model yet."""
        with mapped(self._registry.tracking):
            found = [
                Offered(self.name, int(one.version), str(one.source))
                for one in self._registry._versions(self.name)
                if one.status == "READY" and _KEY not in one.tags
            ]
        return sorted(found, key=lambda one: one.version)

    @contextmanager
    def files(self, one: Offered) -> Iterator[Path]:
        """A folder with the version's files, copied for as long as the block lasts."""
        with TemporaryDirectory(prefix="deltaworks-") as folder:
            with mapped(self._registry.tracking):
                uri = self._registry._client.get_model_version_download_uri(one.name, str(one.version))
                found = download_artifacts(artifact_uri=uri, dst_path=folder, tracking_uri=self._registry.tracking)
            yield Path(found)
