"""Tuners: how a model is trained on a task. `AnyTuner` is the list of choices; one file each."""

from __future__ import annotations

from typing import Annotated

from tasks.choice import BY_NAME
from tasks.tuners.base import Factors, Tuner
from tasks.tuners.full import Full
from tasks.tuners.lora import Lora

AnyTuner = Annotated[Full | Lora, BY_NAME]

__all__ = ["AnyTuner", "Factors", "Full", "Lora", "Tuner"]
