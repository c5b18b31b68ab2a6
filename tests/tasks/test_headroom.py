"""Too little memory: an answer that says which settings of this training take less."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from storage.errors import InvalidInput
from tasks.headroom import advised_on_memory
from tasks.optimizers import Muon
from tasks.tuners import Full, Lora

FULL = r"cpu ran out of memory in a training with tuner full at batch 64.*Set batch 32 with accumulate 2, or "


@pytest.mark.parametrize(
    ("tuner", "message"),
    [
        (Full(), FULL + r"gradient_checkpointing true, or precision bfloat16, or optimizer {name: galore}; or tune wi"),
        (Full(gradient_checkpointing=True, precision="bfloat16", optimizer=Muon(), batch=4, accumulate=3),
         r"at batch 4.*Set batch 2 with accumulate 6; or tune with lora"),
        (Lora(batch=1, precision="bfloat16"), r"tuner lora at batch 1.*Set gradient_checkpointing true$"),
        (Lora(batch=1, precision="bfloat16", gradient_checkpointing=True), r"tuner lora at batch 1.*larger device$"),
    ],
)  # fmt: skip
def test_the_advice_is_what_is_left_to_set(tuner: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message), advised_on_memory(tuner, "cpu"):
        torch.empty(2**52)  # 16 PiB: more than any machine maps


def test_a_gpus_error_is_the_same_and_others_pass() -> None:
    with pytest.raises(InvalidInput, match="cuda:0 ran out of memory"), advised_on_memory(Full(), "cuda:0"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(RuntimeError, match="shapes"), advised_on_memory(Full(), "cpu"):
        torch.ones(2, 3) @ torch.ones(2, 3)
