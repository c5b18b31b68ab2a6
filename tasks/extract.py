"""Extract: tuned minus base, the update (task vector) of one fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from storage.artifacts import Artifact, ArtifactStore
from storage.drafts import Draft
from storage.errors import Mismatch
from storage.manifest import Lineage
from storage.refs import CheckpointRef, UpdateRef, short
from tasks.choice import Choice
from tasks.codecs import dense_parts
from tasks.moments import power
from tasks.tensors import check_finite, dtype_name, read_tensor, wide

HEAD = "head."  # role prefix of tensors that only the tuned side has: kept with the update, never merged


@dataclass(frozen=True)
class Extract(Choice):
    """heads: what to do with tensors that only one side has, such as a classifier on top of the backbone.

    refuse   an error that names them
    keep     those of the tuned side are kept with the update, per task; those of the base stay as they are

    against: what the update of a training that started from a line's head is the difference to. It is merged onto the
    base either way.

    base     the base: it also holds what was merged before. An `average` of such updates is that of the models
    start    what the training started from: it holds what was learned there alone, LoRA's factors exactly. Merged by
             `task_arithmetic`, each step goes `scale` of the way from the merged model to the tuned one
    """

    name: Literal["extract"] = "extract"
    version: Literal[1] = 1
    heads: Literal["refuse", "keep"] = "refuse"
    against: Literal["base", "start"] = "base"

    def spec(self) -> dict[str, Any]:
        """Without what was not chosen, so that updates against the base keep the refs that they always had."""
        return {name: value for name, value in super().spec().items() if (name, value) != ("against", "base")}


def extract_update(
    base: CheckpointRef, tuned: CheckpointRef, spec: Extract, store: ArtifactStore, start: CheckpointRef | None = None
) -> UpdateRef:
    """The update from `base` to `tuned`: subtracted in float32 (float64 if a side has it), LoRA factors kept as such.

    With `start`, the update is the difference to that checkpoint instead, to be merged onto `base` all the same.
    Raises Mismatch if names or shapes differ; both sides are checked before anything is written.
    """
    before, after = store.open(start or base, "checkpoint"), store.open(tuned, "checkpoint")
    shared, heads = _match(before, after, spec)
    inputs = {"base": base, "tuned": tuned, **({"start": start} if start else {})}
    draft = store.draft("update", Lineage("extract", inputs, spec.spec()))
    total = 0.0
    for name in shared:
        total += _extract_one(draft, before, after, name)
    for name in heads:
        record = after.record(name)
        draft.add(name, after.parts(name), role=f"{HEAD}{record.role}", dtype=record.dtype, shape=record.shape)
    draft.facts.update({"norm": total**0.5, "heads": heads, **_origin(after)})
    return UpdateRef(draft.commit())


def _origin(tuned: Artifact) -> dict[str, Any]:
    """The task that was trained, and `external` if that was done elsewhere and the model only read in."""
    task = tuned.manifest.facts.get("task")
    external = tuned.manifest.lineage.step == "ingest"
    return {**({"task": task} if task else {}), **({"external": True} if external else {})}


def _extract_one(draft: Draft, before: Artifact, after: Artifact, name: str) -> float:
    """Add the delta of one tensor; returns its squared norm."""
    old, new = before.record(name), after.record(name)
    if new.rank is not None and new.onto == old.blob:
        draft.add(name, after.parts(name), role=old.role, dtype="F32", shape=old.shape, codec=new.codec, rank=new.rank)
        return power(lambda: [read_tensor(after, name).float() - read_tensor(before, name).float()]).squares
    base, tuned = read_tensor(before, name), read_tensor(after, name)
    if not base.is_floating_point():
        if not torch.equal(base, tuned):
            raise Mismatch(f"integer tensor {name!r}", expected="the same on both sides", found="a difference")
        delta = torch.zeros(base.shape)
    else:
        delta = tuned.to(wide(base, tuned)) - base.to(wide(base, tuned))
    check_finite(delta, name, f"the update {short(after.ref)} - {short(before.ref)}")
    draft.add(name, dense_parts(delta), role=old.role, dtype=dtype_name(delta.dtype), shape=old.shape)
    return power(lambda: [delta]).squares


def _match(before: Artifact, after: Artifact, spec: Extract) -> tuple[list[str], list[str]]:
    """Names to subtract, and names that only the tuned side has; anything else is an error."""
    only_base = [name for name in before.names if name not in after]
    only_tuned = [name for name in after.names if name not in before]
    shared = [name for name in before.names if name in after]
    if not shared:
        raise Mismatch(
            f"tensor names of {short(after.ref)} and its base {short(before.ref)}",
            expected=f"the same architecture ({before.manifest.facts.get('architecture')})",
            found=f"no name in common ({after.manifest.facts.get('architecture')})",
        )
    if spec.heads == "refuse" and (only_base or only_tuned):
        raise Mismatch(
            f"tensor names of {short(after.ref)} and its base {short(before.ref)}",
            expected="the same names",
            found=f"only in the base: {_some(only_base)}; only in the tuned: {_some(only_tuned)}",
            remedy="If these are task heads, set `heads: keep` to store them with the update",
        )
    for name in shared:
        old, new = before.record(name), after.record(name)
        if old.shape != new.shape:
            raise Mismatch(
                f"tensor {name!r} of {short(after.ref)}",
                expected=f"shape {list(old.shape)} as in {short(before.ref)}",
                found=list(new.shape),
                remedy="Tune a model of the same size and vocabulary, or ingest the base it was tuned from",
            )
    return shared, only_tuned


def _some(names: list[str]) -> str:
    return (", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")) or "none"
