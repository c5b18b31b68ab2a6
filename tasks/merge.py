"""Merge: fold one update into a state, and write base plus state as a checkpoint. One tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from storage.artifacts import Artifact, ArtifactStore
from storage.errors import InvalidInput, Mismatch
from storage.manifest import Lineage, canonical
from storage.refs import CheckpointRef, StateRef, UpdateRef, short
from tasks.extract import HEAD
from tasks.mergers import MERGERS, AnyMerger, Target
from tasks.tensors import check_base, decode_record, dtype_name, read_tensor, wide


def fold_update(
    base: CheckpointRef,
    state: StateRef | None,
    update: UpdateRef,
    merger: AnyMerger,
    store: ArtifactStore,
    device: str = "cpu",
) -> StateRef:
    """The state after merging `update` into `state` (None: the first update of a line from `base`).

    Raises Mismatch if the update was taken from another base, has other tensors, or the state another merger.
    """
    newcomer = store.open(update, "update")
    check_base(newcomer, base, role="update")
    before = _open_state(store, base, state, merger)
    records = [record for record in newcomer.manifest.tensors if not record.role.startswith(HEAD)]
    if before is not None and before.names != [record.name for record in records]:
        different = sorted(set(before.names) ^ {record.name for record in records})
        raise Mismatch(
            f"tensors of {short(update)}",
            expected=f"those of {short(before.ref)}",
            found=f"differing: {different[:5]}",
            remedy="All updates of a line must cover the same tensors: tune the same architecture for every task",
        )

    def deltas() -> Iterator[Tensor]:
        for record in records:
            yield decode_record(record, newcomer.parts(record.name), device)

    survey = merger.survey(deltas)
    inputs = {"base": base, "update": update, **({"state": state} if state else {})}
    draft = store.draft("state", Lineage("fold", inputs, merger.spec()))
    facts: Mapping[str, float] = before.manifest.facts if before else {}
    sums: dict[str, float] = {}
    for record, delta in zip(records, deltas(), strict=True):
        parts = None
        if before is not None:
            parts = {key: part.to(device) for key, part in before.parts(record.name).items()}
        folded, share = merger.fold(parts, delta, Target(record.name, record.role), facts, survey)
        draft.add(
            record.name,
            folded,
            role=record.role,
            dtype=dtype_name(next(iter(folded.values())).dtype),
            shape=record.shape,
            codec=f"{merger.name}@{merger.version}",
        )
        for key, value in share.items():
            sums[key] = sums.get(key, 0.0) + value
    draft.facts.update(merger.close(facts, sums))
    return StateRef(draft.commit())


def materialize(base: CheckpointRef, state: StateRef, store: ArtifactStore, device: str = "cpu") -> CheckpointRef:
    """Base plus the merged delta, as a checkpoint in the base's dtypes. Untouched tensors share the base's blobs."""
    root, merged = store.open(base, "checkpoint"), store.open(state, "state")
    check_base(merged, base, role="state")
    merger = merger_of(merged)
    draft = store.draft("checkpoint", Lineage("materialize", {"base": base, "state": state}))
    for record in root.manifest.tensors:
        if record.name not in merged:
            draft.share(record)
            continue
        parts = {key: part.to(device) for key, part in merged.parts(record.name).items()}
        delta = merger.delta(parts, merged.manifest.facts)
        if not delta.any():
            draft.share(record)
            continue
        dense = read_tensor(root, record.name, device)
        tensor = (dense.to(wide(dense, delta)) + delta).to(dense.dtype)
        draft.add(record.name, {"tensor": tensor}, role=record.role, dtype=dtype_name(tensor.dtype), shape=record.shape)
    draft.share_assets(root.manifest.assets)
    draft.facts.update({**root.manifest.facts, "merger": merger.name, "merged": int(merged.manifest.facts["count"])})
    return CheckpointRef(draft.commit())


def merger_of(state: Artifact) -> AnyMerger:
    """The merger that made a state, with its settings."""
    spec: dict[str, Any] = dict(state.manifest.lineage.spec)
    kind = MERGERS.get(str(spec.get("name")))
    if kind is None:
        raise InvalidInput(f"{short(state.ref)} was made by merger {spec.get('name')!r}, which this version lacks")
    return kind(**spec)


def _open_state(
    store: ArtifactStore, base: CheckpointRef, state: StateRef | None, merger: AnyMerger
) -> Artifact | None:
    if state is None:
        return None
    before = store.open(state, "state")
    check_base(before, base, role="state")
    if canonical(dict(before.manifest.lineage.spec)) != canonical(merger.spec()):
        raise Mismatch(f"merger of {short(state)}", expected=merger.spec(), found=dict(before.manifest.lineage.spec))
    return before
