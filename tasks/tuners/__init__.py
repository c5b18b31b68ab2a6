"""Tuners: how a model is trained on a task. `AnyTuner` is the list of choices; one file each."""

from __future__ import annotations

from typing import Annotated

from tasks.choice import BY_NAME, choices
from tasks.tuners.adalora import AdaLora
from tasks.tuners.base import Factors, Training
from tasks.tuners.full import Full
from tasks.tuners.lora import Lora
from tasks.tuners.osf import Osf
from tasks.tuners.randlora import RandLora
from tasks.tuners.shira import Shira

AnyTuner = Annotated[Full | Lora | AdaLora | RandLora | Osf | Shira, BY_NAME]
TUNERS = choices(AnyTuner)

__all__ = ["TUNERS", "AdaLora", "AnyTuner", "Factors", "Full", "Lora", "Osf", "RandLora", "Shira", "Training"]
