"""Mergers: how one more update enters a merged model. `AnyMerger` is the list of choices; one file each."""

from __future__ import annotations

from typing import Annotated

from tasks.choice import BY_NAME, choices
from tasks.mergers.average import Average
from tasks.mergers.base import Facts, Joint, Merger, Parts, Sequential, Sums, Target
from tasks.mergers.breadcrumbs import Breadcrumbs
from tasks.mergers.continual_ties import ContinualTies
from tasks.mergers.iso_c import IsoC
from tasks.mergers.iso_cts import IsoCts
from tasks.mergers.karcher import Karcher
from tasks.mergers.magmax import Magmax
from tasks.mergers.model_stock import ModelStock
from tasks.mergers.opcm import Opcm
from tasks.mergers.sce import Sce
from tasks.mergers.slerp import Slerp
from tasks.mergers.task_arithmetic import TaskArithmetic
from tasks.mergers.ties import Ties
from tasks.mergers.tsv_m import TsvM
from tasks.mergers.varm import Varm

AnyMerger = Annotated[
    Average
    | TaskArithmetic
    | Ties
    | Opcm
    | TsvM
    | IsoC
    | IsoCts
    | Sce
    | ModelStock
    | Slerp
    | Karcher
    | ContinualTies
    | Magmax
    | Varm
    | Breadcrumbs,
    BY_NAME,
]

MERGERS: dict[str, type[AnyMerger]] = choices(AnyMerger)

__all__ = [
    "MERGERS",
    "AnyMerger",
    "Average",
    "Breadcrumbs",
    "ContinualTies",
    "Facts",
    "IsoC",
    "IsoCts",
    "Joint",
    "Karcher",
    "Magmax",
    "Merger",
    "ModelStock",
    "Opcm",
    "Parts",
    "Sce",
    "Sequential",
    "Slerp",
    "Sums",
    "Target",
    "TaskArithmetic",
    "Ties",
    "TsvM",
    "Varm",
]
