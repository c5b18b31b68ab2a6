"""Pieces: ranges of entries of one parameter, read from the base and the tuned folders as base and deltas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from tasks.folders.names import Parameter
from tasks.folders.reader import Weights
from tasks.tensors import check_finite

PIECE = 1 << 19  # entries read at once: a few float32 tensors of them fit the caches of a core


@dataclass(frozen=True)
class Sources:
    """What is merged: the base, the tuned models, how much each counts, and a key of each for random masks."""

    base: Weights
    tuned: Sequence[Weights]
    weights: Sequence[float]
    keys: Sequence[str]


@dataclass(frozen=True)
class Piece:
    """Entries `start` to `stop` of the flattened parameter."""

    sources: Sources
    parameter: Parameter
    start: int
    stop: int

    @property
    def elements(self) -> int:
        return self.stop - self.start

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of arithmetic: float64 if one of the folders has it, else float32."""
        places = [self.sources.base.places[self.parameter.base]]
        places += [one.places[name] for one, name in zip(self.sources.tuned, self.parameter.tuned, strict=True)]
        return torch.float64 if any(place.dtype == torch.float64 for place in places) else torch.float32

    @cached_property
    def base(self) -> Tensor:
        """The base's entries [elements] in the dtype of arithmetic. Held as long as this object: for small pieces."""
        return self.sources.base.read(self.parameter.base, self.start, self.stop).to(self.dtype)

    def delta(self, index: int) -> Tensor:
        """Tuned minus base [elements], of the tuned model with this index. Integers were found equal: zeros.

        Raises InvalidInput for NaN and infinity.
        """
        if not self.parameter.place.dtype.is_floating_point:
            return torch.zeros(self.elements)
        weights, name = self.sources.tuned[index], self.parameter.tuned[index]
        found = torch.empty(self.elements, dtype=self.dtype)
        for part in self.split(PIECE):
            place = found[part.start - self.start : part.stop - self.start]
            place.copy_(weights.read(name, part.start, part.stop)).sub_(part.base)
            if not bool(place.sum().isfinite()):  # a sum keeps NaN and infinity; one that overflows is looked into
                check_finite(place, name, f"{weights.where(name)} minus {self.sources.base.where(self.parameter.base)}")
        return found

    def shaped(self, flat: Tensor) -> Tensor:
        """`flat` in the parameter's shape if this is the whole parameter."""
        place = self.parameter.place
        return flat.reshape(place.shape) if self.elements == place.elements else flat

    def split(self, size: int) -> Iterator[Piece]:
        """Pieces of at most `size` entries; this one itself if it is as small."""
        if self.elements <= size:
            yield self
            return
        for start in range(self.start, self.stop, size):
            yield replace(self, start=start, stop=min(start + size, self.stop))


def whole(sources: Sources, parameter: Parameter) -> Piece:
    return Piece(sources, parameter, 0, parameter.place.elements)
