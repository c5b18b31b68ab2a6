"""Reading and checking the tensors of artifacts: the one place where stored parts become numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from storage.artifacts import Artifact
from storage.blobs import DTYPES, Parts
from storage.errors import Damaged, InvalidInput, Mismatch
from storage.manifest import TensorRecord
from storage.refs import short
from tasks.codecs import decode_parts, is_lossless, restore_parts
from tasks.codecs.streams import meta_of, tensor_digest

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' spelling of a dtype."""
    try:
        return _NAMES[dtype]
    except KeyError:
        known = ", ".join(DTYPES)
        raise InvalidInput(f"tensors of {dtype} cannot be stored", remedy=f"Convert to one of {known}") from None


def read_tensor(artifact: Artifact, name: str, device: str = "cpu") -> Tensor:
    """Tensor `name`, decoded, in the dtype its record names.

    A tensor stated against another (`onto`) is added to it in float32, or float64 if either is, and cast once. What a
    lossless codec wrote comes back bit by bit, and is held against its digest.
    """
    record = artifact.record(name)
    onto = read_onto(artifact, record)
    if is_lossless(record.codec):
        if onto is None:
            raise Damaged(f"tensor {name!r} of {short(artifact.ref)} does not say which base it is restored from")
        parts = artifact.parts(name)
        try:
            with _named(artifact, name):
                restored = restore_parts(record.codec, parts, record.shape, onto)
        except Damaged:
            _check_base(artifact, record, parts, onto)
            raise
        if tensor_digest(restored) != record.digest or restored.dtype != DTYPES[record.dtype]:
            _check_base(artifact, record, parts, onto)
            raise Damaged(
                f"tensor {name!r} of {short(artifact.ref)} does not come back as it was written: its digest differs",
                remedy="Run `deltaworks verify` on it, and restore what it names from a copy of the store",
            )
        return restored.to(device)
    decoded = _decoded(artifact, record, device)
    if onto is not None:
        decoded = onto.to(device, wide(onto, decoded)) + decoded
    return decoded.to(DTYPES[record.dtype])


def read_delta(artifact: Artifact, name: str, device: str = "cpu") -> Tensor:
    """Tensor `name` of an update: float32 or float64, as it was decoded, or tuned minus base where both are exact."""
    record = artifact.record(name)
    if not is_lossless(record.codec):
        return _widened(_decoded(artifact, record, device))
    tuned = read_tensor(artifact, name, device)
    onto = read_onto(artifact, record)
    assert onto is not None
    dtype = wide(onto, tuned)
    return tuned.to(dtype) - onto.to(device, dtype)


def foundation(record: TensorRecord, codec: str) -> tuple[str, tuple[str, ...]] | None:
    """What a tensor that the lossless `codec` states against that of `record` has as its `onto` and `through`.

    None where there is nothing to decode step by step: the tensor is a product of factors, or another codec wrote it.
    """
    if record.codec == codec and record.onto is not None:
        return record.onto, (*record.through, record.blob)
    return (record.blob, ()) if record.rank is None and record.codec == "dense@1" else None


def _decoded(artifact: Artifact, record: TensorRecord, device: str) -> Tensor:
    parts = artifact.parts(record.name)
    with _named(artifact, record.name):
        return decode_record(record, parts, device)


@contextmanager
def _named(artifact: Artifact, name: str) -> Iterator[None]:
    """Codecs know parts and shapes only: say which tensor it is that they cannot read."""
    try:
        yield
    except Damaged as error:
        said = str(error).removesuffix(f". {error.remedy}")
        raise Damaged(f"tensor {name!r} of {short(artifact.ref)}: {said}", remedy=error.remedy) from error


def read_onto(artifact: Artifact, record: TensorRecord) -> Tensor | None:
    """What a tensor is stated against, if it is."""
    dense = artifact.onto(record.name)
    if dense is None:
        return None
    found = decode_parts("dense@1", dense, record.shape)
    for parts in artifact.through(record.name):
        with _named(artifact, record.name):
            found = restore_parts(record.codec, parts, record.shape, found)
    return found


def _check_base(artifact: Artifact, record: TensorRecord, parts: Parts, onto: Tensor) -> None:
    """What cannot be restored may have been written against another base."""
    stated, found = meta_of(parts, record.shape).get("base") if parts else record.digest, tensor_digest(onto)
    if stated != found:
        raise Mismatch(
            f"the base of tensor {record.name!r} of {short(artifact.ref)}",
            expected=f"numbers with sha256 {str(stated)[:12]}…",
            found=f"{found[:12]}…",
            remedy="It can be restored only from the base that it was written against",
        )


def decode_record(record: TensorRecord, parts: Parts, device: str = "cpu") -> Tensor:
    if record.rank is None:
        return decode_parts(record.codec, parts, record.shape).to(device)
    left, right = (leaf.to(device) for leaf in decode_factors(record, parts))
    return (left @ right).reshape(record.shape)


def decode_factors(record: TensorRecord, parts: Parts) -> tuple[Tensor, Tensor]:
    """The factors B [m, rank] and A [rank, n] of a record that has a rank."""
    assert record.rank is not None
    rows, columns = record.shape
    shapes = {"B": (rows, record.rank), "A": (record.rank, columns)}
    found = {factor: decode_parts(record.codec, unprefixed(parts, factor), shape) for factor, shape in shapes.items()}
    return _widened(found["B"]), _widened(found["A"])


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(wide(tensor))


def prefixed(parts: Parts, factor: str) -> Parts:
    return {f"{factor}.{key}": part for key, part in parts.items()}


def unprefixed(parts: Parts, factor: str) -> Parts:
    return {key.removeprefix(f"{factor}."): part for key, part in parts.items() if key.startswith(f"{factor}.")}


def wide(*tensors: Tensor) -> torch.dtype:
    """The dtype of arithmetic on these tensors: float64 if one of them has it, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; the least and the greatest tell, in a tenth of the time of `isfinite`."""
    if not tensor.numel() or not tensor.is_floating_point():
        return True
    if tensor.itemsize == 1:  # the small floats have no order in torch
        return bool(torch.isfinite(tensor.float()).all())
    return all(bool(one.isfinite()) for one in torch.aminmax(tensor))  # both are NaN if one entry is


def check_finite(tensor: Tensor, name: str, where: str) -> None:
    """Refuse NaN and infinity: they would spread through every later merge."""
    if not is_finite(tensor):
        bad = int((~torch.isfinite(tensor)).sum())
        raise InvalidInput(
            f"tensor {name!r} of {where}: expected finite numbers, found {bad:,} NaN or infinite of {tensor.numel():,}",
            remedy="The training that produced it diverged; take an earlier checkpoint or a lower learning rate",
        )


def ground_of(update: Artifact) -> str | None:
    """What an update is the difference to: the checkpoint its training started from, if it says so, else its base."""
    inputs = update.manifest.lineage.inputs
    return inputs.get("start", inputs.get("base"))


def check_base(what: Artifact, base: str, *, role: str) -> None:
    """Refuse an artifact that was made from another base."""
    found = what.manifest.lineage.inputs.get("base")
    if found != base:
        raise Mismatch(
            f"the base of {role} {short(what.ref)}",
            expected=short(base),
            found=short(found) if found else "none",
            remedy="Updates merge only into lines of the base they were taken from: extract it again from this base",
        )
