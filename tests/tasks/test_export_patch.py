"""Sparse patches: put onto the base's files they give the tuned model's, bit for bit where that can be."""

from __future__ import annotations

import json
from copy import deepcopy
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from storage.manifest import Lineage
from storage.refs import UpdateRef
from tasks.codecs import CODECS, Leaf, Ternary
from tasks.compress import compress_update
from tasks.exports import export_patch, open_applied
from tasks.tensors import read_delta
from tests.builders import FORMS, tiny_model
from tests.tasks.tuned_case import Case, bits, case, edited


def patched(base: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """What a server makes of a patch: written here without a line of ours."""
    index = json.loads((folder / "patch.json").read_bytes())
    found = {name: tensor.clone() for name, tensor in base.items()}
    for one in index["patches"]:
        with safe_open(folder / one["file"], framework="pt") as file:
            indices, values = file.get_tensor(f"{one['name']}.indices"), file.get_tensor(f"{one['name']}.values")
        target = found[one["name"]]
        assert list(target.shape) == one["shape"] and target.dtype == getattr(torch, one["dtype"]) == values.dtype
        assert indices.shape == values.shape == (one["nnz"],) and indices.dtype == torch.int32
        assert torch.equal(indices, indices.unique()) and int(indices[-1]) < target.numel()  # ascending, each once
        target.view(-1).index_copy_(0, indices.long(), values)
    return found


def sparsely(model: PreTrainedModel, share: float = 0.05) -> PreTrainedModel:
    """As training with reinforcement leaves it: few entries change, one from 0 to -0, and norms not at all."""
    generator = torch.Generator().manual_seed(5)

    def change(name: str, parameter: Tensor) -> None:
        if "norm" not in name:
            chosen = torch.rand(parameter.shape, generator=generator) < share
            parameter[chosen] = (parameter * 1.03)[chosen]
            parameter.view(-1)[0] = -0.0

    return edited(model, change)


class TestPatch:
    @pytest.mark.parametrize("kept", [True, False])
    @pytest.mark.parametrize("architecture", FORMS)
    def test_it_gives_the_tuned_files(self, architecture: str, kept: bool, tmp_path: Path) -> None:
        """Bit for bit: from the tuned checkpoint if it is stored, else from an update coded without loss."""
        base = edited(tiny_model(architecture).bfloat16(), lambda name, parameter: parameter.view(-1)[:1].zero_())
        one = Case(base, sparsely(base), tmp_path)
        if not kept:
            one.update = compress_update(one.update, CODECS["exact"](), one.store)
            one.forget()
        done = export_patch(one.applied, one.out)
        before, after = one.files("base"), one.files("tuned")
        found = patched(before, one.out)
        assert found.keys() == after.keys()
        assert all(torch.equal(bits(found[name]), bits(after[name])) for name in after)
        changed = sum(int((bits(before[name]) != bits(after[name])).sum()) for name in after)
        assert done.facts["changed"] == changed < 0.1 * done.facts["elements"]
        assert done.facts["exact"] is True and "bit for bit" in " ".join(done.said)
        again = patched(found, one.out)
        assert all(torch.equal(bits(again[name]), bits(after[name])) for name in after), "values are absolute"

    def test_of_a_lossy_update_it_is_base_plus_update(self, tmp_path: Path) -> None:
        one = case("LlamaForCausalLM", tmp_path, dtype=torch.bfloat16)
        one.update = compress_update(one.update, Ternary(density=0.1), one.store)
        done = export_patch(one.applied, one.out)
        assert done.facts["exact"] is False and "cast to the base's dtypes" in " ".join(done.said)
        found, artifact = patched(one.files("base"), one.out), one.store.open(one.update)
        for name, base in one.files("base").items():
            delta = read_delta(artifact, name.removeprefix("model."))
            assert torch.equal(found[name], (base.float() + delta).bfloat16())
            assert torch.equal(bits(found[name])[delta == 0], bits(base)[delta == 0])

    def test_without_the_tuned_checkpoint_it_is_base_plus_update(self, tmp_path: Path) -> None:
        one = case("BertForMaskedLM", tmp_path, kept=False)
        done = export_patch(one.applied, one.out)
        assert done.facts["exact"] is False
        found, before, artifact = patched(one.files("base"), one.out), one.files("base"), one.store.open(one.update)
        for name, tensor in one.files("tuned").items():
            torch.testing.assert_close(found[name], tensor, atol=1e-7, rtol=1e-6)
        name = "bert.encoder.layer.0.output.dense.weight"
        assert torch.equal(found[name], before[name] + read_delta(artifact, name.removeprefix("bert.")))

    def test_digests_are_of_the_tensors(self, tmp_path: Path) -> None:
        one = case("GPT2LMHeadModel", tmp_path, dtype=torch.bfloat16)
        export_patch(one.applied, one.out)
        index = json.loads((one.out / "patch.json").read_bytes())
        assert (index["base"], index["update"]) == (one.before, one.update)
        before, after = one.files("base"), one.files("tuned")
        for patch in index["patches"]:
            name = patch["name"]
            assert patch["base_sha256"] == sha256(bits(before[name]).numpy().tobytes()).hexdigest()
            assert patch["sha256"] == sha256(bits(after[name]).numpy().tobytes()).hexdigest()

    def test_shards(self, tmp_path: Path) -> None:
        one = case("LlamaForCausalLM", tmp_path)
        export_patch(one.applied, one.out, shard_bytes=20_000)
        names = sorted(path.name for path in one.out.iterdir())
        assert len(names) > 3 and names[0] == f"patch-00001-of-{len(names) - 1:05d}.safetensors"
        found, after = patched(one.files("base"), one.out), one.files("tuned")
        assert all(torch.equal(found[name], after[name]) for name in after)

    def test_nothing_changed(self, tmp_path: Path) -> None:
        base = tiny_model("LlamaForCausalLM")
        one = Case(base, deepcopy(base), tmp_path)
        done = export_patch(one.applied, one.out)
        assert done.facts["changed"] == 0
        assert patched(one.files("base"), one.out).keys() == one.files("tuned").keys()

    def test_a_patch_that_is_no_gain_says_so(self, tmp_path: Path) -> None:
        one = case("LlamaForCausalLM", tmp_path, dtype=torch.bfloat16)
        assert "larger than the whole model" in " ".join(export_patch(one.applied, one.out).said)

    def test_nan_is_written_and_named(self, tmp_path: Path) -> None:
        """A lossless update may have it; a server that marks unchanged entries by NaN cannot take it."""
        one = case("CLIPVisionModel", tmp_path)
        record = one.store.open(one.before).record("encoder.layers.0.mlp.fc1.weight")
        base = one.applied.before(record.name)
        tuned = base.clone()
        tuned[0, :2] = torch.tensor([torch.nan, 7.0])
        coded = CODECS["exact"]().encode(Leaf(record.name, record.role, tuned - base, sides=lambda: (base, tuned)), {})
        draft = one.store.draft("update", Lineage("extract", {"base": one.before}))
        draft.add(
            record.name, coded.parts, role=record.role, dtype="F32", shape=record.shape, codec=coded.codec,
            onto=record.blob, digest=coded.digest,
        )  # fmt: skip
        done = export_patch(open_applied(UpdateRef(draft.commit()), one.store), one.out)
        name = f"vision_model.{record.name}" if f"vision_model.{record.name}" in one.files("base") else record.name
        assert torch.equal(bits(patched(one.files("base"), one.out)[name]), bits(tuned))
        assert "1 tensors change to NaN" in " ".join(done.said)
