"""Exact: every bit of the tuned tensor, as the floats that lie between it and the base's.

Per tensor the smallest of three forms. `sparse`: places of the elements that changed, as gaps, and by how many floats;
both in the order of the base's exponents (tasks/codecs/ulps.py), in which neighbours behave alike. `steps`: the same
for all elements, changed or not. `planes`: the tuned numbers' bytes, first bytes first; whatever the base is. Published
formats for updates of reinforcement learning code byte differences (XOR) or values, in the order of the file.
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
from tasks.codecs.streams import (
    expand,
    meta_of,
    narrow,
    number,
    read_numbers,
    squeeze,
    tensor_digest,
    with_meta,
    write_numbers,
)
from tasks.codecs.ulps import MANTISSAS, ByExponent, Unsigned, bits_of, from_bits, stepped, steps

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST = 0.2  # share of changed elements from which gaps save neither bytes nor time
_HALF = 0.5  # of the tensor's bytes: below, planes are not tried, for trained weights take two thirds in planes
_CHUNK = 1 << 14  # numbers that are modelled together: few exponents, and enough to pay for the model


@dataclass(frozen=True)
class Exact(Codec):
    """Needs both checkpoints when it writes, and the base when it reads: another base is refused. Decoding gives the
    tuned tensor with all its bits, -0, infinities and payloads of NaN included, and is held against its digest.
    """

    source: ClassVar[str] = "ours: gaps by exponent, ulp steps"
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
            forms.append(_stepwise(base, tuned))
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
        if form not in ("sparse", "steps") or dtype != base.dtype or dtype not in MANTISSAS:
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


def _stepwise(base: Tensor, tuned: Tensor) -> Form:
    """`sparse`, or `steps` where many changed."""
    old, new = bits_of(base), bits_of(tuned)
    moved = ByExponent(old, MANTISSAS[base.dtype]).ordered(steps(old, new))
    places = np.flatnonzero(moved)
    if places.size > _MOST * old.size:
        return {"form": "steps"}, {"steps": write_numbers(moved, _CHUNK)}
    gaps = narrow(np.diff(places, prepend=-1) - 1)
    streams = {
        "gaps": write_numbers(gaps, _CHUNK),
        "steps": write_numbers(moved[places] - moved.dtype.type(1), _CHUNK),
    }
    return {"form": "sparse", "count": places.size}, streams


def _from_steps(parts: Parts, meta: Mapping[str, Any], base: Tensor) -> Tensor:
    old = bits_of(base)
    if meta["form"] == "sparse":
        moved = _spread(parts, number(meta, "count", 1, old.size), old)
    else:
        moved = _steps(parts, old.size, old)
    order = ByExponent(old, MANTISSAS[base.dtype])
    return from_bits(stepped(old, order.in_place(moved)), base.dtype, tuple(base.shape))


def _spread(parts: Parts, count: int, old: Unsigned) -> Unsigned:
    """The steps of all elements, of which `count` are not zero."""
    gaps = read_numbers(parts, "gaps", count)
    if int(gaps.max()) >= old.size or int(gaps.sum(dtype=np.uint64)) + count > old.size:
        raise Damaged(f"part 'gaps' of an exact tensor leads beyond its {old.size:,} elements")
    places = np.cumsum(gaps, dtype=np.int64)
    places += np.arange(count)
    found = np.zeros_like(old)
    found[places] = _steps(parts, count, old) + old.dtype.type(1)
    return found


def _steps(parts: Parts, count: int, old: Unsigned) -> Unsigned:
    found = read_numbers(parts, "steps", count)
    if found.dtype.itemsize > old.dtype.itemsize:
        raise Damaged(f"part 'steps' of an exact tensor is wider than its numbers of {old.dtype.itemsize} bytes")
    return found.astype(old.dtype, copy=False)
