"""Blobs of tensors: the bytes of a small safetensors file, and back without copying them.

Reading gives tensors that lie in the buffer that was read and checked: a private memory map where the store is a
directory. The layout is safetensors' own: eight bytes with the header's length, the header as JSON, the data.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import safetensors.torch
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


def encode_parts(parts: Mapping[str, Tensor]) -> bytes:
    """The blob of one tensor's parts: a safetensors file without metadata, whose bytes depend on the parts alone."""
    data: bytes = safetensors.torch.save({key: part.detach().cpu().contiguous() for key, part in parts.items()})
    return data


def decode_parts(data: memoryview, *, what: str) -> Parts:
    """The inverse. `data` is writable memory that nobody else uses: the tensors lie in it. Raises Damaged."""
    try:
        start = 8 + int.from_bytes(data[:8], "little")
        if start > len(data):
            raise ValueError(f"its header would end at {start:,} of {len(data):,} bytes")
        header = json.loads(bytes(data[8:start]))
        return {key: _part(data, start, one) for key, one in header.items() if key != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise Damaged(f"{what} is not a safetensors file: {error}") from error


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
