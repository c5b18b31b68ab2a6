"""The world: the processes of one training. All hold the same weights; each has its share of every batch.

`batch` is that of all processes together, and the loss is the mean over all of it: what every process finds is weighed
by what it counted, so that N processes compute what one does. Sums are then made in another order, and dropout is drawn
anew in every process: nothing else differs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tasks.data import Rows
from tasks.suites.base import Batch, Trainable

WEIGHT = "deltaworks_weight"  # in a batch: how many its loss is the mean of, where a process has only a share of it


class World(NamedTuple):
    """Process `rank` of `size`. The one with rank 0 reports and stores."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> range:
        """The rows of a batch of `count` that this process reads: neighbours, of which there may be none."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes. All must call it."""
        if self.size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def gathered(self, value: Any) -> list[Any]:
        """What every process gave, by rank. All must call it."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found


def this_world() -> World:
    """That of this process, once its training has been set up."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


def weighed(loss: Tensor, weight: float, world: World) -> Tensor:
    """The mean loss over `weight` rows or tokens, as it counts among those of all processes, which are averaged."""
    total = float(world.total(torch.tensor(weight, dtype=torch.float64, device=loss.device)))
    if weight == 0:
        return torch.nan_to_num(loss) * 0  # the mean of nothing
    return loss * (world.size * weight / total)


class Shared:
    """Collates a process's share of a batch. With several processes a batch is given as the numbers of its rows, so
    that each process reads only its own."""

    def __init__(self, rows: Rows, problem: Trainable, world: World) -> None:
        self._rows, self._problem, self._world = rows, problem, world

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Any:
        return self._rows[number] if self._world.size == 1 else number

    def collate(self, batch: list[Any]) -> Batch:
        if self._world.size == 1:
            return self._problem.collate(batch)
        mine = [batch[place] for place in self._world.share(len(batch))]
        found = self._problem.collate([self._rows[number] for number in mine or batch[:1]])
        weight = self._problem.counted(found) if mine else 0
        assert weight is not None  # asked for before the training
        return {**found, WEIGHT: torch.tensor(float(weight), dtype=torch.float64)}
