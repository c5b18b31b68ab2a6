"""SkillPack: each kind of module in the form that suits it, pruned or as singular vectors of falling precision.

GraftLLM (arXiv 2505.18502) prunes embeddings and output heads to their largest entries, and writes linear layers as
singular triplets, the leading ones in 8 bits, the many small ones in 2, rounded by GPTQ to what the layer is given.
Norms and biases stay as they are. The released code computes all this but writes full weights; here it is files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from storage.blobs import encode_parts
from storage.errors import Damaged, Mismatch
from tasks.choice import require
from tasks.codecs.base import Codec, Coded, Facts, Leaf, Parts, decoder
from tasks.codecs.dense import Dense, dense_parts
from tasks.codecs.pruned import prune, read_pruned
from tasks.codecs.rtn import Rtn
from tasks.codecs.streams import meta_of
from tasks.codecs.triplets import read_groups, rounded, triplets_of, write_groups
from tasks.kinds import Kind, kind_of

Bits = Literal[2, 3, 4, 8]
Plan = tuple[tuple[Bits, float], ...]

_DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}


@dataclass(frozen=True)
class SkillPack(Codec):
    """density:     share of the entries of an embedding or output head that stay, with their values. Unpublished
    attention:   bits, and how many triplets have them, of each group of an attention matrix, the largest first: from 1
                 on their number, below 1 a share of the matrix's smaller side, at least one
    mlp:         the same for all other linear layers
    energy:      if set, the MLP's triplets go by it: as many as hold this share of the squared norm. The groups are
                 filled in order, the last takes the rest. The paper's rule; its share is unpublished
    group:       columns of the vectors that share a grid
    scales:      dtype of the grids' scales and of the singular values
    values:      dtype of the numbers that stay numbers: entries of embeddings and heads, norms, biases
    others:      bits of other tensors of two and more dimensions (convolutions, fused experts), by `rtn`; none: as
                 they are. GraftLLM has none such
    rivals:      bits of `rtn` that each linear layer is also written with. Where one takes no more bytes and is no
                 further off, by what the layer gives out if there is calibration data, it stays; numbers as they are
                 stay where they are smaller still. An empty list: groups always
    calibration: examples of the task that the layers' inputs are taken from, for GPTQ. A chain does that;
                 `compress_update` without inputs, and 0, round to the nearest. Conv1D layers, GPT-2's, have none

    The published counts for width 4096: attention [[8, 20], [4, 180], [2, 800]], mlp [[8, 20], [4, 180], [2, 1200]],
    128 examples and group 128. The defaults are their shares of 4096, so that narrow matrices (keys and values of
    grouped heads) are not written whole at three bits and more. Where an update is of nearly full rank, as
    reinforcement learning makes it, `rtn` and `ternary` keep more. LoRA's factors stay as they are.
    """

    source: ClassVar[str] = "arXiv 2505.18502, GraftLLM"
    keeps_factors: ClassVar[bool] = True

    name: Literal["skillpack"] = "skillpack"
    version: Literal[1] = 1
    density: float = 0.1
    attention: Plan = ((8, 0.005), (4, 0.044), (2, 0.195))
    mlp: Plan = ((8, 0.005), (4, 0.044), (2, 0.293))
    energy: float | None = None
    group: int = 128
    scales: Literal["f16", "f32"] = "f16"
    values: Literal["bf16", "f32"] = "bf16"
    others: Bits | None = 4
    rivals: tuple[Bits, ...] = (2, 3, 4, 8)
    calibration: int = 128

    def __post_init__(self) -> None:
        require(0 < self.density < 1, "density", "between 0 and 1", self.density)
        for field, plan in (("attention", self.attention), ("mlp", self.mlp)):
            good = 0 < len(plan) <= 8 and all(0 < size < 1 or float(size).is_integer() for _, size in plan)
            good = good and all(size > 0 for _, size in plan)
            require(good, field, "one to eight groups, each of a share below 1 or a whole number of triplets", plan)
        require(self.energy is None or 0 < self.energy <= 1, "energy", "in (0, 1], or none for counts", self.energy)
        require(self.group > 0, "group", "positive", self.group)
        require(self.calibration >= 0, "calibration", "0 or more", self.calibration)

    @property
    def examples(self) -> int:
        return self.calibration

    def encode(self, leaf: Leaf, facts: Facts) -> Coded:
        if not leaf.delta.any():
            return Coded({}, decoder(self))
        kind = kind_of(leaf.name, leaf.role)
        if leaf.delta.ndim > 1 and kind in ("attention", "mlp"):
            return self._linear(leaf, facts, kind)
        options = [self._as_it_is(leaf)]
        if kind in ("embedding", "head"):
            options.append(Coded(prune(leaf.delta, self.density, self.values, decoder(self)), decoder(self)))
        elif leaf.delta.ndim > 1 and self.others is not None:
            options.append(Rtn(bits=self.others).encode(leaf, facts))
        return min(options, key=lambda one: _size(one.parts))

    @staticmethod
    def decode(parts: Parts, shape: tuple[int, ...]) -> Tensor:
        if not parts:
            return torch.zeros(shape)
        form = meta_of(parts, shape).get("form")
        if form == "pruned":
            return read_pruned(parts, shape)
        if form == "triplets":
            return read_groups(parts, shape).numbers().reshape(shape)
        raise Damaged(f"the metadata's 'form' must be pruned or triplets, found {form!r}")

    def _linear(self, leaf: Leaf, facts: Facts, kind: Kind) -> Coded:
        delta = leaf.delta.detach().to(torch.float32)
        delta_MN = delta.reshape(delta.shape[0], -1)
        moments_NN = None if leaf.inputs is None else _checked(leaf.name, leaf.inputs(), delta_MN)
        found = triplets_of(delta_MN)
        fits = found.top <= torch.finfo(torch.float32).max
        require(fits, leaf.name, "numbers whose singular values fit into float32", found.top)
        plan = self.attention if kind == "attention" else self.mlp
        counts = _counts(plan, found.share_K, min(delta_MN.shape), self.energy if kind == "mlp" else None)
        groups = rounded(found, counts, self.group, self.scales, moments_NN)
        parts = write_groups(groups, decoder(self))
        chosen, size = Coded(parts, decoder(self)), _size(parts)
        off = _loss(delta_MN - groups.numbers().to(delta.device), moments_NN)
        for rival, there in self._rivals(leaf, facts):
            if _size(rival.parts) > size:
                continue
            lost = _loss(delta_MN - there.to(delta).reshape(delta_MN.shape), moments_NN)
            if lost <= off:
                chosen, size, off = rival, _size(rival.parts), lost
        return chosen

    def _rivals(self, leaf: Leaf, facts: Facts) -> Iterator[tuple[Coded, Tensor]]:
        """Other ways to write a linear layer, and what comes back."""
        shape = tuple(leaf.delta.shape)
        for bits in sorted(self.rivals):
            coded = Rtn(bits=bits).encode(leaf, facts)
            yield coded, Rtn.decode(coded.parts, shape)
        if self.rivals:
            coded = self._as_it_is(leaf)
            yield coded, Dense.decode(coded.parts, shape)

    def _as_it_is(self, leaf: Leaf) -> Coded:
        dtype = _DTYPES[self.values]
        found = leaf.delta.detach().to(dtype).contiguous()
        beyond = leaf.delta[~torch.isfinite(found)]
        require(not beyond.numel(), leaf.name, f"numbers that fit into {self.values}", beyond[:1].tolist())
        return Coded(dense_parts(found), decoder(Dense()))


def _counts(plan: Plan, share_K: Tensor, width: int, energy: float | None) -> list[tuple[int, int]]:
    """Bits and number of triplets of every group that has any, of a matrix whose smaller side is `width`."""
    sizes = [int(size) if size >= 1 else max(round(size * width), 1) for _, size in plan]
    # what the arithmetic of the decomposition leaves of singular values of zero is no triplet
    left = max(int((share_K > torch.finfo(torch.float32).eps * width).sum()), 1)
    if energy is not None:
        held_K = share_K.double().square().cumsum(0)
        left = min(left, int((held_K < energy * held_K[-1]).sum()) + 1)
        sizes[-1] = left
    counts: list[tuple[int, int]] = []
    for (bits, _), size in zip(plan, sizes, strict=True):
        if left > 0:
            counts.append((bits, min(size, left)))
        left -= size
    return counts


def _checked(name: str, moments_NN: Tensor, delta_MN: Tensor) -> Tensor:
    columns = delta_MN.shape[1]
    if tuple(moments_NN.shape) != (columns, columns):
        raise Mismatch(
            f"the calibration data of {name!r}",
            expected=f"shape {[columns, columns]}, of its columns",
            found=list(moments_NN.shape),
            remedy="They must be X'X / rows of what this layer is given",
        )
    return moments_NN.to(delta_MN.device, torch.float32)


def _loss(error_MN: Tensor, moments_NN: Tensor | None) -> float:
    """The size of an error: of the layer's output, squared and on average, if its inputs are known."""
    seen_MN = error_MN if moments_NN is None else error_MN @ moments_NN
    return float((seen_MN.double() * error_MN).sum())


def _size(parts: Parts) -> int:
    """Bytes of the file."""
    return len(encode_parts(parts))
