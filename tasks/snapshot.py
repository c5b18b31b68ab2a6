"""Snapshot: publish the next checkpoint of a training, as what changed since the last one, or whole every so often.

One step of reinforcement learning changes a few per cent of the bits of bfloat16 weights, so that a version takes a
fraction of the model. Reading one goes through all versions since the last anchor, which is why there are anchors; they
are complete, and are the very checkpoint that ingesting the folder alone would give.
"""

from __future__ import annotations

from dataclasses import dataclass

from storage.artifacts import ArtifactStore
from storage.errors import Conflict, InvalidInput
from storage.manifest import Manifest
from storage.refs import CheckpointRef, short
from storage.series import Series, Version
from tasks.ingest import Checkpoint, ingest

ANCHORS = 10  # versions from one anchor to the next


@dataclass(frozen=True)
class Published:
    """What publishing gave. `is_new`: False if the newest version has these very weights and files already."""

    version: Version
    is_new: bool


def snapshot(
    spec: Checkpoint,
    series: Series,
    store: ArtifactStore,
    *,
    anchors: int = ANCHORS,
    after: CheckpointRef | None = None,
) -> Published:
    """Publish the checkpoint `spec` as the next version of `series`; every `anchors`-th one whole.

    `after`: the version that it must come after. Raises Conflict if that is not the newest one, or if another version
    came in between; Mismatch if the checkpoint is of another architecture. Then nothing is published.
    """
    if anchors < 1:
        raise InvalidInput(f"a series needs an anchor every so many versions, 1 or more, found {anchors}")
    newest = series.newest()
    if after is not None and (newest is None or newest.checkpoint != after):
        raise Conflict(
            f"series {series.name!r}: this checkpoint was made to come after {short(after)}, the newest version is "
            f"{short(newest.checkpoint) if newest else 'none yet'}",
            remedy="What was computed against another version must not be taken for a step from this one",
        )
    if newest is None:
        return Published(series.append(None, ingest(spec, store), anchor=True), True)
    found = ingest(spec, store, newest.checkpoint)
    before, now = (store.open(ref, "checkpoint").manifest for ref in (newest.checkpoint, found))
    if (before.tensors, before.assets) == (now.tensors, now.assets):
        return Published(newest, False)
    is_anchor = newest.since_anchor + 1 >= anchors
    if is_anchor:
        found = ingest(spec, store)  # a second time: only the steps told whether there is anything new
    return Published(series.append(newest, found, anchor=is_anchor), True)


def own_bytes(before: Manifest | None, manifest: Manifest) -> int:
    """Bytes of the tensors' blobs that a version needs and the one before it does not."""
    known = before.blobs() if before else set()
    return sum({record.blob: record.bytes for record in manifest.tensors if record.blob not in known}.values())
