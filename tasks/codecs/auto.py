"""Auto: for every tensor the codec that writes it smallest within a budget of error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from tasks.choice import require
from tasks.codecs.base import Codec, Option, Trial
from tasks.codecs.low_rank import LowRank
from tasks.codecs.plain import AnyPlain
from tasks.codecs.rtn import Rtn
from tasks.codecs.ternary import Ternary

ERRORS = (0.9, 0.75, 0.6, 0.45, 0.3, 0.2, 0.1, 0.05, 0.01)


@dataclass(frozen=True)
class Auto(Codec):
    """Every tensor is written by each of `codecs`; of those within the budget the smallest stays, or else the one with
    the smallest error. The record of each tensor names its codec and the error that was measured.

    error   budget of each tensor: the Frobenius norm of what is lost over that of the tensor
    drop    if set, the budget is found instead: of nine from 0.9 to 0.01 the one with the fewest bytes whose score on
            examples that the task was trained on is at most this much below that of the update as it was. A chain does
            that, `compress_update` alone cannot
    """

    source: ClassVar[str] = "the smallest of the others"

    name: Literal["auto"] = "auto"
    version: Literal[1] = 1
    error: float = 0.3
    drop: float | None = None
    codecs: tuple[AnyPlain, ...] = (
        Ternary(density=0.1),
        Ternary(density=0.2),
        LowRank(),
        Rtn(bits=2),
        Rtn(bits=3),
        Rtn(bits=4),
        Rtn(bits=8),
    )

    def __post_init__(self) -> None:
        require(self.error > 0, "error", "positive: for an error of 0 choose `exact`", self.error)
        require(self.drop is None or self.drop >= 0, "drop", "not negative, in units of the score", self.drop)
        require(len(self.codecs) > 0, "codecs", "a list with at least one codec", self.codecs)
        lossless = [codec.name for codec in self.codecs if codec.lossless]
        require(not lossless, "codecs", "lossy ones: what is lossless has no error to choose by", lossless)
        searching = [codec.spec() for codec in self.codecs if codec.trials()]
        require(not searching, "codecs", "settled: of a search there is one, that of `drop`", searching)

    @property
    def alternatives(self) -> tuple[Codec, ...]:
        require(self.drop is None, "drop", "found first where it is set, as a chain does", self.drop)
        return self.codecs

    def pick(self, options: Sequence[Option]) -> int:
        within = [number for number, option in enumerate(options) if option.error <= self.error]
        if within:
            return min(within, key=lambda number: (options[number].bytes, options[number].error))
        return min(range(len(options)), key=lambda number: (options[number].error, options[number].bytes))

    @property
    def examples(self) -> int:
        return max(codec.examples for codec in self.codecs)

    def trials(self) -> Sequence[Self]:
        return [] if self.drop is None else [replace(self, error=error, drop=None) for error in ERRORS]

    def best(self, exact: float, tried: Sequence[Trial]) -> int:
        """The fewest bytes among those that lose at most `drop`, else the highest score."""
        assert self.drop is not None
        within = [number for number, trial in enumerate(tried) if trial.score >= exact - self.drop]
        if within:
            return min(within, key=lambda number: (tried[number].bytes, -tried[number].score))
        return max(range(len(tried)), key=lambda number: tried[number].score)
