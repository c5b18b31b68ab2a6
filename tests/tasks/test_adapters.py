"""Adapters of peft, made by peft: the checkpoint is what peft's own merge gives, and the factors stay factors."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from storage.artifacts import ArtifactStore
from storage.errors import InvalidInput, Mismatch
from storage.refs import CheckpointRef
from tasks.adapters import ingest_adapter
from tasks.checkpoints import load_model
from tasks.exports import LoraForm, export_lora
from tasks.extract import Extract, extract_update
from tests.builders import ingested, memory_store, tiny_model
from tests.tasks.tuned_case import case

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*tied", "ignore:.*missing adapter keys")


def trained(base: PreTrainedModel, folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Write an adapter of `base` whose factors are drawn; returns the merged model's tensors."""
    generator = torch.Generator().manual_seed(7)
    model = get_peft_model(deepcopy(base), LoraConfig(**{"r": 4, "lora_alpha": 12, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    found: dict[str, torch.Tensor] = model.merge_and_unload().state_dict()
    return found


def check(base: CheckpointRef, folder: Path, wanted: dict[str, torch.Tensor], store: ArtifactStore) -> CheckpointRef:
    ref = ingest_adapter(folder, base, store)
    found = load_model(store.open(ref, "checkpoint")).state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)
    return ref


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("LlamaForCausalLM", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
        ("LlamaForCausalLM", {"target_modules": "all-linear", "use_rslora": True}),
        ("LlamaForCausalLM", {"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 2}}),
        ("LlamaForCausalLM", {"target_modules": ["q_proj", "o_proj"], "alpha_pattern": {"o_proj": 5}}),
        ("BertForMaskedLM", {"target_modules": ["query", "value"], "bias": "lora_only"}),
        ("BertForMaskedLM", {"target_modules": ["query", "word_embeddings"], "modules_to_save": ["LayerNorm"]}),
        ("GPT2LMHeadModel", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("BertForMaskedLM", {"target_modules": ["query"], "lora_bias": True}),
        ("ViTModel", {"target_modules": ["q_proj", "v_proj"]}),
    ],
)  # fmt: skip
def test_it_is_what_peft_merges(architecture: str, settings: dict[str, Any], tmp_path: Path) -> None:
    store, model = memory_store(), tiny_model(architecture)
    base = ingested(model, tmp_path / "base", store)
    wanted = trained(model, tmp_path / "adapter", **settings)
    ref = check(base, tmp_path / "adapter", wanted, store)
    update = store.open(extract_update(base, ref, Extract(), store), "update")
    low = [record for record in update.manifest.tensors if record.rank is not None]
    assert low and all(record.rank in (2, 4) for record in low)
    assert ingest_adapter(tmp_path / "adapter", base, store) == ref


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "BertForMaskedLM"])
def test_what_was_exported_comes_back(architecture: str, tmp_path: Path) -> None:
    one = case(architecture, tmp_path)
    export_lora(one.applied, one.out, LoraForm(rank=1000))
    store = one.applied.update.store
    base = CheckpointRef(one.applied.base.ref)  # type: ignore[arg-type]
    check(base, one.out, one.tuned.state_dict(), store)


def adapter(tmp_path: Path) -> tuple[ArtifactStore, CheckpointRef, Path]:
    store, model = memory_store(), tiny_model("LlamaForCausalLM")
    base = ingested(model, tmp_path / "base", store)
    trained(model, tmp_path / "adapter", target_modules=["q_proj"])
    return store, base, tmp_path / "adapter"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "IA3"}, "'IA3'"),
        ({"peft_type": None}, "only LORA"),
    ],
)
def test_other_kinds_are_refused(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    store, base, folder = adapter(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(InvalidInput, match=said):
        ingest_adapter(folder, base, store)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    store, _, folder = adapter(tmp_path)
    other = ingested(tiny_model("BertForMaskedLM"), tmp_path / "bert", store)
    with pytest.raises(Mismatch, match="for others"):
        ingest_adapter(folder, other, store)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(InvalidInput, match="pickled adapters are refused"):
        ingest_adapter(folder, other, store)
