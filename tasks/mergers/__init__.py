"""Mergers: how one more update enters a merged model. `AnyMerger` is the list of choices; one file each."""

from __future__ import annotations

from typing import Annotated

from tasks.choice import BY_NAME, choices
from tasks.mergers.average import Average
from tasks.mergers.base import Facts, Joint, Merger, Parts, Sequential, Sums, Target
from tasks.mergers.opcm import Opcm
from tasks.mergers.task_arithmetic import TaskArithmetic
from tasks.mergers.ties import Ties

AnyMerger = Annotated[Average | TaskArithmetic | Ties | Opcm, BY_NAME]

MERGERS: dict[str, type[AnyMerger]] = choices(AnyMerger)

__all__ = [
    "MERGERS",
    "AnyMerger",
    "Average",
    "Facts",
    "Joint",
    "Merger",
    "Opcm",
    "Parts",
    "Sequential",
    "Sums",
    "Target",
    "TaskArithmetic",
    "Ties",
]
