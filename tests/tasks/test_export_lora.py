"""Adapters for peft: loaded by peft onto the base they give the tuned model, as far as the error that is stated."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from storage.errors import InvalidInput
from storage.manifest import Lineage
from storage.refs import UpdateRef
from tasks.exports import (
    LoraForm,
    export_lora,
    open_applied,
)
from tasks.parallel import Budget
from tasks.tensors import prefixed, read_delta
from tests.builders import FORMS, ingested, memory_store, perturbed, tiny_model
from tests.tasks.tuned_case import Case, case, edited

LOADS = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*gradient_checkpointing", "ignore:.*tied")
WHOLE = LoraForm(rank=1000)


def loaded(base: PreTrainedModel, folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(deepcopy(base), folder).eval()


def merged(base: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = loaded(base, folder).merge_and_unload().state_dict()
    return found


def inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(3, 60, (2, 7), generator=generator)}


def outputs(model: Callable[..., object], given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**given)[0]  # type: ignore[index]
    return found


@LOADS
class TestLora:
    @pytest.mark.parametrize("architecture", FORMS)
    def test_of_full_rank_it_is_the_tuned_model(self, architecture: str, tmp_path: Path) -> None:
        """Tied weights, norms, biases, embeddings, convolutions, bare parameters, fused experts and Conv1D included."""
        one = case(architecture, tmp_path)
        export_lora(one.applied, one.out, WHOLE)
        given = inputs(one.base)
        model = loaded(one.base, one.out)
        assert not torch.allclose(outputs(one.base, given), outputs(one.tuned, given), atol=1e-3)
        torch.testing.assert_close(outputs(model, given), outputs(one.tuned, given), atol=1e-5, rtol=1e-5)
        found = merged(one.base, one.out)
        assert found.keys() == one.tuned.state_dict().keys()
        for name, tensor in one.tuned.state_dict().items():
            torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "CLIPVisionModel"])
    def test_it_can_be_switched_off(self, architecture: str, tmp_path: Path) -> None:
        one = case(architecture, tmp_path)
        export_lora(one.applied, one.out, WHOLE)
        model, given = loaded(one.base, one.out), inputs(one.base)
        with model.disable_adapter():
            assert torch.equal(outputs(model, given), outputs(one.base, given))

    @pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "ViTModel"])
    def test_stored_factors_are_written_as_they_are(self, architecture: str, tmp_path: Path) -> None:
        """Of three ranks; GPT-2 holds its weights the other way round."""
        store, base = memory_store(), tiny_model(architecture)
        root = ingested(base, tmp_path / "base", store)
        records = [one for one in store.open(root).manifest.tensors if one.role == "linear.weight"]
        draft, factors = store.draft("update", Lineage("extract", {"base": root})), {}
        for number, record in enumerate(records):
            generator = torch.Generator().manual_seed(number)
            B = torch.randn(record.shape[0], 2 + number % 3, generator=generator)
            A = torch.randn(2 + number % 3, record.shape[1], generator=generator)
            factors[record.name] = (B, A)
            parts = prefixed({"tensor": B}, "B") | prefixed({"tensor": A}, "A")
            draft.add(record.name, parts, role=record.role, dtype="F32", shape=record.shape, rank=B.shape[1])
        update = UpdateRef(draft.commit())
        done = export_lora(open_applied(update, store), tmp_path / "out", LoraForm(rank=1))
        assert done.facts["error"] == 0 and "none was cut" in " ".join(done.said)
        model = loaded(base, tmp_path / "out")
        layers = {
            path: module for path, module in model.get_base_model().named_modules() if isinstance(module, LoraLayer)
        }
        assert len(layers) == len(records)
        skeleton = open_applied(update, store).skeleton
        for path, layer in layers.items():
            B, A = factors[skeleton.canonical(f"{path}.weight")]
            lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            if getattr(layer, "fan_in_fan_out", False):
                lora_A, lora_B = lora_B.T, lora_A.T
            assert torch.equal(lora_B, B) and torch.equal(lora_A, A)
            assert layer.scaling["default"] == 1
            torch.testing.assert_close(layer.get_delta_weight("default"), B @ A)
        config = json.loads((tmp_path / "out/adapter_config.json").read_bytes())
        assert config["r"] == config["lora_alpha"] == 4

    def test_the_rank_is_the_smallest_within_the_error(self, tmp_path: Path) -> None:
        one = case("BertForMaskedLM", tmp_path)
        export_lora(one.applied, one.out, LoraForm(error=0.5))
        said = json.loads((one.out / "deltaworks.json").read_bytes())["tensors"]
        model = loaded(one.base, one.out).get_base_model()
        artifact, seen = one.store.open(one.update), set()
        for path, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                name = f"{path}.weight".removeprefix("bert.")
                delta = read_delta(artifact, name).double()
                squares = torch.linalg.svdvals(delta).square()
                errors = [float(squares[rank:].sum() / squares.sum()) ** 0.5 for rank in range(len(squares) + 1)]
                rank = next(rank for rank, error in enumerate(errors) if error <= 0.5)
                assert layer.r["default"] == said[name]["rank"] == rank
                off = float((layer.get_delta_weight("default").detach().double() - delta).norm() / delta.norm())
                assert off == pytest.approx(errors[rank], rel=1e-4) == said[name]["error"]
                seen.add(rank)
        assert len(seen) > 1, "patterns of ranks are what this is about"

    @pytest.mark.parametrize("skip", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_the_error_is_what_is_lost(self, skip: bool, dtype: torch.dtype, tmp_path: Path) -> None:
        one = case("GPT2LMHeadModel", tmp_path)
        done = export_lora(one.applied, one.out, LoraForm(rank=4, skip=skip, dtype=dtype))
        found, base = merged(one.base, one.out), one.base.state_dict()
        wanted = {name: tensor for name, tensor in one.tuned.state_dict().items() if name != "lm_head.weight"}  # tied
        off = sum(float((found[name] - tensor).square().sum()) for name, tensor in wanted.items())
        all_of_it = sum(float((base[name] - tensor).square().sum()) for name, tensor in wanted.items())
        assert done.facts["error"] == pytest.approx((off / all_of_it) ** 0.5, rel=1e-3)
        assert f"in all: {done.facts['error']:.2%}" in " ".join(done.said)
        names = load_file(one.out / "adapter_model.safetensors").keys()
        assert all(".lora_" in name for name in names) == skip
        assert bool(done.facts["left_out"]) == skip == ("left out" in " ".join(done.said))

    def test_biases_where_not_all_modules_have_one(self, tmp_path: Path) -> None:
        config = transformers.Qwen2Config(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False,
        )  # fmt: skip
        torch.manual_seed(0)
        base = transformers.Qwen2ForCausalLM(config).eval()
        one = Case(base, perturbed(base), tmp_path)
        export_lora(one.applied, one.out, WHOLE)
        given = inputs(base)
        torch.testing.assert_close(
            outputs(loaded(base, one.out), given), outputs(one.tuned, given), atol=1e-5, rtol=1e-5
        )
        loaded(base, one.out).save_pretrained(tmp_path / "again")
        for folder in (one.out, tmp_path / "again"):
            found = merged(base, folder)
            for name, tensor in one.tuned.state_dict().items():
                torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)

    def test_tied_weights_are_tied_in_the_adapter(self, tmp_path: Path) -> None:
        one = case("LlamaForCausalLM", tmp_path)
        export_lora(one.applied, one.out)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*tie")  # peft warns of adapters that do not say so
            model = loaded(one.base, one.out).get_base_model()
        copies = [module.modules_to_save["default"].weight for module in (model.model.embed_tokens, model.lm_head)]
        assert copies[0] is copies[1]
        assert torch.equal(copies[0], one.tuned.model.embed_tokens.weight)

    def test_a_bias_that_changes_alone(self, tmp_path: Path) -> None:
        base = tiny_model("GPT2LMHeadModel")

        def change(name: str, parameter: Tensor) -> None:
            if name.endswith(("c_fc.weight", "c_attn.bias")):
                parameter.add_(0.25)

        one = Case(base, edited(base, change), tmp_path)
        done = export_lora(one.applied, one.out)
        assert done.facts["saved_whole"] == []
        found = merged(base, one.out)
        for name, tensor in one.tuned.state_dict().items():
            torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5)
        assert not any("c_proj" in name for name in load_file(one.out / "adapter_model.safetensors"))

    def test_without_linear_weights_it_is_refused(self, tmp_path: Path) -> None:
        base = tiny_model("LlamaForCausalLM")
        one = Case(base, edited(base, lambda name, weight: weight.add_("norm" in name)), tmp_path)
        with pytest.raises(InvalidInput, match="changes no linear weight"):
            export_lora(one.applied, one.out)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]

    def test_neither_threads_nor_a_second_run_change_a_byte(self, tmp_path: Path) -> None:
        one = case("CLIPVisionModel", tmp_path)
        export_lora(one.applied, tmp_path / "one")
        export_lora(one.applied, tmp_path / "two", budget=Budget(workers=3, memory=10_000))
        for path in (tmp_path / "one").iterdir():
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()

    @pytest.mark.parametrize("wrong", [{"rank": 0}, {"error": 1.0}, {"error": -0.1}, {"dtype": torch.int8}])
    def test_settings_are_checked(self, wrong: dict[str, object]) -> None:
        with pytest.raises(InvalidInput, match=next(iter(wrong))):
            LoraForm(**wrong)  # type: ignore[arg-type]
