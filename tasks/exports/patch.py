"""A sparse patch: which entries of the base's tensors change, and what they are afterwards.

The fields are those of a patch in checkpoint coordinates as vLLM loads them (`CheckpointWeightPatch` in its
model_executor/model_loader/checkpoint_weight_patch.py, pull requests 50723 and 53751): `name` of the tensor in the
model's files, full `shape`, `dtype`, flat `indices` (int32 or int64; ascending and unique), `values` in that dtype.
Values replace what is there: a patch that is applied twice does no harm, and no rounding adds up from patch to patch.
Tied weights are in it once, under the name that is on disk.

The tensors are `<name>.indices` and `<name>.values`; patch.json lists them, with the sha256 of the base's tensor and of
the patched one, both as raw little-endian numbers.
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from storage.blobs import DTYPES
from storage.refs import short
from tasks.codecs.streams import tensor_digest
from tasks.export import SHARD_BYTES
from tasks.exports.applied import Applied, Exported, Report, silent
from tasks.exports.spool import Spool
from tasks.folders.writer import new_folder

INDEX = "patch.json"
FORMAT = "deltaworks/patch/1"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_INT32 = 2**31  # tensors with more elements need wider indices


def export_patch(applied: Applied, folder: Path, shard_bytes: int = SHARD_BYTES, report: Report = silent) -> Exported:
    """Write the patch that turns the base's files into those of base + update. Peak memory is two tensors.

    Entries count as changed if one bit differs: -0 and 0 are two values.
    """
    skeleton, total = applied.skeleton, len(applied.skeleton.slots)
    with new_folder(folder) as work:
        with closing(_Shards(work, shard_bytes)) as shards:
            pairs = zip(skeleton.to_disk(applied.before), skeleton.to_disk(applied.after), strict=True)
            elements = plain = 0
            for done, ((name, before), (_, after)) in enumerate(pairs, 1):
                elements, plain = elements + before.numel(), plain + before.nbytes
                shards.add(name, before, after.to(before.dtype))
                report(min(done, total), total)
            patches = shards.finish()
        facts = {"elements": elements, "changed": sum(one["nnz"] for one in patches), "exact": _exact(applied)}
        origin = {"format": FORMAT, "base": applied.base.ref, "update": applied.update.ref}
        (work / INDEX).write_text(json.dumps({**origin, **facts, "patches": patches}, indent=1))
        applied.leave_card(work)
    return Exported(sorted(folder.iterdir()), _said(applied, patches, facts, shards.bytes, plain), facts)


class _Shards:
    """The files of a patch. Positions and values of a tensor are in one of them."""

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._spool, self._full = Spool(folder), 0
        self._patches: list[dict[str, Any]] = []
        self.bytes = 0

    def add(self, name: str, before: Tensor, after: Tensor) -> None:
        """Keep what changed in one tensor, if anything did."""
        old, new = before.contiguous().reshape(-1), after.contiguous().reshape(-1)
        bits = _BITS[old.dtype.itemsize]
        indices = (old.view(bits) != new.view(bits)).nonzero().reshape(-1)
        if not indices.numel():
            return
        indices, values = indices.to(torch.int32 if old.numel() <= _INT32 else torch.int64), new[indices]
        if self._spool.bytes and self._spool.bytes + indices.nbytes + values.nbytes > self._limit:
            self._next()
        self._spool.put(f"{name}.indices", indices)
        self._spool.put(f"{name}.values", values)
        self.bytes += indices.nbytes + values.nbytes
        self._patches.append({**_described(name, before, after, values), "file": self._full})

    def finish(self) -> list[dict[str, Any]]:
        """Write what is left; returns what the index says of each tensor."""
        self._spool.write(f"part-{self._full}")
        self._full += 1
        names = ["patch.safetensors"]
        if self._full > 1:
            names = [f"patch-{number:05d}-of-{self._full:05d}.safetensors" for number in range(1, self._full + 1)]
        for number, name in enumerate(names):
            (self._folder / f"part-{number}").rename(self._folder / name)
        return [{**one, "file": names[one["file"]]} for one in self._patches]

    def close(self) -> None:
        self._spool.close()

    def _next(self) -> None:
        self._spool.write(f"part-{self._full}")
        self._spool.close()
        self._spool, self._full = Spool(self._folder), self._full + 1


def _described(name: str, before: Tensor, after: Tensor, values: Tensor) -> dict[str, Any]:
    return {
        "name": name,
        "shape": list(before.shape),
        "dtype": str(before.dtype).removeprefix("torch."),
        "nnz": values.numel(),
        "nan": int(values.isnan().sum()),
        "base_sha256": tensor_digest(before),
        "sha256": tensor_digest(after),
    }


def _exact(applied: Applied) -> bool:
    """Whether the patched tensors have every bit of the tuned ones, their dtype included."""
    dtypes = {name: DTYPES[applied.base.record(name).dtype] for name in applied.records}
    return applied.all_exact and all(applied.dtype(name) == dtype for name, dtype in dtypes.items())


def _said(applied: Applied, patches: list[dict[str, Any]], facts: dict[str, Any], size: int, plain: int) -> list[str]:
    share = facts["changed"] / facts["elements"] if facts["elements"] else 0.0
    said = [
        f"{facts['changed']:,} of {facts['elements']:,} entries change ({share:.2%}), in {len(patches)} tensors",
        f"applied to {short(applied.base.ref)} it gives "
        + ("the tuned tensors bit for bit" if facts["exact"] else "base + update, cast to the base's dtypes"),
    ]
    if size > plain:
        said.append(f"it is larger than the whole model ({size / 1e6:.1f} MB, {plain / 1e6:.1f} MB): too much changed")
    nan = [one["name"] for one in patches if one["nan"]]
    if nan:
        said.append(f"{len(nan)} tensors change to NaN ({nan[0]} ...), which vLLM refuses: NaN means unchanged there")
    return [*said, *applied.notes]
