"""Base + update as a whole model, and the update alone as dense tensors: folders of safetensors, written in place."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from pathlib import Path

import torch
from torch import Tensor

from storage.errors import InvalidInput
from storage.refs import short
from tasks.checkpoints import HISTORY
from tasks.export import SHARD_BYTES
from tasks.exports.applied import RECORD, Applied, Exported, Report, cast, silent
from tasks.folders.writer import Form, ShardWriter, new_folder
from tasks.naming import Skeleton

Read = Callable[[str], Tensor]


def export_checkpoint(
    applied: Applied, folder: Path, shard_bytes: int = SHARD_BYTES, report: Report = silent
) -> Exported:
    """Write base + update to `folder`, with the base's config and tokenizer, or the tuned model's own if it is stored
    and nothing but its tensors is in the folder. Peak memory is a tensor (or the few that transformers fuses)."""
    assets = applied.base
    if applied.all_exact and applied.tuned is not None and set(applied.tuned.names) == set(applied.base.names):
        assets = applied.tuned
    with new_folder(folder) as work:
        _write(work, applied.skeleton, applied.dtype, applied.after, shard_bytes, report)
        for name in sorted(set(assets.manifest.assets) - {HISTORY}):
            assets.save_asset(name, work / name)
        applied.leave_card(work)
    said = [_kind(applied), *applied.notes, f'load it with AutoModel.from_pretrained("{folder}")']
    return Exported(sorted(folder.iterdir()), said, {"exact": applied.all_exact})


def export_delta(
    applied: Applied,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    report: Report = silent,
) -> Exported:
    """Write the update to `folder`: dense tensors in `dtype` under the names that the base's files have."""
    if not dtype.is_floating_point:
        raise InvalidInput(f"a delta cannot be written in {dtype}", remedy="Use float32, bfloat16 or float16")

    def read(name: str) -> Tensor:
        return cast(applied.delta(name), dtype, f"tensor {name!r} of {short(applied.update.ref)}")

    skeleton = copy(applied.skeleton)
    skeleton.slots = {name: slot for name, slot in skeleton.slots.items() if name in applied.records}
    with new_folder(folder) as work:
        _write(work, skeleton, lambda name: dtype, read, shard_bytes, report)
        (work / RECORD).write_bytes(applied.record("delta", {"dtype": str(dtype).removeprefix("torch.")}))
        applied.leave_card(work)
    said = [f"tuned minus base in {str(dtype).removeprefix('torch.')}, to be added to the base's tensors"]
    return Exported(sorted(folder.iterdir()), [*said, *applied.notes])


def _write(
    folder: Path,
    skeleton: Skeleton,
    dtype: Callable[[str], torch.dtype],
    read: Read,
    shard_bytes: int,
    report: Report,
) -> None:
    """All tensors of the skeleton under their names on disk. Their forms are found on the meta device beforehand."""

    def stand_in(name: str) -> Tensor:
        return torch.empty(skeleton.slots[name].shape, dtype=dtype(name), device="meta")

    forms = {disk: Form(one.dtype, tuple(one.shape)) for disk, one in skeleton.to_disk(stand_in)}
    writer = ShardWriter(folder, forms, shard_bytes)
    try:
        for done, (disk, tensor) in enumerate(skeleton.to_disk(read), 1):
            assert tuple(tensor.shape) == forms[disk].shape
            writer.write(disk, 0, tensor.contiguous())
            report(done, len(forms))
    finally:
        writer.close()


def _kind(applied: Applied) -> str:
    if not applied.all_exact:
        return "base + update, cast to the base's dtypes"
    rest = sorted(set(applied.base.names) - set(applied.records))
    alone = f"; {len(rest)} tensors that the tuned model does not have are the base's" if rest else ""
    return f"bit for bit the tuned checkpoint{alone}"
