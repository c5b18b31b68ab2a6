"""What `ternary@1` wrote, for reading only: gaps as bytes, through zstandard."""

from __future__ import annotations

import math

import numpy as np
import torch
import zstandard
from torch import Tensor

from storage.errors import Damaged
from tasks.codecs.base import Parts

_FULL = 255  # a gap byte that continues in the next byte


def decode_ternary_1(parts: Parts, shape: tuple[int, ...]) -> Tensor:
    """Parts: `scale` [1], `signs` (bits), and `gaps` (bytes; 255 continues) or `mask` (bits), the last two squeezed."""
    flat = torch.zeros(math.prod(shape))
    if not parts:
        return flat.reshape(shape)
    try:
        if "gaps" in parts:
            stream = _expand(parts["gaps"])
            places = np.cumsum(stream, dtype=np.int64)[stream != _FULL]
            places += np.arange(places.size)
        else:
            places = np.unpackbits(_expand(parts["mask"]), count=flat.numel()).nonzero()[0]
        negative = np.unpackbits(parts["signs"].numpy(), count=places.size)
        values = np.where(negative, -1.0, 1.0).astype(np.float32)
        flat[torch.from_numpy(places)] = torch.from_numpy(values) * parts["scale"]
    except (KeyError, ValueError, IndexError, RuntimeError, zstandard.ZstdError) as error:
        raise Damaged(f"a tensor written by ternary@1 cannot be read: {error}") from error
    return flat.reshape(shape)


def _expand(stream: Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(zstandard.ZstdDecompressor().decompress(stream.numpy().tobytes()), dtype=np.uint8)
