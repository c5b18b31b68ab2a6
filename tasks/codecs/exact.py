"""Exact: every bit of the tuned tensor, as the floats that lie between it and the base's.

Per tensor the smaller of two forms. `steps`: by how many floats every element moved, most of them by none, in the order
of the base's exponents (tasks/codecs/ulps.py), in which neighbours behave alike, and so are coded together
(tasks/codecs/fields.py). `planes`: the tuned numbers' bytes, first bytes first; whatever the base is. Published formats
for updates of reinforcement learning code byte differences (XOR) or values, in the order of the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from storage.blobs import DTYPES
from storage.errors import Damaged
from tasks.choice import require
from tasks.codecs.base import Codec, Coded, Facts, Leaf, Parts, decoder
from tasks.codecs.fields import read_fields, write_fields
from tasks.codecs.streams import expand, meta_of, number, squeeze, tensor_digest, with_meta
from tasks.codecs.ulps import MANTISSAS, ByExponent, Counts, bits_of, from_bits, steps_by_exponent

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_HALF = 0.5  # of the tensor's bytes: below, planes are not tried, for trained weights take two thirds in planes


@dataclass(frozen=True)
class Exact(Codec):
    """Needs both checkpoints when it writes, and the base when it reads: another base is refused. Decoding gives the
    tuned tensor with all its bits, -0, infinities and payloads of NaN included, and is held against its digest.
    """

    source: ClassVar[str] = "ours: ulp steps, by exponent"
    lossless: ClassVar[bool] = True
    keeps_factors: ClassVar[bool] = True

    name: Literal["exact"] = "exact"
    version: Literal[1] = 1

    def encode(self, leaf: Leaf, facts: Facts) -> Coded:
        require(leaf.sides is not None, f"{leaf.name}: the base and the tuned tensor", "given", None)
        assert leaf.sides is not None
        base, tuned = leaf.sides()
        digest = tensor_digest(tuned)
        meta = {
            "codec": decoder(self),
            "base": tensor_digest(base),
            "dtype": _NAMES[tuned.dtype],
            "shape": list(tuned.shape),
        }
        if meta["base"] == digest and base.dtype == tuned.dtype:
            return Coded({}, decoder(self), digest=digest)
        forms = []
        if base.dtype == tuned.dtype and base.shape == tuned.shape and tuned.dtype in MANTISSAS:
            forms.append(_stepwise(base, tuned, leaf.delta.device))
        if not forms or _size(forms[0]) > _HALF * tuned.nbytes:
            forms.append(_planes(tuned))
        form, streams = min(forms, key=_size)
        return Coded(with_meta({**meta, **form}, streams), decoder(self), digest=digest)

    @staticmethod
    def restore(parts: Parts, shape: tuple[int, ...], base: Tensor) -> Tensor:
        if not parts:
            return base.clone()
        meta = meta_of(parts, shape)
        dtype = DTYPES.get(str(meta.get("dtype")))
        if dtype is None:
            raise Damaged(f"the metadata's 'dtype' must be one of {', '.join(DTYPES)}, found {meta.get('dtype')!r}")
        form = meta.get("form")
        if form == "planes":
            return _from_planes(parts, dtype, shape)
        if form != "steps" or dtype != base.dtype or dtype not in MANTISSAS:
            raise Damaged(f"a tensor of {meta['dtype']} cannot be restored from the form {form!r} and {base.dtype}")
        if math.prod(shape) != base.numel():
            raise Damaged(f"a tensor of shape {list(shape)} cannot be restored from a base of {list(base.shape)}")
        return _from_steps(parts, meta, base).reshape(shape)


Form = tuple[Mapping[str, Any], Mapping[str, bytes]]


def _size(form: Form) -> int:
    return sum(map(len, form[1].values()))


def _planes(tuned: Tensor) -> Form:
    width = tuned.element_size()
    flat = tuned.detach().cpu().contiguous().reshape(-1)
    data = flat.view(torch.uint8).numpy().reshape(-1, width) if flat.numel() else np.empty((0, width), np.uint8)
    return {"form": "planes"}, {"planes": squeeze(np.ascontiguousarray(data.T).reshape(-1))}


def _from_planes(parts: Parts, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    elements, width = math.prod(shape), dtype.itemsize
    data = expand(parts, "planes", elements * width).reshape(width, elements)
    if not elements:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(data.T.copy(order="C").reshape(-1)).view(dtype).reshape(shape)


def _stepwise(base: Tensor, tuned: Tensor, device: torch.device) -> Form:
    if device.type == "cpu":
        found, counts = ByExponent(bits_of(base), MANTISSAS[base.dtype]).steps_to(bits_of(tuned))
    else:
        found, counts = steps_by_exponent(base.to(device), tuned.to(device), MANTISSAS[base.dtype])
    lowest = counts[0][0] if counts else 0
    dense = [dict(counts).get(one, 0) for one in range(lowest, counts[-1][0] + 1)] if counts else []
    meta, streams = write_fields(found)
    return {"form": "steps", "lowest": lowest, "counts": dense, **meta}, streams


def _from_steps(parts: Parts, meta: Mapping[str, Any], base: Tensor) -> Tensor:
    old = bits_of(base)
    found = read_fields(parts, meta, old.size, old.dtype)
    order = ByExponent(old, MANTISSAS[base.dtype])
    return from_bits(order.tuned(found, _counts(meta, old.size)), base.dtype, tuple(base.shape))


def _counts(meta: Mapping[str, Any], elements: int) -> Counts:
    """The exponents of the base that the update was written for: as many elements from the `lowest` on, one by one."""
    lowest, counts = number(meta, "lowest", 0, 1 << 11), meta.get("counts")
    if not isinstance(counts, list) or any(not isinstance(one, int) or one < 0 for one in counts):
        raise Damaged(f"the metadata's 'counts' must be a list of integers, found {counts!r:.80}")
    if sum(counts) != elements:
        raise Damaged(f"the metadata's 'counts' must come to {elements:,} elements, found {sum(counts):,}")
    return [(exponent, count) for exponent, count in enumerate(counts, lowest) if count]
