"""Optimizers: how a gradient becomes a step. `AnyOptimizer` is the list of choices; one file each."""

from __future__ import annotations

from typing import Annotated

from tasks.choice import BY_NAME, choices
from tasks.optimizers.adamw import AdamW
from tasks.optimizers.apollo import Apollo
from tasks.optimizers.base import Rates, Stepper
from tasks.optimizers.galore import Galore
from tasks.optimizers.muon import Muon

AnyOptimizer = Annotated[AdamW | Muon | Galore | Apollo, BY_NAME]
OPTIMIZERS = choices(AnyOptimizer)

__all__ = ["OPTIMIZERS", "AdamW", "AnyOptimizer", "Apollo", "Galore", "Muon", "Rates", "Stepper"]
