"""BitDelta (arXiv 2402.10193): of every number of a linear layer the sign alone, and one scale for the matrix.

The scale that loses least in the Frobenius norm is the mean magnitude (equation 3 there). The paper then trains the
scales on examples; that step is not here: these are its "initial" figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from storage.errors import Damaged
from tasks.choice import require
from tasks.codecs.base import Codec, Coded, Facts, Leaf, Parts, decoder
from tasks.codecs.dense import Dense, dense_parts
from tasks.codecs.streams import exactly, expand, meta_of, number, part, squeeze, with_meta


@dataclass(frozen=True)
class BitDelta(Codec):
    """Linear weights only: norms, biases, embeddings and whatever has not two dimensions are written as they are, in
    float32, as the paper leaves them.

    scale
        matrix  one for the matrix, as published              row   one for each row
    zeros
        keep    stay zeros, and have no part in the mean: one bit more for each number of a matrix that has any
        plus    are coded as plus the scale, and do have a part in it: what the published code does, where of bfloat16
                checkpoints most numbers may not have changed at all. The paper's text says minus
    """

    source: ClassVar[str] = "arXiv 2402.10193"

    name: Literal["bitdelta"] = "bitdelta"
    version: Literal[1] = 1
    scale: Literal["matrix", "row"] = "matrix"
    zeros: Literal["keep", "plus"] = "keep"

    def encode(self, leaf: Leaf, facts: Facts) -> Coded:
        if leaf.role != "linear.weight" or leaf.delta.ndim != 2:
            return Coded(dense_parts(leaf.delta), decoder(Dense()))
        if not leaf.delta.any():
            return Coded({}, decoder(self))
        delta = leaf.delta.detach().cpu().numpy()
        kept = delta != 0 if self.zeros == "keep" else np.ones(delta.shape, np.bool_)
        axis = 1 if self.scale == "row" else None
        total, count = np.abs(delta).sum(axis=axis, dtype=np.float64), kept.sum(axis=axis, dtype=np.int64)
        scales = np.atleast_1d(total / np.maximum(count, 1)).astype("<f4")
        require(bool(np.isfinite(scales).all()), leaf.name, "numbers whose mean fits into float32", float(total.max()))
        meta = {"codec": decoder(self), "scales": scales.size, "shape": list(delta.shape)}
        streams = {"scales": scales.tobytes(), "signs": np.packbits(np.signbit(delta[kept])).tobytes()}
        if not kept.all():
            streams["mask"] = squeeze(np.packbits(kept))
        return Coded(with_meta(meta, streams), decoder(self))

    @staticmethod
    def decode(parts: Parts, shape: tuple[int, ...]) -> Tensor:
        if not parts:
            return torch.zeros(shape)
        meta, elements = meta_of(parts, shape), math.prod(shape)
        count = number(meta, "scales", 1, max(elements, 1))
        scales = np.frombuffer(exactly(part(parts, "scales"), 4 * count, "scales").tobytes(), dtype="<f4")
        if elements % count or not np.isfinite(scales).all():
            raise Damaged(f"part 'scales' must have a finite number for each of the rows, found {count} of them")
        kept = np.ones(elements, np.bool_)
        if "mask" in parts:
            kept = np.unpackbits(expand(parts, "mask", -(-elements // 8)), count=elements).view(np.bool_)
        signs = int(np.count_nonzero(kept))
        negative = np.unpackbits(exactly(part(parts, "signs"), -(-signs // 8), "signs"), count=signs)
        flat = np.zeros(elements, dtype=np.float32)
        flat[kept] = 1 - 2 * negative.astype(np.float32)
        return torch.from_numpy(flat.reshape(count, -1) * scales[:, None]).reshape(shape)
