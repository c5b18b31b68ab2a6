"""A stored update beside the base it belongs to: what every form of export reads, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storage.artifacts import Artifact, ArtifactStore
from storage.blobs import DTYPES
from storage.errors import InvalidInput, Mismatch
from storage.manifest import TensorRecord
from storage.refs import UpdateRef, short
from tasks.checkpoints import skeleton_of
from tasks.codecs import is_lossless
from tasks.export import CARD
from tasks.extract import HEAD
from tasks.naming import Skeleton
from tasks.tensors import check_finite, ground_of, is_finite, read_delta, read_tensor, wide

RECORD = "deltaworks.json"  # says in every exported folder, but those of whole models, what it was made from
Report = Callable[[int, int], None]  # done, total


def silent(done: int, total: int) -> None:
    """Reports to nobody."""


@dataclass(frozen=True)
class Exported:
    """What came of an export: its files, and what a person should know of it, a line each."""

    files: list[Path]
    said: list[str]
    facts: Mapping[str, Any] = field(default_factory=dict)


class Applied:
    """An update, its base, and the tensors of base + update.

    `exact(name)`: whether `after(name)` has every bit of the tuned checkpoint. It has for lossless codecs, and for
    dense records as they were extracted as long as the tuned checkpoint is stored. Otherwise it is base + delta, added
    in float32 or float64 and cast to the base's dtype; entries whose delta is zero keep the base's bits.
    """

    def __init__(self, update: Artifact, base: Artifact, tuned: Artifact | None, device: str = "cpu") -> None:
        self.card = ""  # the text of the README.md of what is exported (tasks/card.py)
        self.update, self.base = update, base
        self.skeleton: Skeleton = skeleton_of(base)
        self.device = device
        records = update.manifest.tensors
        self.records = {record.name: record for record in records if not record.role.startswith(HEAD)}
        self.heads = [record.name for record in records if record.role.startswith(HEAD)]
        self.tuned = tuned
        for record in self.records.values():
            self._check(record)

    def _check(self, record: TensorRecord) -> None:
        slot = self.skeleton.slots.get(record.name)
        what = f"tensor {record.name!r} of {short(self.update.ref)}"
        if slot is None:
            raise Mismatch(what, expected=f"a parameter of {self.skeleton.architecture}, its base", found="none")
        if slot.shape != record.shape:
            raise Mismatch(what, expected=f"shape {list(slot.shape)} as in its base", found=list(record.shape))

    def exact(self, name: str) -> bool:
        record = self.records.get(name)
        if record is None or is_lossless(record.codec):
            return True
        return self.tuned is not None and name in self.tuned and record.codec == "dense@1" and not record.error

    def dtype(self, name: str) -> torch.dtype:
        """That of `after(name)`."""
        record = self.records.get(name)
        if record is not None and not is_lossless(record.codec) and self.tuned is not None and self.exact(name):
            record = self.tuned.record(name)
        elif record is None or not is_lossless(record.codec):
            record = self.base.record(name)
        return DTYPES[record.dtype]

    @property
    def all_exact(self) -> bool:
        return all(self.exact(name) for name in self.records)

    def before(self, name: str) -> Tensor:
        """The base's tensor, on the CPU."""
        return read_tensor(self.base, name)

    def delta(self, name: str) -> Tensor:
        """The update's tensor in float32 or float64, on the device."""
        return read_delta(self.update, name, self.device)

    def after(self, name: str) -> Tensor:
        """The tensor of base + update, on the CPU."""
        record = self.records.get(name)
        if record is None:
            return self.before(name)
        if is_lossless(record.codec):
            return read_tensor(self.update, name)
        if self.tuned is not None and self.exact(name):
            return read_tensor(self.tuned, name)
        base, delta = self.before(name), self.delta(name).cpu()
        if not base.is_floating_point():
            return base  # buffers of integers: an extraction refuses those that differ
        found = torch.where(delta == 0, base, (base.to(wide(base, delta)) + delta).to(base.dtype))
        check_finite(found, name, f"{short(self.base.ref)} + {short(self.update.ref)} in {base.dtype}")
        return found

    @property
    def notes(self) -> list[str]:
        """What is in the update, or in its base, and not in what is exported."""
        if not self.heads:
            return []
        return [f"left out: {some(self.heads)}: of the task's head, which the base does not have"]

    def leave_card(self, work: Path) -> None:
        if self.card:
            (work / CARD).write_text(self.card)

    def record(self, form: str, facts: Mapping[str, Any]) -> bytes:
        """The file that says what the folder is."""
        known = {"form": form, "update": self.update.ref, "base": self.base.ref, "left_out_heads": self.heads}
        return json.dumps({**known, **facts}, indent=2, sort_keys=True).encode()


def open_applied(update: UpdateRef, store: ArtifactStore, device: str = "cpu") -> Applied:
    """Raises InvalidInput if the base is no longer stored, Mismatch if the update does not fit it."""
    artifact = store.open(update, "update")
    inputs = artifact.manifest.lineage.inputs
    base = ground_of(artifact)
    if base is None or not store.has(base):
        why = "names no base" if base is None else f"was made from {short(base)}, which is no longer stored"
        raise InvalidInput(
            f"{short(update)} {why}",
            remedy="Ingest the base it was extracted from again: equal files have equal refs",
        )
    tuned = inputs.get("tuned")
    found = store.open(tuned, "checkpoint") if tuned is not None and store.has(tuned) else None
    return Applied(artifact, store.open(base, "checkpoint"), found, device)


def cast(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """`tensor` in `dtype`, on the CPU. Raises InvalidInput if that makes a finite number infinite."""
    found = tensor.to("cpu", dtype)
    if not is_finite(found) and is_finite(tensor):
        raise InvalidInput(f"{what} has numbers that {dtype} cannot hold", remedy="Use float32 or bfloat16")
    return found


def some(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
