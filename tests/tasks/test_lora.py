"""LoRA's factors: their product is exactly what peft adds to the weight, whichever way round a layer holds it."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer

from tasks.checkpoints import skeleton_of
from tasks.tuners import Lora
from tests.builders import ingested, memory_store, tiny_model


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # peft says that it saw the Conv1D layers, which is what we want
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "ViTModel"])
def test_factors_are_what_peft_merges(architecture: str, tmp_path: Path) -> None:
    """GPT-2 keeps its weights transposed: its factors must come out for the weight as it is stored."""
    store, model = memory_store(), tiny_model(architecture)
    skeleton = skeleton_of(store.open(ingested(model, tmp_path, store)))
    tuned, tuner = deepcopy(model), Lora(rank=3, alpha=5.0)
    tuner.attach(tuned, skeleton)
    assert all("lora_" in name for name, parameter in tuned.named_parameters() if parameter.requires_grad)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    factors = dict(tuner.collect(tuned, skeleton))
    layers = {path: module for path, module in tuned.named_modules() if isinstance(module, LoraLayer)}
    assert len(factors) == len(layers) > 3
    for path, layer in layers.items():
        slot = skeleton.slots[skeleton.canonical(f"{path}.weight")]
        found = factors[skeleton.canonical(f"{path}.weight")]
        assert (found.B.shape[0], found.B.shape[1], found.A.shape[1]) == (slot.shape[0], 3, slot.shape[1])
        torch.testing.assert_close(found.B @ found.A, layer.get_delta_weight("default"))
