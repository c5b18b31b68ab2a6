"""The largest entries of a tensor with their values: gaps between them, and each value as it is.

Values are coded as the integers that their bits make: those that are kept are much alike in size, and so in exponent.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from storage.errors import Damaged
from tasks.codecs.base import Parts
from tasks.codecs.streams import meta_of, narrow, number, read_numbers, with_meta, write_numbers
from tasks.select import kth_magnitude

# numpy has no bfloat16, and torch gives it signed integers only
_BITS: dict[str, tuple[torch.dtype, torch.dtype, str, str]] = {
    "bf16": (torch.bfloat16, torch.int16, "<i2", "<u2"),
    "f32": (torch.float32, torch.int32, "<i4", "<u4"),
}


def prune(delta: Tensor, density: float, values: str, codec: str) -> Parts:
    """The parts of `delta`, of which the entry at rank d - int(d * density) and all that are as large stay.

    That is the rule of `ternary`, for one tensor. `values`: the dtype they are kept in, `bf16` or `f32`.
    """
    dtype, signed, _, width = _BITS[values]
    flat = delta.detach().cpu().reshape(-1)
    threshold = kth_magnitude(lambda: [flat], lambda count: max(count - int(count * density), 1))
    kept = flat.abs() >= threshold if threshold > 0 else flat != 0
    places = np.flatnonzero(kept.numpy())
    gaps = np.diff(places, prepend=-1) - 1
    bits = flat[kept].to(dtype).view(signed).numpy().view(width)
    meta = {
        "codec": codec,
        "form": "pruned",
        "count": int(places.size),
        "shape": list(delta.shape),
        "values": values,
    }
    return with_meta(meta, {"gaps": write_numbers(narrow(gaps)), "values": write_numbers(bits)})


def read_pruned(parts: Parts, shape: tuple[int, ...]) -> Tensor:
    """The inverse, in float32."""
    meta, elements = meta_of(parts, shape), math.prod(shape)
    count, values = number(meta, "count", 1, elements), str(meta.get("values"))
    if values not in _BITS:
        raise Damaged(f"the metadata's 'values' must be bf16 or f32, found {values!r}")
    dtype, _, signed, width = _BITS[values]
    gaps, bits = read_numbers(parts, "gaps", count), read_numbers(parts, "values", count)
    if int(gaps.max()) >= elements or int(gaps.sum(dtype=np.uint64)) + count > elements:
        raise Damaged(f"part 'gaps' leads beyond the tensor's {elements:,} elements")
    if bits.dtype != width:
        raise Damaged(f"part 'values' must be of {values}")
    numbers = torch.from_numpy(bits.view(signed)).view(dtype).float()
    if not bool(torch.isfinite(numbers).all()):
        raise Damaged("part 'values' must be finite")
    flat = torch.zeros(elements)
    flat[torch.from_numpy(np.cumsum(gaps, dtype=np.int64) + np.arange(count))] = numbers
    return flat.reshape(shape)
