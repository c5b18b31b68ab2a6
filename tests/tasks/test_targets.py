"""Targets: which layers a word or a name means, and what is said when it means none. Nothing is loaded before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from storage.errors import InvalidInput
from tasks.checkpoints import skeleton_of
from tasks.naming import Skeleton
from tasks.tuners import AdaLora, Lora, Osf, RandLora, Shira
from tasks.tuners.adapter import Adapter
from tasks.tuners.targets import find
from tests.builders import ingested, memory_store, tiny_model


def skeleton(architecture: str, folder: Path) -> Skeleton:
    store = memory_store()
    return skeleton_of(store.open(ingested(tiny_model(architecture), folder, store)))


def paths(tuner: Adapter, architecture: str, folder: Path) -> set[str]:
    return {one.path for one in find(tuner.targets, skeleton(architecture, folder), tuner.adapts, tuner.name)}


ATTENTION = {f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"}
FEED = {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("tuner", "architecture", "expected"),
    [
        (Lora(), "LlamaForCausalLM", ATTENTION | FEED),
        (Osf(), "LlamaForCausalLM", ATTENTION | FEED),
        (Lora(targets=("q_proj",)), "LlamaForCausalLM", {"model.layers.0.self_attn.q_proj"}),
        (Lora(targets=("self_attn.v_proj", "model.layers.0.mlp.up_proj")), "LlamaForCausalLM",
         {"model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj"}),
        (RandLora(), "GPT2LMHeadModel", {f"transformer.h.0.{name}" for name in
                                          ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}),
        (Lora(targets="all-conv"), "ViTModel", {"embeddings.patch_embeddings.projection"}),
        (AdaLora(targets=("projection",)), "ViTModel", {"embeddings.patch_embeddings.projection"}),
    ],
)  # fmt: skip
def test_targets_are_layers(tuner: Any, architecture: str, expected: set[str], tmp_path: Path) -> None:
    assert paths(tuner, architecture, tmp_path) == expected


def test_all_is_linear_layers_and_convolutions(tmp_path: Path) -> None:
    linear, conv, both = (
        paths(Lora(targets=word), "ViTModel", tmp_path / word)  # type: ignore[arg-type]
        for word in ("all-linear", "all-conv", "all")
    )
    assert conv and both == linear | conv


@pytest.mark.parametrize(
    ("tuner", "architecture", "message"),
    [
        (Lora(targets=("query",)), "LlamaForCausalLM",
         r"targets: no module of LlamaForCausalLM is called 'query'.*Modules with weights there: "
         r"embed_tokens, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"),
        (Lora(targets=("q_prj",)), "LlamaForCausalLM", r"is called 'q_prj'.*Did you mean q_proj"),
        (Lora(targets=("proj",)), "LlamaForCausalLM", r"is called 'proj'"),  # an ending of names, not of letters
        (Lora(targets=("q_proj", "embed_tokens")), "LlamaForCausalLM",
         r"'embed_tokens' is Embedding \(model.embed_tokens\), and lora adapts Linear, Conv1D, Conv2d"),
        (Lora(targets=("lm_head",)), "LlamaForCausalLM", r"'lm_head' has no weight of its own.*tied to .*embed_tokens"),
        (Osf(), "GPT2LMHeadModel",
         r"all-linear are none that osf adapts in GPT2LMHeadModel: it adapts Linear.*Conv1D, Embedding"),
        (Shira(targets="all-conv"), "ViTModel", r"all-conv are none that shira adapts in ViTModel"),
        (Lora(targets="all-conv"), "LlamaForCausalLM", r"all-conv are none that lora adapts in LlamaForCausalLM"),
        (Lora(rank=33), "LlamaForCausalLM", r"rank must be at most 32, the smaller side of .*found 33"),
        (AdaLora(initial=40, rank=33), "LlamaForCausalLM", r"initial must be at most 32.*found 40"),
        (RandLora(rank=17), "LlamaForCausalLM", r"rank must be at most 16, the smaller side of .*k_proj.*found 17"),
        (Shira(rank=11), "LlamaForCausalLM", r"rank must be at most 10, with which nearly every entry of .*found 11"),
        (Osf(keep=0.01), "LlamaForCausalLM", r"keep must be at least 1 / 16, a direction of .*found 0.01"),
    ],
)  # fmt: skip
def test_targets_that_cannot_be_are_said_by_name(tuner: Any, architecture: str, message: str, tmp_path: Path) -> None:
    model, made = tiny_model(architecture), skeleton(architecture, tmp_path)
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(InvalidInput, match=message):
        tuner.attach(model, made)
    assert [name for name, _ in model.named_parameters()] == before
