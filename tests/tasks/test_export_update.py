"""Updates as whole models and as dense tensors, and what all forms of export promise."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from storage.errors import InvalidInput, Mismatch, Missing
from storage.manifest import Lineage
from storage.refs import CheckpointRef, UpdateRef
from tasks.codecs import CODECS, Ternary
from tasks.compress import compress_update
from tasks.exports import (
    export_checkpoint,
    export_delta,
    export_lora,
    export_patch,
    open_applied,
)
from tasks.extract import Extract, extract_update
from tasks.ingest import Checkpoint, ingest
from tasks.tensors import read_delta, read_tensor
from tests.builders import FORMS, ingested, memory_store, perturbed, tiny_model
from tests.tasks.tuned_case import Case, bits, case, edited, forget


class TestCheckpoint:
    @pytest.mark.parametrize("architecture", FORMS)
    @pytest.mark.parametrize("how", ["stored", "exact"])
    def test_it_is_the_tuned_model(self, architecture: str, how: str, tmp_path: Path) -> None:
        base = tiny_model(architecture).bfloat16()
        one = Case(base, perturbed(base), tmp_path)
        if how == "exact":
            one.update = compress_update(one.update, CODECS["exact"](), one.store)
            one.forget()
        done = export_checkpoint(one.applied, one.out)
        assert done.facts["exact"] and "bit for bit" in done.said[0]
        found, after = load_file(one.out / "model.safetensors"), one.files("tuned")
        assert found.keys() == after.keys()
        assert all(torch.equal(bits(found[name]), bits(after[name])) for name in after)
        assert ingest(Checkpoint(source=str(one.out)), one.store) == one.after
        _, info = type(base).from_pretrained(one.out, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]

    def test_a_lossy_update_is_added(self, tmp_path: Path) -> None:
        one = case("LlamaForCausalLM", tmp_path, dtype=torch.bfloat16)
        one.update = compress_update(one.update, Ternary(density=0.2), one.store)
        done = export_checkpoint(one.applied, one.out, shard_bytes=10_000)
        assert not done.facts["exact"] and done.said[0] == "base + update, cast to the base's dtypes"
        model = type(one.base).from_pretrained(one.out, dtype="auto")
        artifact = one.store.open(one.update)
        for name, base in one.base.state_dict().items():
            delta = read_delta(artifact, name.removeprefix("model.").replace("lm_head", "embed_tokens"))
            assert torch.equal(model.state_dict()[name], (base.float() + delta).bfloat16())

    def test_the_tuned_dtype_is_kept(self, tmp_path: Path) -> None:
        base = tiny_model("CLIPVisionModel")
        one = Case(base, perturbed(base).bfloat16(), tmp_path)
        export_checkpoint(one.applied, one.out)
        found = load_file(one.out / "model.safetensors")
        assert all(torch.equal(bits(found[name]), bits(tensor)) for name, tensor in one.files("tuned").items())
        exact = export_patch(one.applied, tmp_path / "patch")
        assert exact.facts["exact"] is False, "a patch has the dtypes of what it is applied to"

    def test_numbers_beyond_the_dtype_are_refused(self, tmp_path: Path) -> None:
        base = tiny_model("CLIPVisionModel").half()
        one = Case(base, edited(deepcopy(base).float(), lambda name, tensor: tensor.add_(1e6)), tmp_path, kept=False)
        with pytest.raises(InvalidInput, match="NaN or infinite"):
            export_checkpoint(one.applied, one.out)
        assert not one.out.exists()


class TestDelta:
    @pytest.mark.parametrize("architecture", FORMS)
    def test_it_is_tuned_minus_base(self, architecture: str, tmp_path: Path) -> None:
        one = case(architecture, tmp_path)
        export_delta(one.applied, one.out)
        found, before, after = load_file(one.out / "model.safetensors"), one.files("base"), one.files("tuned")
        assert found.keys() == before.keys()
        assert all(torch.equal(found[name], after[name] - before[name]) for name in found)
        assert json.loads((one.out / "deltaworks.json").read_bytes())["form"] == "delta"

    def test_shards_and_dtype(self, tmp_path: Path) -> None:
        one = case("LlamaForCausalLM", tmp_path)
        done = export_delta(one.applied, one.out, torch.bfloat16, shard_bytes=10_000)
        places = json.loads((one.out / "model.safetensors.index.json").read_bytes())["weight_map"]
        before, after = one.files("base"), one.files("tuned")
        assert len(set(places.values())) > 1 and places.keys() == before.keys()
        for name, file in places.items():
            assert torch.equal(load_file(one.out / file)[name], (after[name] - before[name]).bfloat16())
        assert "bfloat16" in done.said[0]

    def test_numbers_beyond_the_dtype_are_refused(self, tmp_path: Path) -> None:
        base = tiny_model("LlamaForCausalLM")
        one = Case(base, edited(base, lambda name, tensor: tensor.add_(1e6)), tmp_path)
        with pytest.raises(InvalidInput, match=r"float16.*bfloat16"):
            export_delta(one.applied, one.out, torch.float16)
        assert not one.out.exists()


EXPORTS = [export_lora, export_patch, export_checkpoint, export_delta]


@pytest.mark.parametrize("export", EXPORTS)
class TestAll:
    def test_nothing_is_overwritten(self, export: Callable[..., object], tmp_path: Path) -> None:
        one = case("LlamaForCausalLM", tmp_path)
        one.out.mkdir()
        (one.out / "mine").write_text("kept")
        with pytest.raises(InvalidInput, match="not empty"):
            export(one.applied, one.out)
        assert [path.name for path in one.out.iterdir()] == ["mine"]

    def test_a_failure_leaves_nothing(self, export: Callable[..., object], tmp_path: Path) -> None:
        one = case("LlamaForCausalLM", tmp_path)
        applied = one.applied
        for artifact in (one.store.open(one.update), one.store.open(one.after)):
            forget(one.store, f"blob/{artifact.record('layers.0.mlp.up_proj.weight').blob}")
        with pytest.raises(Missing, match="up_proj"):
            export(applied, one.out)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]

    def test_heads_are_left_out_and_named(self, export: Callable[..., object], tmp_path: Path) -> None:
        store, base = memory_store(), tiny_model("BertForMaskedLM")
        tuned = tiny_model("BertForSequenceClassification")
        tuned.bert.load_state_dict(perturbed(base.bert).state_dict(), strict=False)
        refs: list[CheckpointRef] = [
            ingested(model, tmp_path / name, store) for name, model in (("base", base), ("tuned", tuned))
        ]
        update = extract_update(*refs, Extract(heads="keep"), store)
        done = export(open_applied(update, store), tmp_path / "out")
        assert "classifier.weight" in " ".join(done.said)  # type: ignore[attr-defined]
        weights = load_file(next((tmp_path / "out").glob("*.safetensors")))
        assert not any("classifier" in name for name in weights)

    def test_progress_is_reported(self, export: Callable[..., object], tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        export(case("MixtralForCausalLM", tmp_path).applied, tmp_path / "out", report=lambda *one: seen.append(one))
        assert seen and seen == sorted(seen) and seen[-1][0] == seen[-1][1]


def test_a_base_that_is_gone_is_named(tmp_path: Path) -> None:
    one = case("LlamaForCausalLM", tmp_path)
    forget(one.store, one.before)
    with pytest.raises(InvalidInput, match=r"no longer stored.*Ingest the base"):
        open_applied(one.update, one.store)


def test_an_update_that_does_not_fit_its_base_is_refused(tmp_path: Path) -> None:
    one = case("LlamaForCausalLM", tmp_path)
    for name, shape, message in (("norm.weight", (3,), "shape"), ("other.weight", (3,), "none")):
        draft = one.store.draft("update", Lineage("extract", {"base": one.before}))
        draft.add(name, {"tensor": torch.ones(shape)}, role="norm.weight", dtype="F32", shape=shape)
        with pytest.raises(Mismatch, match=message):
            open_applied(UpdateRef(draft.commit()), one.store)


def test_entries_that_do_not_change_keep_their_bits(tmp_path: Path) -> None:
    """-0 + 0 is 0: without care the sum would change entries that the update does not touch."""
    base = edited(tiny_model("LlamaForCausalLM"), lambda name, tensor: tensor.view(-1)[:3].copy_(torch.tensor(-0.0)))
    one = Case(base, edited(base, lambda name, tensor: tensor.view(-1)[1:2].add_(1)), tmp_path, kept=False)
    applied = one.applied
    for name in applied.records:
        found, before = applied.after(name).view(-1), read_tensor(applied.base, name).view(-1)
        assert float(found[1]) == 1
        assert torch.equal(bits(found)[[0, 2]], bits(before)[[0, 2]])
