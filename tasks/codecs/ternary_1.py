"""What `ternary@1` wrote, for reading only: gaps as bytes, through zstandard."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from storage.errors import Damaged
from tasks.codecs.base import Parts
from tasks.codecs.streams import exactly, expand, expand_up_to, part

_FULL = 255  # a gap byte that continues in the next byte


def decode_ternary_1(parts: Parts, shape: tuple[int, ...]) -> Tensor:
    """Parts: `scale` [1], `signs` (bits), and `gaps` (bytes; 255 continues) or `mask` (bits), the last two squeezed."""
    flat = np.zeros(math.prod(shape), dtype=np.float32)
    if parts:
        places = _places(parts, flat.size)
        signs = exactly(part(parts, "signs"), -(-places.size // 8), "signs")
        negative = np.unpackbits(signs, count=places.size)
        flat[places] = np.where(negative, np.float32(-1), np.float32(1)) * _scale(parts)
    return torch.from_numpy(flat).reshape(shape)


def _places(parts: Parts, elements: int) -> NDArray[np.int64]:
    if "gaps" not in parts:
        return np.flatnonzero(np.unpackbits(expand(parts, "mask", -(-elements // 8)), count=elements))
    stream = expand_up_to(parts, "gaps", elements)  # every byte stands for an element at least
    places: NDArray[np.int64] = np.cumsum(stream, dtype=np.int64)[stream != _FULL]
    places += np.arange(places.size)
    if places.size and int(places[-1]) >= elements:
        raise Damaged(f"part 'gaps' of a ternary tensor leads beyond its {elements:,} elements")
    return places


def _scale(parts: Parts) -> np.float32:
    scale = parts.get("scale")
    if scale is None or scale.dtype != torch.float32 or scale.numel() != 1 or not bool(torch.isfinite(scale).all()):
        raise Damaged(f"part 'scale' of a ternary tensor must be one finite number of float32, found {scale}")
    return np.float32(scale.item())
