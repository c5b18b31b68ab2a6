"""Features: what an encoder makes of inputs, once for all suites that look at the same ones through other heads.

The head is a matrix and the encoder a model, so nearly all the time of such suites goes into features. They are kept
batch by batch, so that a head sees the very numbers, in the very layout, that it would have seen without this.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from storage.manifest import canonical, digest

ROOM = 256 * 2**20  # bytes; a hundred thousand rows of 640 numbers


class Features:
    """Features [rows, D] of one model, for one base and device, in main memory. `room`: bytes; 0 keeps nothing.

    Where there is no room for more, what was kept first goes.
    """

    def __init__(self, room: int = 0) -> None:
        self._room = room
        self._kept: dict[str, list[tuple[Tensor, tuple[int, ...]]]] = {}

    def of(self, inputs: Mapping[str, Any], made: Iterable[Tensor]) -> Iterator[Tensor]:
        """The features [B, D] of every batch: those that were kept, or those that `made` gives now.

        `inputs`: plain values that decide what the encoder sees, and in which batches.
        """
        key = digest(canonical(inputs))
        if key in self._kept:
            for kept, stride in self._kept[key]:
                yield torch.empty_strided(kept.shape, stride, dtype=kept.dtype).copy_(kept)
            return
        lot: list[tuple[Tensor, tuple[int, ...]]] = []
        size = 0
        for one in made:
            size += one.numel() * one.element_size()
            if size <= self._room:
                self._make_room(size)
                lot.append((one.to("cpu", copy=True).contiguous(), one.stride()))
            else:
                lot.clear()
            yield one
        if 0 < size <= self._room:
            self._kept[key] = lot

    def _make_room(self, size: int) -> None:
        while self._kept and size + sum(one.nbytes for lot in self._kept.values() for one, _ in lot) > self._room:
            del self._kept[next(iter(self._kept))]


@runtime_checkable
class Sharing(Protocol):
    """A problem whose features others may use: it asks `shared` for them."""

    shared: Features
