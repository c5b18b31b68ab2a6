"""What a merger is. Sequential mergers are folds over updates, in constant memory; joint mergers need all updates.

Sequential: for every update, in order, `survey` the whole update; `fold` each of its tensors into the state's parts;
add up the `Sums` that the folds return; `close` turns them into the facts of the new state. `delta` then gives merged
minus base, tensor by tensor. A fold never needs the tensors of earlier updates, so memory does not grow with their
number, and tensors may be folded anywhere in any order as long as their sums are added in the order of their names.

Joint: the state is the list of the updates. `combine` sees one tensor of all of them when the model is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tasks.choice import Choice
from tasks.packed import Planes, added
from tasks.select import Stream

Parts = dict[str, Tensor]
Facts = Mapping[str, float]  # whole-model numbers of a state or of an update
Sums = Mapping[str, float]  # one tensor's share of them
Columns = Callable[[], Iterable[Sequence[Tensor]]]  # several deltas of one tensor, piece by piece; called once per pass
Mix = Callable[[Sequence[Tensor], int], Tensor]  # deltas of one piece and its first entry -> their merged delta

_PIECE = 1 << 16  # elements that stay in a core's cache in float64


@dataclass(frozen=True)
class Target:
    """Which parameter is folded: its name, and its role in its module (`linear.weight`, `norm.bias`, `bare` ...)."""

    name: str
    role: str


@dataclass(frozen=True)
class Merger(Choice):
    """What `deltaworks mergers` tells of every merger.

    source:     where the method comes from
    state_size: numbers kept per parameter of the model
    weighted:   whether an update may count more than another
    """

    source: ClassVar[str]
    state_size: ClassVar[str]
    weighted: ClassVar[bool] = False

    name: str
    version: int


@dataclass(frozen=True)
class Sequential(Merger):
    """A fold. A tensor's parts depend on that tensor, the facts and the survey alone."""

    def survey(self, deltas: Stream, merged: Stream | None) -> Facts:
        """Numbers of the whole incoming update that `fold` needs, such as a threshold.

        `merged` is the state's own delta, tensor by tensor in the order of `deltas`; None before the first update.
        The caller adds `weight`, how much this update counts (1 unless the config says otherwise).
        """
        return {}

    @property
    def entrywise(self) -> bool:
        """Whether an entry of the parts and of the merged delta depends on the same entry alone, once the facts, the
        survey and the look are known. Then a tensor may be folded in pieces."""
        return False

    def look(self, delta: Stream) -> Facts:
        """What `fold` would find out of a whole tensor of the update by itself. Who folds a tensor in pieces adds it to
        the survey, and the place of the piece's first entry as `start`."""
        return {}

    def fold(
        self, state: Parts | None, delta: Tensor, target: Target, facts: Facts, survey: Facts
    ) -> tuple[Parts, Sums]:
        """The parts after merging `delta` [shape of the parameter] into `state`; None before the first update.

        `facts` belong to the state before (empty at the first update), `survey` to the update. Inputs stay as they
        are: a part may be the input itself, but is never changed in place.
        """
        raise NotImplementedError

    def fold_planes(
        self, state: Parts | None, planes: Planes, target: Target, facts: Facts, survey: Facts
    ) -> tuple[Parts, Sums] | None:
        """`fold` of a ternary delta on its planes of bits (tasks/packed.py), which is never dense; the same bits.

        None if the method needs the numbers spread out, as most do. Parts are flat or of any shape, on the CPU.
        """
        return None

    def close(self, facts: Facts, sums: Sums, survey: Facts) -> Facts:
        """The facts of the new state from those of the old one, the sums over all tensors, and the survey."""
        return {"count": counted(facts)}

    def delta(self, state: Parts, facts: Facts, target: Target) -> Tensor:
        """Merged minus base for one tensor, in the dtype of the state."""
        raise NotImplementedError

    def workspace(self) -> float:
        """Memory that folding or writing one tensor takes, in multiples of the tensor in float32."""
        return 8


@dataclass(frozen=True)
class Joint(Merger):
    """A method that needs one tensor of all updates at once."""

    state_size: ClassVar[str] = "none: reads the stored updates"
    limit: ClassVar[int | None] = None  # updates that it can merge

    def combine(self, base: Tensor, deltas: Sequence[Tensor], weights: Sequence[float], target: Target) -> Tensor:
        """Merged minus base for one tensor. `base` and `deltas` have its shape, in float32 or float64."""
        raise NotImplementedError

    def combine_planes(self, deltas: Sequence[Planes], weights: Sequence[float], target: Target) -> Tensor | None:
        """`combine` of ternary deltas on their planes of bits, flat, in float32; what it adds up may round differently.

        None if the method needs the numbers spread out.
        """
        return None

    @property
    def entrywise(self) -> bool:
        """Whether `mix` is there: whether, after passes over a tensor, each of its entries can be merged alone."""
        return False

    def mix(self, deltas: Columns, weights: Sequence[float], hold: bool = True) -> Mix:
        """What merges any piece of a tensor as `combine` would merge it whole. Looks at all of it first.

        `hold`: whether a float64 number per entry may be held from one pass over the deltas to the next.
        """
        raise NotImplementedError

    def workspace(self, updates: int) -> float:
        """Memory that writing one tensor takes, in multiples of the tensor in float32."""
        return 3 * updates + 6


@dataclass(frozen=True)
class RunningSum(Sequential):
    """What mergers share whose state is the sum of the updates, and which differ only in what they make of it."""

    state_size: ClassVar[str] = "1"
    weighted: ClassVar[bool] = True

    def fold(
        self, state: Parts | None, delta: Tensor, target: Target, facts: Facts, survey: Facts
    ) -> tuple[Parts, Sums]:
        share = delta if weight_of(survey) == 1 else delta * weight_of(survey)
        return {"sum": share if state is None else state["sum"] + share}, {}

    def close(self, facts: Facts, sums: Sums, survey: Facts) -> Facts:
        """`weight`: the sum of the updates' weights."""
        return {"count": counted(facts), "weight": facts.get("weight", 0.0) + weight_of(survey)}


@dataclass(frozen=True)
class PlainSum(RunningSum):
    """A running sum of the updates as they are: of ternary ones it adds up the planes."""

    def fold_planes(
        self, state: Parts | None, planes: Planes, target: Target, facts: Facts, survey: Facts
    ) -> tuple[Parts, Sums]:
        return {"sum": added(None if state is None else state["sum"], planes, weight_of(survey))}, {}


def weight_of(survey: Facts) -> float:
    return survey.get("weight", 1.0)


def squared_norm(tensor: Tensor) -> float:
    """Sum of squares, accumulated in float64."""
    if tensor.device.type != "cpu":
        return float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) ** 2
    # piece by piece: a whole copy in float64 would leave the cache, and take twice the tensor's memory
    pieces = (piece.double() for piece in torch.split(tensor.reshape(-1), _PIECE))
    return math.fsum(float(torch.dot(piece, piece)) for piece in pieces)


def counted(facts: Facts) -> float:
    """The number of updates after one more."""
    return facts.get("count", 0) + 1
