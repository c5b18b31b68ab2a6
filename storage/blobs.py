"""Blobs of tensors: the bytes of a small safetensors file, and back without copying them.

Reading gives tensors that lie in the buffer that was read and checked: a private memory map where the store is a
directory. The layout is safetensors' own: eight bytes with the header's length, the header as JSON, the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from storage.errors import Damaged

Parts = dict[str, Tensor]

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# the library writes the widest numbers first, so that every tensor begins at a multiple of its numbers' size
_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")
_RANK = {DTYPES[name]: rank for rank, name in enumerate(_ORDER)}


def encode_parts(parts: Mapping[str, Tensor]) -> bytes:
    """The blob of one tensor's parts: a safetensors file without metadata, whose bytes depend on the parts alone.

    They are those that safetensors 0.8 writes, put together with one copy of the data where the library makes three.
    """
    ready = {key: part.detach().cpu().contiguous() for key, part in parts.items()}
    order = sorted(ready, key=lambda key: (_RANK[ready[key].dtype], key.encode()))
    header, end = {}, 0
    for key in order:
        begin, end = end, end + ready[key].nbytes
        header[key] = {"dtype": _NAMES[ready[key].dtype], "shape": list(ready[key].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(_bytes(ready[key]) for key in order)])


def decode_parts(data: memoryview, *, what: str) -> Parts:
    """The inverse. `data` is writable memory that nobody else uses: the tensors lie in it. Raises Damaged."""
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        if start > len(data):
            raise ValueError(f"its header would end at {start:,} of {len(data):,} bytes")
        header = json.loads(bytes(data[8:start]))
        return {key: _part(data, start, one) for key, one in header.items() if key != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise Damaged(f"{what} is not a safetensors file: {error}") from error


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, whatever its dtype; numpy has no bfloat16."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _part(data: memoryview, start: int, header: Any) -> Tensor:
    dtype, shape = DTYPES[header["dtype"]], tuple(int(size) for size in header["shape"])
    begin, end = (start + int(offset) for offset in header["data_offsets"])
    count = math.prod(shape)
    if min(shape, default=0) < 0 or not (start <= begin <= end <= len(data)) or end - begin != count * dtype.itemsize:
        raise ValueError(f"a tensor of shape {list(shape)} cannot lie at {begin:,} to {end:,} of {len(data):,} bytes")
    if not count:
        return torch.empty(shape, dtype=dtype)
    buffer, offset = data, begin
    if begin % dtype.itemsize:  # a tensor must begin at a multiple of its numbers' size
        buffer, offset = memoryview(bytearray(data[begin:end])), 0
    return torch.frombuffer(buffer, dtype=dtype, count=count, offset=offset).reshape(shape)
