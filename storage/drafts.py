"""Drafts: artifacts while they are written. Nothing is visible before the manifest, which comes last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from storage.blobs import encode_parts
from storage.errors import InvalidInput
from storage.manifest import Asset, Lineage, Manifest, TensorRecord, encode_manifest
from storage.manifest import digest as sha256
from storage.refs import Kind, Ref
from storage.uploads import Uploads

if TYPE_CHECKING:
    from storage.artifacts import ArtifactStore

_UNNAMED = "0" * 64  # the blob of a tensor whose bytes are on their way


class Draft:
    """A writer. Its blobs are invisible until `commit` writes the manifest that names them."""

    def __init__(self, store: ArtifactStore, kind: Kind, lineage: Lineage) -> None:
        self._store = store
        self._kind = kind
        self._lineage = lineage
        self._records: dict[str, TensorRecord] = {}
        self._assets: dict[str, Asset] = {}
        self._uploads = Uploads()
        self.facts: dict[str, Any] = {}

    def add(
        self,
        name: str,
        parts: Mapping[str, Tensor],
        *,
        role: str,
        dtype: str,
        shape: Sequence[int],
        codec: str = "dense@1",
        rank: int | None = None,
        onto: str | None = None,
        digest: str | None = None,
        error: float | None = None,
        through: Sequence[str] = (),
    ) -> None:
        """Store one tensor's parts and list them under `name`. The fields are those of TensorRecord.

        Returns while the bytes may still be on their way: what goes wrong is raised by a later `add` or by `commit`.
        """
        data = encode_parts(parts)
        record = TensorRecord(
            name, role, dtype, tuple(shape), _UNNAMED, len(data), codec, rank, onto, digest, error, tuple(through)
        )
        self.share(record)

        def store() -> None:  # hashed there too, so that one thread's hashing is not what all wait for
            self._records[name] = replace(record, blob=self._store.write_blob(data))

        self._uploads.add(store, len(data))

    def share(self, record: TensorRecord) -> None:
        """List a tensor whose blobs another artifact already stored."""
        if record.name in self._records:
            raise InvalidInput(f"tensor {record.name!r} was added twice to one {self._kind}")
        self._records[record.name] = record

    @property
    def names(self) -> list[str]:
        return list(self._records)

    @property
    def records(self) -> list[TensorRecord]:
        """What is listed so far, once its bytes are stored: this waits for those that are on their way."""
        self._uploads.finish()
        return list(self._records.values())

    def add_asset(self, name: str, data: bytes) -> None:
        def store() -> None:
            self._assets[name] = Asset(self._store.write_blob(data), len(data))

        self._uploads.add(store, len(data))

    def add_file(self, name: str, path: Path) -> None:
        """Like `add_asset`, of a file's content; in pieces, so that its size does not matter."""
        self._assets[name] = self._store.write_file(path)

    def share_assets(self, assets: Mapping[str, Asset]) -> None:
        self._assets.update(assets)

    def commit(self) -> Ref:
        """Write the manifest, after all else is stored, and return the artifact's ref."""
        records = tuple(sorted(self.records, key=lambda record: record.name))
        manifest = Manifest(self._kind, self._lineage, records, self.facts, self._assets)
        data = encode_manifest(manifest)
        ref = Ref(f"{self._kind}/{sha256(data)}")
        self._store.objects.put(ref, data)
        return ref
