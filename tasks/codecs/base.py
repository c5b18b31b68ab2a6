"""What a codec is: two functions that undo each other, and a look at the whole update beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

from torch import Tensor

from tasks.choice import Choice
from tasks.select import Stream

Parts = dict[str, Tensor]
Facts = Mapping[str, float]
Sides = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Leaf:
    """One tensor to be written: a delta, or a factor of a low-rank one.

    name:   the parameter's canonical name, followed by `.A` or `.B` for a factor
    role:   what it is in its module: `linear.weight`, `norm.bias`, `embedding.weight` ...
    delta:  float32 or float64, finite
    update: ref of the update it is from: with the name, what keys random masks
    sides:  reads the base and the tuned tensor as their checkpoints hold them, for codecs that keep every bit
    inputs: the calibration data of its module, X^T X / rows [columns, columns], if there is any
    """

    name: str
    role: str
    delta: Tensor
    update: str = ""
    sides: Sides | None = None
    inputs: Callable[[], Tensor] | None = None


class Coded(NamedTuple):
    """A tensor as written. No parts at all stand for zeros.

    codec:  who decodes the parts, `name@version`
    rank:   if set, the parts are the factors B and A (`B.…`, `A.…`), each coded by `codec`
    digest: of codecs that need the base to decode, sha256 of the tensor's bytes that decoding must give
    """

    parts: Parts
    codec: str
    rank: int | None = None
    digest: str | None = None


class Option(NamedTuple):
    """What an alternative made of a tensor: bytes, and relative Frobenius error."""

    bytes: int
    error: float


class Trial(NamedTuple):
    """What a codec made of an update: bytes of its files, and the score of base plus update on examples."""

    bytes: int
    score: float


class Codec(Choice):
    """A codec writes tensors of floats as parts (a dict of tensors) and reads them back.

    source:        paper and section, or the program, that the numbers follow
    lossless:      whether decoding gives the tuned tensor's very bits, from the base's
    keeps_factors: whether low-rank tensors are left as the factors they are
    turns_factors: whether their factors are turned before they are coded, so that the entries of both matter alike

    `decode` needs only the parts and the shape, `restore` the base tensor too: a stored tensor can be read without the
    update around it. Both raise Damaged if the parts are not what `encode` writes.
    """

    source: ClassVar[str]
    lossless: ClassVar[bool] = False
    keeps_factors: ClassVar[bool] = False
    turns_factors: ClassVar[bool] = False

    name: str
    version: int

    def survey(self, deltas: Stream) -> Facts:
        """See every tensor of the update before the first is encoded, for thresholds and scales of the whole update.

        What it returns is handed to `encode` and kept as facts of the update.
        """
        return {}

    @property
    def alternatives(self) -> tuple[Codec, ...]:
        """The codecs that write each tensor, for `pick` to choose from: this one alone, for most."""
        return (self,)

    def pick(self, options: Sequence[Option]) -> int:
        """Which of the alternatives' results to keep for one tensor."""
        return 0

    @property
    def examples(self) -> int:
        """Rows of the task's training split that its layers' inputs are taken from (`Leaf.inputs`)."""
        return 0

    def encode(self, leaf: Leaf, facts: Facts) -> Coded:
        raise NotImplementedError

    @staticmethod
    def decode(parts: Parts, shape: tuple[int, ...]) -> Tensor:
        """The delta in float32 or float64, on the CPU."""
        raise NotImplementedError

    @staticmethod
    def restore(parts: Parts, shape: tuple[int, ...], base: Tensor) -> Tensor:
        """Of lossless codecs in place of `decode`: the tuned tensor, on the CPU, from the base's."""
        raise NotImplementedError

    def trials(self) -> Sequence[Self]:
        """Codecs to be tried on examples of the task, of which one takes this one's place; none for most."""
        return ()

    def best(self, exact: float, tried: Sequence[Trial]) -> int:
        """Which of the trials takes this one's place. `exact`: the score of the update before it was compressed."""
        raise NotImplementedError


def decoder(codec: Codec | type[Codec]) -> str:
    """How manifests name a codec: `ternary@2`."""
    return f"{codec.name}@{codec.version}"
