"""Artifacts: manifests and blobs in an object store, written once, checked on every read.

    store = ArtifactStore(open_objects("file:///data/store"))
    draft = store.draft("update", Lineage("extract", {"base": base}))
    draft.add("layers.0.fc1.weight", {"tensor": delta}, role="linear.weight", dtype="F32", shape=delta.shape)
    ref = draft.commit()                       # nothing was visible before this line
    store.open(ref).parts("layers.0.fc1.weight")

Blobs of equal content are one object. The manifest is written last, so its existence means that the artifact is whole.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from storage.blobs import Parts, decode_parts, encode_parts
from storage.drafts import Draft
from storage.errors import Damaged, InvalidInput, Missing
from storage.manifest import (
    Asset,
    Lineage,
    Manifest,
    TensorRecord,
    canonical,
    decode_manifest,
)
from storage.manifest import digest as sha256
from storage.objects import ObjectStore
from storage.refs import KINDS, Kind, Ref, parse_ref, short
from storage.streams import Bytes, Content, Filed, Held, checked, save

FRESH = 24 * 3600.0  # seconds for which a blob that is written again counts as just written: see storage/sweep.py
_RESTORE = (
    "Restore it from a copy of the store. Without one: delete it and the artifacts that need it, which "
    "`deltaworks verify --all` lists, and run the flow again"
)


class Memo(NamedTuple):
    """What a step gave, and what was noted about it, such as the seconds that it took."""

    ref: Ref
    about: Mapping[str, Any]


class Artifact:
    """A lazy reader: the manifest is in memory, tensors are fetched one by one."""

    def __init__(self, store: ArtifactStore, ref: Ref, manifest: Manifest) -> None:
        self.store = store
        self.ref = ref
        self.manifest = manifest
        self._records = {record.name: record for record in manifest.tensors}

    @property
    def names(self) -> list[str]:
        return list(self._records)

    def __contains__(self, name: str) -> bool:
        return name in self._records

    def record(self, name: str) -> TensorRecord:
        try:
            return self._records[name]
        except KeyError:
            raise Missing(f"{short(self.ref)} has no tensor {name!r}") from None

    def parts(self, name: str) -> Parts:
        """The stored parts of tensor `name`, still encoded."""
        record = self.record(name)
        return self.store.read_parts(record.blob, what=f"tensor {name!r} of {short(self.ref)}")

    def onto(self, name: str) -> Parts | None:
        """The parts of the dense tensor that `name` is stated against, if it is."""
        blob = self.record(name).onto
        return self.store.read_parts(blob, what=f"base of tensor {name!r} of {short(self.ref)}") if blob else None

    def through(self, name: str) -> Iterator[Parts]:
        """The parts of what lies between that tensor and the parts of `name` itself, in the order of decoding."""
        for blob in self.record(name).through:
            yield self.store.read_parts(blob, what=f"an earlier version of tensor {name!r} of {short(self.ref)}")

    def asset(self, name: str) -> bytes:
        try:
            blob = self.manifest.assets[name].blob
        except KeyError:
            raise Missing(f"{short(self.ref)} has no asset {name!r}") from None
        return bytes(self.store.read_blob(blob, what=f"asset {name!r} of {short(self.ref)}"))

    def save_asset(self, name: str, path: Path) -> None:
        """Write an asset into a file, whole or not at all; in pieces, so that its size does not matter."""
        try:
            blob = self.manifest.assets[name].blob
        except KeyError:
            raise Missing(f"{short(self.ref)} has no asset {name!r}") from None
        save(self.store.stream_blob(blob, what=f"asset {name!r} of {short(self.ref)}"), path)


class ArtifactStore:
    """Artifacts on top of an object store."""

    def __init__(self, objects: ObjectStore) -> None:
        self.objects = objects

    @property
    def url(self) -> str:
        return self.objects.url

    def address(self, ref: Ref) -> str:
        """The full address of an artifact: `s3://bucket/prefix/checkpoint/<sha256>`."""
        return f"{self.url.rstrip('/')}/{ref}"

    def draft(self, kind: Kind, lineage: Lineage) -> Draft:
        return Draft(self, kind, lineage)

    def open(self, ref: str, kind: Kind | None = None) -> Artifact:
        """The artifact named `ref`; its manifest is checked against the name."""
        name = parse_ref(ref, kind)
        data = self.objects.get(name)
        _check(data, name.partition("/")[2], short(name))
        manifest = decode_manifest(data, source=short(name))
        if manifest.kind != name.partition("/")[0]:
            raise Damaged(f"{short(name)} is named a {name.partition('/')[0]}, but says it is a {manifest.kind!r}")
        return Artifact(self, name, manifest)

    def has(self, ref: str) -> bool:
        return self.objects.size(parse_ref(ref)) is not None

    def refs(self, kind: Kind | None = None) -> Iterator[Ref]:
        for one in [kind] if kind else KINDS:
            for key in self.objects.list(f"{one}/"):
                with suppress(InvalidInput):  # a stray file that somebody put there
                    yield parse_ref(key)

    def resolve(self, text: str) -> Ref:
        """A ref from a full ref or an unambiguous beginning of one (`update/1b2c`), as people type it."""
        kind, _, start = text.partition("/")
        if kind not in KINDS or not start:
            return parse_ref(text)
        found = list(self.objects.list(text))
        if len(found) == 1:
            return parse_ref(found[0])
        if found:
            raise InvalidInput(f"{text} could be {len(found)} artifacts", remedy="Give more digits of the ref")
        raise Missing(f"no {kind} in {self.url} begins with {start!r}")

    def write_tensor(
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
    ) -> TensorRecord:
        """Store one tensor's parts; the record lists them in a draft, here or wherever the manifest is written."""
        data = encode_parts(parts)
        blob = self.write_blob(data)
        size = len(data)
        return TensorRecord(
            name, role, dtype, tuple(shape), blob, size, codec, rank, onto, digest, error, tuple(through)
        )

    def write_blob(self, data: bytes) -> str:
        """Store `data` under its sha256, unless it is there already, and return the sha256."""
        return self._add(Held(data))

    def write_file(self, path: Path) -> Asset:
        """Store a file's content as a blob, in pieces, so that its size does not matter."""
        content = Filed(path)
        return Asset(self._add(content), content.size)

    def _add(self, content: Content) -> str:
        return self.objects.add("blob", content, lambda name: self._is_fresh(name, content.size))

    def _is_fresh(self, name: str, size: int) -> bool:
        """Whether a blob is there and need not be written. One that is there since long is written again: a prune that
        runs at this moment may hold it for forgotten."""
        found = self.objects.stat(f"blob/{name}")
        return found is not None and found.bytes == size and found.modified >= time.time() - FRESH

    def read_blob(self, name: str, *, what: str) -> memoryview:
        """The bytes of a blob, checked, in memory of their own."""
        try:
            data = self.objects.view(f"blob/{name}")
        except Missing as error:
            raise Missing(f"blob/{name} ({what}) is not in {self.url}", remedy=_RESTORE) from error
        if sha256(data) != name:
            data = self.objects.view(f"blob/{name}")  # the way here may be to blame: look once more
            _check(data, name, f"blob/{name} ({what})")
        return data

    def stream_blob(self, name: str, *, what: str) -> Iterator[Bytes]:
        """The bytes of a blob piece by piece; after the last one, Damaged unless they are what the name says."""
        try:
            yield from checked(self.objects.read(f"blob/{name}"), name, what=f"blob/{name} ({what})", remedy=_RESTORE)
        except Missing as error:
            raise Missing(f"blob/{name} ({what}) is not in {self.url}", remedy=_RESTORE) from error

    def check_blob(self, name: str, *, what: str) -> int:
        """Read a blob and hold it against its name; its size."""
        return sum(len(piece) for piece in self.stream_blob(name, what=what))

    def read_parts(self, name: str, *, what: str) -> Parts:
        return decode_parts(self.read_blob(name, what=what), what=f"blob/{name} ({what})")

    def remember(self, key: str, ref: Ref, about: Mapping[str, Any]) -> None:
        """Note that the step with content key `key` gave `ref`. See `recall`."""
        self.objects.put(f"memo/{key}", canonical({"ref": ref, **about}))

    def recall(self, key: str) -> Memo | None:
        """What the step with content key `key` gave before, if the artifact is still there."""
        try:
            found = _decode_memo(self.objects.get(f"memo/{key}"))
        except Missing:
            return None
        return found if found is not None and self.has(found.ref) else None


def _decode_memo(data: bytes) -> Memo | None:
    """None if the memo is unreadable, because a lost memo only costs a recomputation."""
    try:
        about = json.loads(data)
        return Memo(parse_ref(about.pop("ref")), about)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _check(data: bytes | memoryview, expected: str, what: str) -> None:
    found = sha256(data)
    if found != expected:
        raise Damaged(
            f"{what} is damaged: its {len(data):,} bytes have sha256 {found[:12]}…, its name says {expected[:12]}…",
            remedy=_RESTORE,
        )
